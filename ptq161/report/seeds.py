"""Several seeds are one result: which runs differ in nothing else, and what their scores say together."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

GROUPS = ("model", "method", "calib", "preprocess", "eval")
"""The configuration that decides a result, beside the seed and the dtype."""
SOURCES = ("path", "repo", "revision", "asset")
"""Keys of a model that only say where its weights come from."""
VERSIONS = ("torch", "transformers", "lm-eval", "peft")
CONFIDENCE = 0.95
N_RESAMPLES = 9999


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number as one or several seeds give it.

    Attributes:
        value: the mean over seeds.
        low: lower end of the mean's bootstrap interval; None for a single seed, and where a value is not finite.
        high: its upper end.
        n_seeds: how many seeds gave a value.
        standard_error: of the evaluation itself, for a single seed where the protocol has one.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n_seeds: int = 1
    standard_error: float | None = None


def estimate(values: Sequence[float], standard_error: float | None = None) -> Estimate:
    """Take values of several seeds, at least one, as one.

    The interval is the percentile bootstrap of the mean (Efron and Tibshirani, 1993, section 13.3) at 95 %, from a
    generator of its own, so that the same values give the same interval. Resampling few values cannot show spread that
    they do not have: below about five seeds the true interval is wider.

    Args:
        values: one a seed.
        standard_error: of the evaluation; kept where there is one value alone.
    """
    mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else float(np.mean(values))
    if len(values) == 1:
        return Estimate(values[0], standard_error=standard_error)
    if not math.isfinite(mean):
        return Estimate(mean, n_seeds=len(values))
    if len(set(values)) == 1:
        return Estimate(values[0], values[0], values[0], len(values))
    means = np.asarray(values)[_resamples(len(values))].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(mean, float(low), float(high), len(values))


def identity_without_seed(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return a hash of everything that can change a run's result, but for its seed.

    The hash covers the options of every group, the dtype, the kind of device, the package's sources, the versions of
    what computes the numbers, and the weights by their content where the record has it. It leaves out the tracker,
    output paths, and top-level keys, which reach a result through the groups alone. It is computed from what every
    record has, so that those written before runs knew their own identity have one too.

    Args:
        config: a run's configuration, flat: ``calib.n_samples`` -> 32.
        manifest: of the same run.

    Returns:
        16 hexadecimal digits.
    """
    model = manifest.get("model_sha256")
    parts = {
        "config": {
            key: value
            for key, value in config.items()
            if key.partition(".")[0] in GROUPS and not (model and key in {f"model.{name}" for name in SOURCES})
        },
        "dtype": manifest.get("dtype", config.get("dtype")),
        "device": str(manifest.get("device")).partition(":")[0],
        "model": model,
        # What a stored checkpoint holds is known by nothing else; another run's follows from its configuration.
        "checkpoint": None if "method.name" in config else manifest.get("checkpoint_sha256"),
        "sources": manifest.get("sources_sha256"),
        "versions": {name: (manifest.get("versions") or {}).get(name) for name in VERSIONS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.cache
def _resamples(n: int) -> npt.NDArray[np.int64]:
    """Return which of ``n`` values each resample draws, ``[N_RESAMPLES, n]``."""
    return np.random.default_rng(0).integers(n, size=(N_RESAMPLES, n))
