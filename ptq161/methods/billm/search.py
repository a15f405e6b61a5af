"""BiLLM's structural search: a block's salient columns (Section 3.2), and the split of its others (Section 3.3).

The released search (``utils/autosearch.py`` of Aaronhuang-778/BiLLM) binarizes the whole block anew for each of its
49 + 81 candidates. Here the squared error of a candidate comes from sums: binarizing n values of mean m and mean
distance a from it leaves ``sum(x^2) - n m^2 - n a^2``. The candidate that wins is the same.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ptq161.kernels.sorting import sorted_values

_MOST_SALIENT = 50
# Rows whose columns fit into a core's cache, as the search over columns reads them some 400 times, and no fewer than
# make an operation worth its call.
_ROWS_AT_ONCE = 768


def salient_columns(score: Tensor) -> Tensor:
    """Search the number of salient columns that gives the least error: ``[columns]`` bool.

    Quirks of the released code: the candidates end at 49 although 50 columns are ranked; the other columns are
    binarized with a residual too, which later they are not; and what is binarized is the score, not the weight.

    Args:
        score: ``[out, columns]``; columns are ranked by their sum of absolute values.

    Example:
        >>> score = torch.tensor([[9.0, 1.0, -1.0, 1.0, -1.0], [-5.0, 1.0, -1.0, 1.0, -1.0]])
        >>> salient_columns(score).tolist()
        [True, False, False, False, False]
    """
    columns = score.shape[1]
    salient = torch.zeros(columns, dtype=torch.bool, device=score.device)
    if columns == 1:  # The released search has no candidate here; residual binarization stores one column exactly.
        return ~salient
    # salient(.) of Algorithm 2: columns by their total score, then the number of them that leaves the least error.
    most = min(_MOST_SALIENT, columns)
    totals = score.abs().sum(0)
    ranked = torch.topk(totals, most).indices
    rest = torch.ones_like(salient).index_fill(0, ranked, False).nonzero().flatten()
    ordered = score[:, torch.cat([ranked, rest])].T

    def gains(rows: Tensor) -> Tensor:
        part = rows.contiguous()
        return torch.stack([_residual_gain(part[:n]) + _residual_gain(part[n:]) for n in range(1, most)])

    # Tiles on as many threads as torch has: within one, an operation is too small to be worth a second thread.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        tiles = list(pool.map(gains, ordered.chunk(-(-ordered.shape[1] // _ROWS_AT_ONCE), dim=1)))
    best = int(torch.stack(tiles).sum(0).argmax()) + 1
    # Ranked again as the released code does: among equal totals topk may choose others than before.
    return salient.index_fill(0, torch.topk(totals, best).indices, True)


def best_split(score: Tensor, salient: Tensor) -> float:
    """Search the size of score from which weights of the other columns belong to the sparse group.

    Args:
        score: ``[out, columns]``.
        salient: ``[columns]`` bool.

    Returns:
        one of 81 quantiles (0.10 to 0.90) of ``|score|``. Quirk of the released code: the quantiles are taken over
        the whole block with the salient columns counted as zeros.

    Example:
        >>> score = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 8.0, -8.0]])
        >>> 1 < best_split(score, salient=torch.zeros(8, dtype=torch.bool)) <= 8
        True
    """
    # seg_search(.) of Algorithm 2: the break point p* between concentrated and sparse weights.
    candidates = _quantiles(score.abs() * ~salient)
    # The released loop keeps the first of equal candidates; so does argmax on the CPU.
    gains = _split_gains(score[:, ~salient].contiguous(), candidates).cpu()
    return float(candidates[int(gains.argmax())])


def _residual_gain(values: Tensor) -> Tensor:
    """Return by how much binarizing columns of ``[n, rows]`` twice falls below ``sum(x^2)``: float64 scalar."""
    mean = values.mean(0)
    distance = values - mean
    scale = distance.abs().mean(0)
    residual = distance.sub_(torch.copysign(scale, distance))
    second_mean = residual.mean(0)
    second_scale = residual.sub_(second_mean).abs_().mean(0)
    parts = torch.stack([mean, scale, second_mean, second_scale]).double()
    return values.shape[0] * parts.square().sum()


def _split_gains(values: Tensor, candidates: Tensor) -> Tensor:
    """Return by how much each split of ``[out, n]`` falls below ``sum(x^2)``: ``[candidates]`` float64.

    In each sorted row the concentrated group ``|x| < candidate`` is one interval and the sparse group is the rest.
    """
    rows, n = values.shape
    ordered = sorted_values(values)
    sums = torch.nn.functional.pad(ordered.double().cumsum(1), (1, 0))
    edges = candidates.expand(rows, -1).contiguous()
    start = torch.searchsorted(ordered, -edges, right=True)
    stop = torch.maximum(torch.searchsorted(ordered, edges), start)

    # Concentrated group: the values below its mean are the beginning of its interval.
    inner_sum, inner_n = sums.gather(1, stop) - sums.gather(1, start), stop - start
    mean = inner_sum / inner_n.clamp(min=1)
    middle = torch.searchsorted(ordered, mean.float(), right=True)
    middle = torch.minimum(torch.maximum(middle, start), stop)
    below_sum, below_n = sums.gather(1, middle) - sums.gather(1, start), middle - start
    gain = _gain(inner_sum, inner_n, mean * below_n - below_sum)

    # Sparse group: they are the lower tail up to the mean, and of the upper tail what lies below the mean, if any.
    outer_sum, outer_n = sums[:, -1:] - inner_sum, n - inner_n
    mean = outer_sum / outer_n.clamp(min=1)
    middle = torch.searchsorted(ordered, mean.float(), right=True)
    left, right = torch.minimum(middle, start), torch.maximum(middle, stop)
    below_sum = sums.gather(1, left) + sums.gather(1, right) - sums.gather(1, stop)
    below_n = left + right - stop
    return (gain + _gain(outer_sum, outer_n, mean * below_n - below_sum)).sum(0)


def _gain(total: Tensor, n: Tensor, below: Tensor) -> Tensor:
    """Return ``n mean^2 + n scale^2``; values below their mean lack ``below`` in total, those above exceed as much."""
    return (total.square() + (2 * below).square()) / n.clamp(min=1)


def _quantiles(sizes: Tensor) -> Tensor:
    """Return the 81 candidates; by numpy as in the released code, whose interpolation is float32.

    Sorted first, which numpy's own partition takes several times as long without.
    """
    shares = torch.linspace(0.10, 0.90, 81).numpy()
    return torch.from_numpy(np.quantile(sorted_values(sizes.flatten()).cpu().numpy(), shares)).to(sizes)
