"""A GPU that is not there: tensors that say they are on it, are computed on the CPU, and refuse to mix with others.

What it shows is that nothing forgets the device. What autocast does on a GPU, and the kernels of one, it cannot show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

GPU = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_COPIES = ("aten::copy_", "aten::_to_copy")
_INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class OnGPU(Tensor):
    """A tensor over another one. To torch's core it lies on the device ``meta``, which has autograd but no storage."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        made: OnGPU = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("meta"),
        )
        made.inner = inner
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def tolist(self) -> Any:
        return self.detach().inner.tolist()  # type: ignore[attr-defined]

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **({"dtype": self.dtype, "device": GPU} | kwargs))

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnGPU({self.inner!r})"

    def __deepcopy__(self, memo: object) -> OnGPU:
        copied = OnGPU(self.detach().inner.clone())  # type: ignore[attr-defined]
        copied.requires_grad_(self.requires_grad)
        return copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Generators(TorchFunctionMode):
    """Below here torch forgets what a generator said of itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        generator = (kwargs or {}).get("generator")
        if isinstance(generator, _Generator) and generator.device.type != result.device.type:
            raise RuntimeError(f"a generator of {generator.device} for {result.device}")
        return result


class _Generator(torch.Generator):
    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device).type  # type: ignore[attr-defined]
        return made

    device = property(lambda self: torch.device(self.place))  # type: ignore[assignment]


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    flat, _ = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, OnGPU)]
    here = [x for x in tensors if not isinstance(x, OnGPU) and x.dim() > 0]
    target = GPU if there else _CPU
    if name == "aten::copy_" and not isinstance(tensors[0], OnGPU):
        target = _CPU
    if kwargs.get("device") is not None:
        target = GPU if torch.device(kwargs["device"]).type in ("cuda", "meta") else _CPU
        kwargs = kwargs | {"device": _CPU}
    if there and here and not (name in _COPIES or _indexed_from_the_host(name, tensors)):
        raise RuntimeError(f"{name}: tensors of two devices, {GPU} and {_CPU}")
    if there and name.startswith("ptq161::"):
        raise NotImplementedError(f"{name} has no kernel for {GPU}")
    flat, spec = tree_flatten((args, kwargs))
    given, named = tree_unflatten([x.inner if isinstance(x, OnGPU) else x for x in flat], spec)
    result = func(*given, **named)
    if target.type == "cpu":
        return result
    known = {id(x.inner): x for x in there}  # what is changed in place is given back as itself

    def put(x: Any) -> Any:
        return known[id(x)] if id(x) in known else OnGPU(x) if isinstance(x, Tensor) else x

    return tree_map(put, result)


def _indexed_from_the_host(name: str, tensors: list[Tensor]) -> bool:
    """Torch takes indices in host memory for a tensor on a GPU, and no others."""
    indices = (torch.int64, torch.int32, torch.bool, torch.uint8)
    return (
        name in _INDEXED
        and isinstance(tensors[0], OnGPU)
        and all(isinstance(x, OnGPU) or x.dtype in indices for x in tensors)
    )


def _made_there(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` and ``torch.as_tensor``, which torch does not dispatch."""

    def made(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            found = make(data, *args, device=device, **kwargs)
        else:
            found = OnGPU(make(data.detach().inner if isinstance(data, OnGPU) else data, *args, **kwargs))
        return found.requires_grad_() if requires_grad else found

    return made


@contextlib.contextmanager
def fake_gpu() -> Iterator[str]:
    """Pretend that there is a GPU; yields the name of its device, whose index torch needs where it has no CUDA."""
    properties = SimpleNamespace(name="fake", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=100)
    cuda: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "fake",
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "synchronize": lambda *_: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _made_there(getattr(torch, name))))
        stack.enter_context(_Everywhere())
        stack.enter_context(_Generators())
        yield str(GPU)
