"""Which input channels of a linear are salient: a score per channel, and the mask of the highest scores.

``max`` and ``mean`` are PTQ1.61's own (Zhao et al., ACL 2025, Section 3.2: released code and pseudocode); ``hessian``
is the sensitivity of OWQ (Lee et al., AAAI 2024, arXiv 2306.02272), with which the paper's Table 5 compares;
``magnitude`` and ``random`` are there to be beaten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq161.checks import check_choice
from ptq161.errors import UserError
from ptq161.methods.base import ActivationScale
from ptq161.methods.ptq161.binarization import dequantized_weight, initial_scales

SALIENCIES = ("max", "mean", "hessian", "magnitude", "random")
# The released code clamps activation scales from below, so that dead channels tie.
_LEAST_ACTIVATION = 1e-5


def channel_saliency(
    kind: str, weight: Tensor, activation: ActivationScale, generator: torch.Generator | None = None
) -> Tensor:
    """Score the input channels of one linear; only the order within the linear has a meaning.

    Args:
        kind: one of ``SALIENCIES``: largest or mean |x|; mean x^2 times the squared error of the column when binarized;
            norm of the weight's column; uniform random numbers.
        weight: ``[out, in]``.
        activation: size of the linear's inputs.
        generator: a CPU generator; only ``random`` draws from it.

    Returns:
        ``[in]`` float32, not negative.

    Raises:
        UserError: ``kind`` is unknown.

    Example:
        >>> sizes = torch.tensor([3.0, 2.0])
        >>> activation = ActivationScale(maximum=sizes, mean=sizes / 2, mean_square=sizes)
        >>> weight = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
        >>> channel_saliency("max", weight, activation), channel_saliency("magnitude", weight, activation)
        (tensor([3., 2.]), tensor([5., 1.]))
    """
    check_choice("method.saliency", kind, SALIENCIES)
    match kind:
        case "max":
            return activation.maximum.clamp(min=_LEAST_ACTIVATION)
        case "mean":
            return activation.mean.clamp(min=_LEAST_ACTIVATION)
        case "hessian":
            return owq_sensitivity(weight, activation.mean_square)
        case "magnitude":
            return weight.detach().float().square().sum(dim=0).sqrt()
        case _:
            return torch.rand(weight.shape[1], generator=generator).to(weight.device)


def owq_sensitivity(weight: Tensor, mean_square: Tensor) -> Tensor:
    """Sensitivity of each input channel as OWQ defines it: ``H_jj * ||W_j - Q(W)_j||^2``, columns of the weight.

    OWQ's released code takes Q to be the quantizer of its low-bit channels, applied to the whole weight, with no
    salient channel and no compensation. Here that is the binarization with its initial scales (PTQ1.61, Eq. 2 and 3).

    Args:
        weight: ``[out, in]``.
        mean_square: ``[in]``, mean of x^2 over the calibration tokens: the hessian's diagonal up to a factor that all
            channels share.

    Returns:
        ``[in]`` float32.

    Example:
        >>> weight = torch.tensor([[1.0, -1.0], [1.0, 3.0]])  # binarized to [[1, -1], [0, 4]]
        >>> owq_sensitivity(weight, mean_square=torch.tensor([1.0, 10.0]))
        tensor([ 1., 10.])
    """
    weight = weight.detach().float()
    none = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    ones = torch.ones(weight.shape[0], 1, device=weight.device), torch.ones(1, weight.shape[1], device=weight.device)
    error = weight - dequantized_weight(weight, none, *initial_scales(weight, none), *ones)
    return mean_square * error.square().sum(dim=0)


def salient_mask(saliency: Tensor, mask_ratio: float) -> Tensor:
    """Choose the salient input channels (Section 3.2).

    The released comparison is ``saliency >= sorted_descending[int(mask_ratio * in)]``: it keeps one channel more
    than ``int(mask_ratio * in)``, and all that tie with the last one.

    Args:
        saliency: ``[in]``, a score of each channel, as from :func:`channel_saliency`.
        mask_ratio: share of salient channels, in [0, 1). 0 means none; one channel at least stays binary.

    Returns:
        ``[in]`` bool, True for salient channels.

    Raises:
        UserError: ``mask_ratio`` is outside [0, 1), or a score is not finite.

    Example:
        >>> salient_mask(torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0]), mask_ratio=0.2).tolist()
        [False, True, False, True, False]
    """
    check_mask_ratio(mask_ratio)
    if not bool(torch.isfinite(saliency).all()):
        raise UserError("the activations are NaN or infinite, so no salient channels can be selected; check the model.")
    if mask_ratio == 0:
        return torch.zeros_like(saliency, dtype=torch.bool)
    saliency = saliency.flatten()
    # Section 3.2: the channels of the largest scores; at the edge and with ties, those of the released comparison.
    descending, order = torch.sort(saliency, descending=True, stable=True)
    mask = saliency >= descending[int(mask_ratio * saliency.numel())]
    if bool(mask.all()):
        mask[order[-1]] = False
    return mask


def check_mask_ratio(mask_ratio: float) -> None:
    """Check the share of salient input channels.

    Raises:
        UserError: it is outside [0, 1).

    Example:
        >>> check_mask_ratio(0.2)
        >>> check_mask_ratio(1.0)
        Traceback (most recent call last):
        ptq161.errors.UserError: mask_ratio=1.0: use a value in [0, 1), the share of salient input channels.
    """
    if not 0 <= mask_ratio < 1:
        raise UserError(f"mask_ratio={mask_ratio}: use a value in [0, 1), the share of salient input channels.")
