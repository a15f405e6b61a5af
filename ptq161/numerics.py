"""Device and dtype of a run, how ``auto`` is resolved on this machine and why; torch's settings as they come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ptq161.errors import UserError

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of matrix products, by name."""


def resolve_device(name: str) -> torch.device:
    """Turn ``device`` into a torch device.

    Raises:
        UserError: the name is no device that torch knows, or this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device={name}: use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name}: use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: this machine has {torch.cuda.device_count()} GPUs that torch can use.")
    if device.type == "cuda" and ":" not in name:
        return torch.device("cuda", torch.cuda.current_device())  # as the tensors there say it
    return device


def working_device(device: torch.device | str | None, home: torch.device) -> torch.device:
    """Return the device that a caller asks for; None is where the model is.

    Raises:
        UserError: see :func:`resolve_device`.
    """
    if isinstance(device, str):
        return resolve_device(device)
    return device or home


def resolve_dtype(name: str, device: torch.device) -> tuple[str, str]:
    """Turn ``dtype`` into a torch dtype's name.

    Returns:
        the name (``float32``, ``bfloat16`` or ``float16``) and the reason for it.
    """
    if name != "auto":
        return name, "as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU supports bfloat16"
        return "float16", "the GPU does not support bfloat16"
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16", "the CPU supports bfloat16"
    return "float32", "the CPU does not support bfloat16"


@contextmanager
def plain_torch() -> Iterator[None]:
    """Compute as torch does when nothing was set, whatever a training or serving script has left switched on.

    Gradients are recorded where they are asked for, nothing is autocast or compiled, new tensors are float32 on the
    CPU, and float32 products are exact. The caller's settings are back afterwards. A decorator, too.

    Example:
        >>> with torch.inference_mode(), plain_torch():
        ...     torch.ones(1, requires_grad=True).mul(2).requires_grad
        True
    """
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)
