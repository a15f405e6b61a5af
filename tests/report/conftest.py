"""Synthetic records, written by the record itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptq161.tracking.record import RunRecord
from ptq161.tracking.settings import TrackerConfig

WriteRun = Callable[..., Path]

FULL = {"ppl/boolq@512": 18.0, "zero_shot/piqa/acc": 0.66, "bits_per_weight": 16.0, "nominal_bits_per_weight": 16.0}


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write ``tmp_path/NAME``: a finished run of a method with a perplexity, by default."""

    def write(
        name: str,
        method: str = "ptq161",
        ppl: float = 100.0,
        bits: float = 1.7,
        *,
        settings: dict[str, Any] | None = None,
        results: dict[str, Any] | None = None,
        finish: bool = True,
        lines: Sequence[tuple[str, float, dict[str, Any]]] = (),
        **top: Any,
    ) -> Path:
        keys: dict[str, Any] = {"mask_ratio": 0.2, "block_size": 1, "seed": 0, **top}
        group = {"name": method, "block_size": keys["block_size"], **(settings or {})}
        if method.startswith("ptq161"):
            group["mask_ratio"] = keys["mask_ratio"]
        config = {
            "model": {"name": "tiny", "path": None},
            "method": group if method != "none" else {"name": "none"},
            "calib": {"name": "squad", "n_samples": 32},
            "preprocess": {"name": "none"},
            "eval": {"name": "quick", "limit": 200},
            "tracker": {"name": "none", "tags": [name]},
            **keys,
        }
        metrics = {
            "ppl/boolq@512": ppl,
            "zero_shot/piqa/acc": 0.55,
            "zero_shot/piqa/acc_norm": 0.54,
            "bits_per_weight": bits,
            "nominal_bits_per_weight": 1.6,
            "checkpoint_bytes": 1000,
        }
        arguments: dict[str, Any] = {
            "config": config,
            "tracker": TrackerConfig("none"),
            "seeds": {"seed": keys["seed"]},
            "job_name": name,
        }
        with RunRecord.open(tmp_path / name, **arguments) as record:
            record.describe(git={"commit": "0123456789abcdef", "dirty": False}, sources_sha256="0123")
            for metric, value, where in lines:
                record.metric(metric, value, **where)
            if finish:
                record.finish(
                    results
                    or {
                        "metrics": FULL if method == "none" else metrics,
                        "full_precision": FULL,
                        "protocol": {"ppl/boolq@512": {"standard_error": 2.5}},
                        "seconds": {"load": 1.0, "quantize": 20.5},
                        "peak_memory_bytes": 2_500_000_000,
                    }
                )
        return tmp_path / name

    return write
