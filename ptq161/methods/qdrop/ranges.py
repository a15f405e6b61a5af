"""The search of a range: 100 sizes times every zero point, the least error as a power of 2.4 (``MSEObserver``).

The error of a candidate is the sum of what rounding leaves inside of its range and of what the range cuts off at either
end. With sorted values, the first is exact from a cumulative sum and the second bounded from below by moments, so that
few candidates have to be computed in full: the cost hardly depends on the bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq161.errors import UserError

_SIZES = 100
_POWER = 2.4
_LEAST_SCALE = 1e-8
_SLACK = 1e-3
"""Share by which a bound may be too large: both sides are sums in float32."""
_ROUNDING = 1e-5
"""Error of a value that is float32's alone, as a share of the largest one."""
_CHUNK = 2**17
"""Values that are worked on at a time: they stay in the processor's cache."""
_BOUNDS = 2**22
"""Bounds that are kept at a time."""
_LONG = 4096
"""Values of a row above which sums are taken in float64."""


def search_range(x: Tensor, bits: int, per_channel: bool = True) -> tuple[Tensor, Tensor]:
    """Find the uniform grid of least error (``MSEObserver``: mean ``|q - x|^2.4``, the first best of all candidates).

    Candidates are ranges of ``i / 100`` of the whole one, zero included, with every zero point. Where all values have
    one sign, ranges begin at zero.

    Args:
        x: ``[channels, ...]`` per channel, any shape otherwise; float.
        bits: 2 to 8.
        per_channel: one grid for each slice along the first axis; False is one for all.

    Returns:
        scale, float32, and zero point, int32: ``[channels]``, or ``[1]``. A scale is 1e-8 at least.

    Raises:
        UserError: ``bits`` is out of range, or a value is not finite, or there is none.

    Example:
        >>> scale, zero_point = search_range(torch.tensor([[-1.0, 0.0, 1.0, 2.0], [-4.0, -4.0, 0.0, 8.0]]), bits=2)
        >>> scale.round(decimals=3).tolist(), zero_point.tolist()
        ([1.0, 4.0], [1, 1])
        >>> search_range(torch.tensor([0.0, 1.0, 2.0, 3.0]), bits=2, per_channel=False)
        (tensor([1.]), tensor([0], dtype=torch.int32))
    """
    if not 2 <= bits <= 8:
        raise UserError(f"bits={bits}: use 2 to 8.")
    rows = x.detach().float().reshape((x.shape[0] if per_channel else 1), -1).contiguous()
    if not rows.numel():
        raise UserError("there are no values to find a range for.")
    if not bool(torch.isfinite(rows).all()):
        raise UserError("a value is NaN or infinite; check the model's weights.")
    low, high = float(rows.amin()), float(rows.amax())
    found = [
        _search_all(part, bits) if low < 0 < high else _search_sizes(part, bits, is_positive=low >= 0)
        for part in rows.split(_rows_at_a_time(rows, bits))
    ]
    scales, zero_points = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zero_points).to(torch.int32)


