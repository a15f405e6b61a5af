"""What surrounds the matrix products of a binarized linear while its scales are learned.

The products themselves are torch's. Beside them the layer needs its inputs scaled, their sums and salient channels, and
sums of its gradients over tokens: on the CPU one pass each (``binary_product.cpp``), where torch takes two to five.
Sums are float32; their order does not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq161.kernels import native


def inputs(x: Tensor, column: Tensor, salient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs in a dtype, scaled by column factors, and what is left of them.

    Args:
        x: ``[n, in]``.
        column: ``[in]`` float32, factor of each channel; zero where salient.
        salient: ``[s]`` int64, the salient channels.
        dtype: of the products.

    Returns:
        ``[n, in]`` inputs, ``[n, in]`` scaled inputs, and ``[n, s + 1]``: salient inputs, then the sum of scaled ones.

    Example:
        >>> parts = inputs(torch.tensor([[1.0, 2, 3]]), torch.tensor([2.0, 1, 0]), torch.tensor([2]), torch.float32)
        >>> [part.tolist() for part in parts]
        [[[1.0, 2.0, 3.0]], [[2.0, 2.0, 0.0]], [[3.0, 4.0]]]
    """
    if _compiled(dtype, x, column):
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.ptq161.binary_inputs(
            x, column, salient, dtype == torch.bfloat16
        )
        return found
    x = x.to(dtype)
    scaled = x * column.to(dtype)
    return x, scaled, torch.cat([x[:, salient], scaled.sum(1, keepdim=True)], dim=1)


def output_sums(grad: Tensor, products: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums over tokens of the gradient at the outputs, times the products and times the sum of scaled inputs.

    Args:
        grad: ``[n, out]``.
        products: ``[n, out]``, of scaled inputs with signs, in the same dtype.
        rest: ``[n, s + 1]``, see :func:`inputs`, in the same dtype.

    Returns:
        ``[out, 1]`` float32 twice.

    Example:
        >>> output_sums(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor([[5.0], [6.0]]))
        (tensor([[11.]]), tensor([[17.]]))
    """
    if _compiled(grad.dtype, grad, products, rest):
        found: tuple[Tensor, Tensor] = torch.ops.ptq161.binary_output_sums(grad, products, rest)
        return found
    of_products = (grad * products).sum(0, dtype=torch.float32)
    return of_products.unsqueeze(1), (grad.T @ rest[:, -1]).float().unsqueeze(1)


def effective_weight(sign: Tensor, salient: Tensor, scale: Tensor, mean: Tensor, binary: Tensor) -> Tensor:
    """Return the weight before its column factors: ``scale * sign + mean`` where binary, salient channels as they are.

    Args:
        sign: ``[out, in]``, zero where salient.
        salient: ``[out, in]`` in the same dtype, zero where binary.
        scale: ``[out, 1]`` in the same dtype.
        mean: ``[out, 1]`` in the same dtype.
        binary: ``[in]`` float32, one where binary, else zero.

    Example:
        >>> sign, salient = torch.tensor([[1.0, -1, 0]]), torch.tensor([[0.0, 0, 7]])
        >>> one, binary = torch.ones(1, 1), torch.tensor([1.0, 1, 0])
        >>> effective_weight(sign, salient, 2 * one, one, binary).tolist()
        [[3.0, -1.0, 7.0]]
    """
    if _compiled(sign.dtype, sign, salient, binary):
        weight: Tensor = torch.ops.ptq161.binary_effective_weight(sign, salient, scale.float(), mean.float(), binary)
        return weight
    return (sign * scale).addcmul_(mean, binary.to(sign.dtype)).add_(salient)


def input_gradients(grad: Tensor, x: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradients of column factors and inputs, given that at the scaled inputs.

    Args:
        grad: ``[n, in]``.
        x: ``[n, in]`` in the same dtype, see :func:`inputs`.
        factor: ``[in]`` float32, of each channel; one where salient.
        dtype: of the inputs' gradient.

    Returns:
        ``[1, in]`` float32, and ``[n, in]``.

    Example:
        >>> grad, x = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> input_gradients(grad, x, torch.tensor([2.0, 1.0]), torch.float32)
        (tensor([[3., 8.]]), tensor([[2., 2.]]))
    """
    if _compiled(dtype, grad, x, factor):
        found: tuple[Tensor, Tensor] = torch.ops.ptq161.binary_input_gradients(grad, x, factor, dtype == torch.bfloat16)
        return found
    return (grad * x).sum(0, dtype=torch.float32).unsqueeze(0), (grad * factor.to(grad.dtype)).to(dtype)


def _compiled(dtype: torch.dtype, *tensors: Tensor) -> bool:
    dtypes = (dtype, *(tensor.dtype for tensor in tensors))
    plain = all(found in (torch.float32, torch.bfloat16) for found in dtypes)
    return plain and all(t.is_contiguous() for t in tensors) and native.usable("binary_product", *tensors)
