"""A safetensors file written tensor by tensor, for tensors that are never in memory together.

The layout is public (https://github.com/huggingface/safetensors#format): eight bytes with the length of the header, the
header as JSON, and the bytes of the tensors. The result has the bytes that ``safetensors.torch.save_file`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Dtypes by the names of the format, in the order in which safetensors stores them: wide ones first, to be aligned."""


def write_tensors(
    file: Path, layouts: Mapping[str, Tensor], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file of tensors, one of them in memory at a time.

    Args:
        file: is written.
        layouts: a tensor of the shape and dtype of each, on any device, the meta device included.
        read: ``read(name)`` returns the tensor itself.
        metadata: of the file; one key at most, as safetensors writes several in random order.

    Raises:
        OSError: the file cannot be written, or the disk is full.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> tensors = {"a": torch.tensor([True, False]), "b": torch.tensor([[0.5]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "two.safetensors"
        ...     write_tensors(file, {name: tensor.to("meta") for name, tensor in tensors.items()}, tensors.get, {})
        ...     sorted(load_file(file).items())
        [('a', tensor([ True, False])), ('b', tensor([[0.5000]]))]
    """
    names, head = _header(layouts, metadata)
    with file.open("wb") as opened:
        opened.write(head)
        for name in names:
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (layouts[name].shape, layouts[name].dtype), name
            # numpy has no bfloat16, hence the bytes; view() needs a last dimension, hence the reshape.
            opened.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def file_bytes(layouts: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Return the size of the file that :func:`write_tensors` would write.

    Example:
        >>> file_bytes({"a": torch.empty(4, dtype=torch.bfloat16, device="meta")}, {})  # 8, the header, and the values
        72
    """
    names, head = _header(layouts, metadata)
    return len(head) + sum(layouts[name].numel() * layouts[name].element_size() for name in names)


def _header(layouts: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[str], bytes]:
    """Return the names of the tensors in the order of the file, and the bytes before them."""
    order = list(_NAMES)
    names = sorted(layouts, key=lambda name: (order.index(layouts[name].dtype), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        layout, start = layouts[name], end
        end += layout.numel() * layout.element_size()
        header[name] = {
            "dtype": _NAMES[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return names, len(text).to_bytes(8, "little") + text
