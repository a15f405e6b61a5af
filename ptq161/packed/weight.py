"""What every storage format has in common: bytes, bits per weight, a state dict and a version.

A format is a frozen dataclass derived from :class:`PackedWeight`. Its ``Tensor`` fields are what is stored;
its ``int`` and ``bool`` fields are settings that stand once per linear in the checkpoint's configuration.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.kernels import packed_rows
from ptq161.kernels.packed_rows import Operands

SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
OF_ACTIVATIONS = ("activation_scale", "activation_zero_point")
"""Tensors of the inputs, which every format may have and which do not count as the weight's."""
_LEFT_OUT = ("exponent", "activation_bits", *OF_ACTIVATIONS, "lender")
"""Fields that stand among the settings only where they are neither zero nor None."""
_WEIGHTS_AT_ONCE = 2**24
"""Weights up to which one is dequantized in a single piece."""
_FORMATS: dict[str, type[PackedWeight]] = {}


class Segment(NamedTuple):
    """Some columns of a weight: ``W[:, columns] = (scale * codes + shift) * factor``.

    Attributes:
        columns: ``[n]`` int64.
        codes: ``[out, n]``, any dtype.
        scale: ``[out, 1]`` float32.
        shift: ``[out, 1]`` float32.
        factor: ``[n]`` float32.

    Example:
        >>> one = torch.ones(1, 1)
        >>> part = Segment(torch.tensor([0, 2]), torch.tensor([[1, 3]]), scale=one, shift=-one, factor=torch.ones(2))
        >>> (part.scale * part.codes + part.shift) * part.factor
        tensor([[0., 2.]])
    """

    columns: Tensor
    codes: Tensor
    scale: Tensor
    shift: Tensor
    factor: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeight(ABC):
    """A linear's weight ``[out_features, in_features]`` as it is stored.

    Subclasses set ``format`` (the name in checkpoints), ``version`` (raised when the layout of the stored tensors
    changes), ``offsets`` (the names of means and zero points, the float tensors that are added and not multiplied),
    ``shared`` (those of float tensors of several dimensions that belong to all rows alike, such as codebooks) and
    ``by_row`` (those of tensors with one entry per row, where every row can be read alone), and are registered by being
    defined. They implement :meth:`values`, differentiable in every float tensor. A format can tell its
    :meth:`operands`, for which there are compiled operators; if its codes have 1 to 4 bits, its :meth:`segments`, too.

    Attributes:
        out_features: rows.
        in_features: columns.
        exponent: the weight is ``2**exponent`` times what the tensors stand for, so that weights of any magnitude have
            scales that float16 holds with all its digits.
        activation_bits: of the linear's inputs, which are rounded before they are multiplied
            (:mod:`ptq161.packed.activations`); None leaves them as they are.
        activation_scale: ``[1]`` float32, step of the inputs; None without ``activation_bits``.
        activation_zero_point: ``[1]`` uint8, code of a zero; None without ``activation_bits``.
        lender: the linear ``"{block}.{path}"`` that stores the ``shared`` tensors, which are this weight's, too, but
            none of what it stores; None for a weight that stores all of its own.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> codes = torch.arange(16).view(2, 8) % 4
        >>> packed = UniformWeight.pack(codes, torch.ones(2, 1), torch.zeros(2, 1), bits=2)
        >>> packed.nbytes  # 2 rows of 2 bytes of codes and a scale and a zero point in float16
        12
        >>> packed.bits_per_weight
        6.0
        >>> torch.equal(packed.dequantize(), codes.float())
        True
    """

    format: ClassVar[str]
    version: ClassVar[int] = 1
    offsets: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    by_row: ClassVar[tuple[str, ...]] = ()

    out_features: int
    in_features: int
    exponent: int = dataclasses.field(default=0, kw_only=True)
    activation_bits: int | None = dataclasses.field(default=None, kw_only=True)
    activation_scale: Tensor | None = dataclasses.field(default=None, kw_only=True)
    activation_zero_point: Tensor | None = dataclasses.field(default=None, kw_only=True)
    lender: str | None = dataclasses.field(default=None, kw_only=True)

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Register the format."""
        super().__init_subclass__(**kwargs)
        if "format" in cls.__dict__:
            _FORMATS[cls.format] = cls

    @abstractmethod
    def values(self) -> Tensor:
        """Return what the stored tensors stand for: ``[out_features, in_features]`` float32."""

    def dequantize(self) -> Tensor:
        """Return the weight, ``2**exponent`` times :meth:`values`: ``[out_features, in_features]`` float32."""
        values = self.values()
        return values * 2.0**self.exponent if self.exponent else values

    def rows(self, start: int, stop: int) -> Self:
        """Return rows ``start`` to ``stop`` of a format that has ``by_row``, over the same memory.

        Args:
            start: an even number.
            stop: any number above it, up to ``out_features``.
        """
        changes: dict[str, Any] = {}
        for name in self.by_row:
            tensor = getattr(self, name)
            changes[name] = None if tensor is None else tensor[start:stop]
        return dataclasses.replace(self, out_features=stop - start, **changes)

    def segments(self) -> list[Segment] | None:
        """Return the parts of which the weight consists, but for ``2**exponent``; None where it has no such form."""
        return None

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it; None where its format, or this one of it, has none."""
        return None

    def rows_product(
        self, x: Tensor, bias: Tensor | None, *, int8: bool = False, level: int = packed_rows.HIGHEST
    ) -> Tensor | None:
        """Return ``x @ W.T + bias`` from the packed bytes, by an operator.

        Args:
            x: ``[..., in]``.
            bias: ``[out]`` in the dtype of ``x``.
            int8: round the activations of each row and segment to eight bits; for formats that have :meth:`segments`.
            level: the highest instruction set to use, see :mod:`ptq161.kernels.packed_rows`.

        Returns:
            ``[..., out]`` in the dtype of ``x``; None where there is no operator for the weight, the dtype, the device
            or this machine.
        """
        operands = self.operands()
        if operands is None or (int8 and operands.source != packed_rows.CODES):
            return None
        if not packed_rows.usable(x.dtype, x, operands.source, int8=int8):
            return None
        return packed_rows.product(operands, x, bias, int8=int8, level=level)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return ``dequantize().to(dtype)``, by a compiled operator where there is one, or some rows at a time."""
        operands = self._dense_operands(dtype)
        if operands is not None:
            return packed_rows.dense(operands, dtype)
        n, step = self.out_features, max(2, _WEIGHTS_AT_ONCE // max(1, self.in_features) // 2 * 2)
        if n <= step or not self.by_row:
            return self.dequantize().to(dtype)
        parts = [self.rows(start, min(start + step, n)).dequantize().to(dtype) for start in range(0, n, step)]
        return torch.cat(parts)

    def tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """Return rows ``start`` (an even number) to ``stop`` of :meth:`dense`; None where they cannot be had alone."""
        if self.by_row:
            return self.rows(start, stop).dense(dtype)
        operands = self._dense_operands(dtype)
        if operands is None or operands.source == packed_rows.CODES:
            return None
        return packed_rows.dense(operands, dtype, (start, stop))

    def _dense_operands(self, dtype: torch.dtype) -> Operands | None:
        operands, tensor = self.operands(), next(iter(self.state_dict().values()))
        return operands if operands is not None and packed_rows.usable(dtype, tensor, operands.source) else None

    def scaled(self, exponent: int, inputs: int = 0) -> Self:
        """Return this weight times ``2**exponent``, for inputs that are ``2**inputs`` times as large, exactly."""
        scale = None if self.activation_scale is None else self.activation_scale * 2.0**inputs
        return dataclasses.replace(self, exponent=self.exponent + exponent, activation_scale=scale)

    def with_activations(self, bits: int, scale: Tensor, zero_point: Tensor) -> Self:
        """Return this weight for inputs that are rounded.

        Args:
            bits: of an input's code, at most 8.
            scale: ``[1]``, positive.
            zero_point: ``[1]``, a whole number in ``[0, 2**bits)``.
        """
        return dataclasses.replace(
            self,
            activation_bits=bits,
            activation_scale=scale.detach().float(),
            activation_zero_point=zero_point.to(torch.uint8),
        )

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors of the weight: codes, planes, masks, scales, means, zero points."""
        stored = (t for name, t in self.state_dict().items() if name not in OF_ACTIVATIONS)
        return sum(t.numel() * t.element_size() for t in stored)

    @property
    def bits_per_weight(self) -> float:
        """Measured bits: 8 x stored bytes / weights."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the stored tensors by field name: all but those that another linear stores."""
        borrowed = () if self.lender is None else self.borrowed(self.lent())
        return {name: tensor for name, tensor in self.tensors().items() if name not in borrowed}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by field name, whoever stores them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def lent(self) -> dict[str, Tensor]:
        """Return the tensors that other linears can share, by field name."""
        return {name: tensor for name, tensor in self.tensors().items() if name in self.shared}

    @classmethod
    def borrowed(cls, lent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors from another weight's :meth:`lent` by the names that they have in this format."""
        return dict(lent)

    def settings(self) -> dict[str, Any]:
        """Return everything else that :meth:`from_state_dict` needs, as JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: value for name, value in fields.items() if not isinstance(value, Tensor)}
        for name in _LEFT_OUT:
            if not plain.get(name):
                plain.pop(name, None)
        return {"format": self.format, "version": self.version, **plain}

    @classmethod
    def from_state_dict(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild a packed weight of this format from :meth:`settings` and :meth:`state_dict`."""
        plain = {k: v for k, v in settings.items() if k not in ("format", "version")}
        fields: dict[str, Any] = {**plain, **tensors}
        return cls(**fields)

    @classmethod
    def own_fields(cls, names: Collection[str]) -> set[str]:
        """Return which of the names of settings and tensors are those of fields; others are of a weight within."""
        return set(names)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return the same weight over other tensors of the same names (another device, or a module's buffers)."""
        changes: dict[str, Any] = dict(tensors)
        return dataclasses.replace(self, **changes)


def packed_weight_from(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], lender: PackedWeight | None = None
) -> PackedWeight:
    """Rebuild a packed weight of any registered format.

    Args:
        settings: from :meth:`PackedWeight.settings`.
        tensors: from :meth:`PackedWeight.state_dict`.
        lender: the weight that stores what this one shares, where the settings name one.

    Raises:
        UserError: the format is unknown, was written by another version of the layout, or lacks a tensor.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 3]]), torch.ones(1, 1), torch.ones(1, 1), bits=2)
        >>> settings, tensors = packed.settings(), packed.state_dict()
        >>> settings["format"], sorted(tensors)
        ('uniform', ['codes', 'scales', 'zero_points'])
        >>> packed_weight_from(settings, tensors).dequantize().tolist()
        [[-1.0, 2.0]]
    """
    cls = _FORMATS.get(str(settings["format"]))
    if cls is None:
        raise UserError(
            f"the checkpoint holds weights of format {settings['format']!r}; known are {', '.join(sorted(_FORMATS))}."
        )
    if settings["version"] != cls.version:
        raise UserError(
            f"the checkpoint holds version {settings['version']} of format {cls.format!r}; "
            f"this version of ptq161 reads version {cls.version}."
        )
    if lender is not None:
        tensors = {**tensors, **cls.borrowed(lender.lent())}
    given = cls.own_fields({*settings, *tensors}) - {"format", "version", "exponent", "lender"}
    expected = {field.name for field in dataclasses.fields(cls)} - {"exponent", "lender"}
    if not given & {*OF_ACTIVATIONS, "activation_bits"}:
        expected -= {*OF_ACTIVATIONS, "activation_bits"}
    wrong = sorted(given ^ expected)
    if wrong:
        raise UserError(
            f"the checkpoint is damaged: {wrong[0]} is missing in a weight of format {cls.format!r}, or not part of it."
        )
    return cls.from_state_dict(settings, tensors)


def stored_scale(value: Tensor, scale_dtype: str) -> Tensor:
    """Round scales, means or zero points to the dtype in which they are stored.

    Raises:
        UserError: a value is not finite or leaves the range of ``scale_dtype``.

    Example:
        >>> stored_scale(torch.tensor([0.25, 1e-9]), "float16")
        tensor([0.2500, 0.0000], dtype=torch.float16)
        >>> stored_scale(torch.tensor([1e6]), "float16")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: a scale of 1e+06 cannot be stored as float16; ...
    """
    stored = value.to(SCALE_DTYPES[scale_dtype])
    if not bool(torch.isfinite(stored).all()):
        largest = float(value.abs().max())
        raise UserError(
            f"a scale of {largest:g} cannot be stored as {scale_dtype}; use scale_dtype=float32 or check the weights."
        )
    return stored


def scale_dtype_of(stored: Tensor) -> str:
    """Return the name of the dtype in which scales are stored: the inverse of :func:`stored_scale`'s argument.

    Example:
        >>> scale_dtype_of(stored_scale(torch.ones(1), "float16"))
        'float16'
    """
    return next(name for name, dtype in SCALE_DTYPES.items() if dtype == stored.dtype)


def check_magnitude(weight: Tensor, scale_dtype: str) -> None:
    """Check that a weight is large enough for scales with most of their digits; a part of it may be as small as it is.

    Args:
        weight: ``[out, in]``.
        scale_dtype: in which its scales will be stored.

    Raises:
        UserError: even the largest weight is too small.

    Example:
        >>> check_magnitude(torch.tensor([[1.0, 1e-9]]), "float16")
        >>> check_magnitude(torch.tensor([[1e-7, 1e-9]]), "float16")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: the largest weight is 1e-07, too small for scales in float16; ...
    """
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if 0 < largest < torch.finfo(SCALE_DTYPES[scale_dtype]).tiny:
        raise UserError(
            f"the largest weight is {largest:g}, too small for scales in {scale_dtype}; use scale_dtype=float32."
        )
