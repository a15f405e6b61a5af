"""The record of a run: complete local files, their mirror in Weights & Biases, and reading and finding records.

These modules import ``files`` and the ground floor; ``cache`` and every room above may import them.
"""

from ptq161.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "ptq161.tracking.layout": ["SCHEMA_VERSION"],
        "ptq161.tracking.read": ["RunData", "read_metrics", "read_run"],
        "ptq161.tracking.record": ["RunRecord"],
        "ptq161.tracking.interrupts": ["Interrupted"],
    },
)