def _rows_at_a_time(rows: Tensor, bits: int) -> int:
    candidates: int = _SIZES * 2**bits
    return max(1, min(_CHUNK // rows.shape[1], _BOUNDS // candidates))


def _search_sizes(rows: Tensor, bits: int, *, is_positive: bool) -> tuple[Tensor, Tensor]:
    """Search the ranges of values of one sign: from zero."""
    size = rows.abs().amax(1)
    best = torch.full_like(size, torch.inf)
    scale, zero_point = torch.zeros_like(size), torch.zeros_like(size)
    for i in range(1, _SIZES + 1):
        end = size / _SIZES * i
        zero = torch.zeros_like(end)
        found = _grid(zero, end, bits) if is_positive else _grid(-end, zero, bits)
        error = _error(rows, *found, bits)
        is_better = error < best
        best = torch.where(is_better, error, best)
        scale, zero_point = (torch.where(is_better, *pair) for pair in zip(found, (scale, zero_point), strict=True))
    return scale, zero_point


def _search_all(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Search sizes and zero points, in the order of their bounds, until no bound is below the least error."""
    size = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    bounds, order = _lower_bounds(rows, size, bits).sort(dim=1, stable=True)
    rounding = (_ROUNDING * rows.abs().amax(1)) ** _POWER
    best = torch.full_like(size, torch.inf)
    first = torch.zeros_like(order[:, 0])
    active = torch.arange(len(rows), device=rows.device)
    for k in range(order.shape[1]):
        candidate = order[active, k]
        error = _error(rows[active], *_candidate(size[active], candidate, bits), bits)
        is_better = (error < best[active]) | ((error == best[active]) & (candidate < first[active]))
        best[active] = torch.where(is_better, error, best[active])
        first[active] = torch.where(is_better, candidate, first[active])
        if k + 1 == order.shape[1]:
            break
        # Nothing is below an error of zero, so that a row of zeros takes its first candidate.
        is_open = bounds[active, k + 1] * (1 - _SLACK) - rounding[active] <= best[active]
        is_open &= (best[active] > 0) | (order[active, k + 1] < first[active])
        active = active[is_open]
        if not len(active):
            break
    return _candidate(size, first, bits)


def _candidate(size: Tensor, index: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of a candidate, in the order of the authors' loops: sizes, then zero points."""
    levels = 2**bits
    high = size / _SIZES * (index // levels + 1)
    step = high / (levels - 1)
    shift = (index % levels) * step
    return _grid(0 - shift, high - shift, bits)


def _grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    largest = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / largest).clamp(min=_LEAST_SCALE)
    return scale, (0 - torch.round(low / scale)).clamp(0, largest)


def _error(rows: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the mean of ``|q - x|^2.4`` of each row: ``[rows]`` float32."""
    scale, zero_point = scale.unsqueeze(1), zero_point.unsqueeze(1)
    steps = (rows * (1 / scale)).round_()
    steps = torch.minimum(torch.maximum(steps, -zero_point), 2**bits - 1 - zero_point)
    return steps.mul_(scale).sub_(rows).abs_().pow_(_POWER).mean(1)


def _lower_bounds(rows: Tensor, size: Tensor, bits: int) -> Tensor:
    """Return a bound from below of the error of each candidate: ``[rows, 100 * 2**bits]``."""
    n, largest = rows.shape[1], 2**bits - 1
    dtype = torch.float64 if n > _LONG else torch.float32
    ordered = rows.sort(1).values
    totals, squares = _from_zero(ordered.to(dtype)), _from_zero(ordered.to(dtype).square())
    zero_points = torch.arange(largest + 1, device=rows.device, dtype=torch.float32).expand(len(rows), -1)
    lowest, highest = -zero_points, largest - zero_points
    bounds = []
    for i in range(1, _SIZES + 1):
        step = (size / _SIZES * i / largest).clamp(min=_LEAST_SCALE).unsqueeze(1)
        steps = (ordered * (1 / step)).round_()
        inside = _from_zero((steps * step).sub_(ordered).abs_().pow_(_POWER).to(dtype))
        begin = torch.searchsorted(steps, lowest.contiguous())
        end = torch.searchsorted(steps, highest.contiguous(), right=True)
        bounds.append(
            inside.gather(1, end)
            - inside.gather(1, begin)
            + _tail(begin, totals.gather(1, begin), squares.gather(1, begin), lowest * step)
            + _tail(n - end, _rest(totals, end), _rest(squares, end), highest * step)
        )
    return torch.cat(bounds, 1).div_(n).clamp_(min=0)


def _tail(count: Tensor, total: Tensor, squares: Tensor, end: Tensor) -> Tensor:
    """Bound the sum of ``|x - end|^2.4`` over the values beyond an end from the sums of them and of their squares.

    The logarithm of a sum of powers is convex in the power, so that ``M(2)^1.4 <= M(2.4) M(1)^0.4``.
    """
    first = (total - count * end).abs()
    second = (squares - 2 * end * total + count * end.square()).clamp(min=0)
    bound = second**1.4 / first.clamp(min=torch.finfo(torch.float32).tiny) ** 0.4
    return torch.where((count > 0) & (first > 0), bound, 0.0)


def _rest(sums: Tensor, index: Tensor) -> Tensor:
    """Return what comes after an index, of cumulative sums."""
    return sums[:, -1:] - sums.gather(1, index)


def _from_zero(values: Tensor) -> Tensor:
    """Return the cumulative sums ``[rows, n + 1]``, the empty one first."""
    sums = values.new_zeros(len(values), values.shape[1] + 1)
    torch.cumsum(values, 1, out=sums[:, 1:])
    return sums
