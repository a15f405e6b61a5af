"""The record of a run: written locally in full, mirrored to Weights & Biases.

Usage::

    with RunRecord.open(run_dir, config=config, tracker=tracker, seeds={"run": 0}, job_name="demo") as record:
        record.describe(model_sha256=sha256_of_tensors(model.state_dict()))
        record.metric("loss", 0.5, block=3, epoch=0)
        record.finish({"metrics": {"ppl/boolq@512": 30.1}})

    run = read_run(run_dir)
"""

from typing import TYPE_CHECKING

from ptq161.lazy import lazily
from ptq161.tracking.layout import SCHEMA_VERSION
from ptq161.tracking.read import RunData, read_metrics, read_run

if TYPE_CHECKING:
    from ptq161.files.hashing import sha256_of_file, sha256_of_sources, sha256_of_tensors
    from ptq161.tracking.interrupts import Interrupted
    from ptq161.tracking.record import RunRecord

__all__ = [
    "SCHEMA_VERSION",
    "Interrupted",
    "RunData",
    "RunRecord",
    "read_metrics",
    "read_run",
    "sha256_of_file",
    "sha256_of_sources",
    "sha256_of_tensors",
]

# What writes records needs torch, which whoever only reads need not wait for.
__getattr__ = lazily(
    __name__,
    {
        "Interrupted": "ptq161.tracking.interrupts",
        "RunRecord": "ptq161.tracking.record",
        "sha256_of_file": "ptq161.files.hashing",
        "sha256_of_sources": "ptq161.files.hashing",
        "sha256_of_tensors": "ptq161.files.hashing",
    },
)
