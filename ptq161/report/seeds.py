"""Several seeds are one result: which runs differ in nothing else, and what their scores say together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

GROUPS = ("model", "method", "calib", "preprocess", "finetune", "eval")
"""The configuration that decides a result, beside the seed and the dtype."""
_SOURCES = ("model.path", "model.repo", "model.revision", "model.asset")
"""Keys of a model that only say where its weights come from."""
_VERSIONS = ("torch", "transformers", "lm-eval", "peft")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number as one or several seeds give it.

    Attributes:
        value: the mean over seeds.
        low: lower end of the mean's 95 % bootstrap interval; NaN for a single seed, and where a value is not finite.
        high: its upper end.
        standard_error: of the evaluation itself; NaN for several seeds, and where the protocol has none.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    standard_error: float = math.nan


def estimate(values: Sequence[float], standard_error: float = math.nan) -> Estimate:
    """Take values of several seeds, at least one, as one.

    The interval is the percentile bootstrap of the mean (Efron and Tibshirani, 1993, section 13.3) at 95 %, from a
    generator of its own, so that the same values give the same interval. Resampling few values cannot show spread that
    they do not have: below about five seeds the true interval is wider.

    Args:
        values: one a seed.
        standard_error: of the evaluation; kept where there is one value alone.
    """
    if len(values) == 1:
        return Estimate(values[0], standard_error=standard_error)
    if not all(map(math.isfinite, values)):
        return Estimate(float(np.mean(values)))
    if len(set(values)) == 1:
        return Estimate(values[0], values[0], values[0])
    found = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return Estimate(math.fsum(values) / len(values), float(found.low), float(found.high))


def identity_without_seed(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return a hash of everything that can change a run's result, but for its seed.

    A manifest that knows it is believed; what it leaves out is derived from what every record has.

    Args:
        config: a run's configuration, flat: ``calib.n_samples`` -> 32.
        manifest: of the same run.
    """
    return str(manifest.get("identity_without_seed") or _derived_identity(config, manifest))


def _derived_identity(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Hash what decides a result, for records that were written before runs knew this identity.

    The hash covers the options of every group, the dtype, the kind of device, the package's sources, the versions of
    what computes the numbers, and the weights by their content where the record has it. It leaves out the tracker,
    output paths, and top-level keys, which reach a result through the groups alone.
    """
    model = manifest.get("model_sha256")
    parts = {
        "config": {
            key: value
            for key, value in config.items()
            if key.partition(".")[0] in GROUPS and not (model and key in _SOURCES)
        },
        "dtype": manifest.get("dtype", config.get("dtype")),
        "device": str(manifest.get("device")).partition(":")[0],
        "model": model,
        # What a stored checkpoint holds is known by nothing else; another run's follows from its configuration.
        "checkpoint": None if "method.name" in config else manifest.get("checkpoint_sha256"),
        "sources": manifest.get("sources_sha256"),
        "versions": {name: (manifest.get("versions") or {}).get(name) for name in _VERSIONS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
