"""The record of a run: written locally in full, mirrored to Weights & Biases.

Usage::

    with RunRecord.open(run_dir, config=config, tracker=tracker, seeds={"run": 0}, job_name="demo") as record:
        record.describe(model_sha256=sha256_of_tensors(model.state_dict()))
        record.metric("loss", 0.5, block=3, epoch=0)
        record.finish({"metrics": {"ppl/boolq@512": 30.1}})

    run = read_run(run_dir)

Imports ``files/`` and the ground floor; the report needs this room alone.
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
