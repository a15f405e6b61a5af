"""The estimate of a run, and whether it fits into this machine's memory."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import psutil
import torch

from ptq161.errors import UserError
from ptq161.estimate.memory import CUDA_CONTEXT, Held, run_memory
from ptq161.estimate.shapes import ModelShape, empty_model, shape_of
from ptq161.estimate.sizes import Sizes, packed_sizes
from ptq161.estimate.timing import Seconds, run_seconds
from ptq161.models.loading import is_packed_folder
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.run.config import RunConfig

MEMORY_VARIABLE = "PTQ161_MEMORY"
"""Environment variable: bytes of host memory that a run may take, in place of what the machine has available."""
TOLERANCE = 1.25
"""Factor within which predictions are to lie; a run is refused where even a prediction that is too high by it fails."""
_TEXTS = 0.13e9
"""Bytes of a tokenizer and of texts; measured with the default model and calibration set."""
_CGROUP = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run is predicted to take.

    Attributes:
        memory: phase -> bytes at its peak, in the order of the run; ``process`` is in each of the host's.
        process: bytes that a process holds before it loads a model.
        sizes: of the packed model; None where nothing is quantized.
        disk_bytes: of the checkpoint, and of the finished windows that the store keeps.
        seconds: None where they were not asked for, or cannot be told.
        left_out: parts of the run that no figure covers, and what else a reader should know.
    """

    memory: dict[str, Held]
    process: float
    sizes: Sizes | None
    disk_bytes: int
    seconds: Seconds | None
    left_out: list[str]

    @property
    def host_bytes(self) -> float:
        """Peak memory on the host."""
        return self.process + max(held.host for held in self.memory.values())

    @property
    def device_bytes(self) -> float:
        """Peak memory on a GPU; zero without one."""
        return max(held.device for held in self.memory.values())


def estimate(config: RunConfig, *, measure_time: bool = True) -> Estimate:
    """Predict what a run takes.

    Args:
        config: of the run.
        measure_time: run the benchmark of seconds.

    Raises:
        UserError: the model has no config that can be read, is packed already, or the settings do not fit it.
    """
    if config.model.path is not None and is_packed_folder(config.model.path):
        raise UserError(f"model.path={config.model.path}: the model is quantized already; give a full-precision model.")
    model = empty_model(config.model)
    shape, dtype = shape_of(model), COMPUTE_DTYPES[config.dtype]
    left_out, process = _left_out(config), _process()  # before the benchmark, which leaves memory behind
    seconds = None
    if measure_time:
        arguments = (model.config, shape, config.method, config.calib, config.eval)
        try:
            seconds = run_seconds(*arguments, dtype=dtype, device=config.device)
        except UserError as error:
            left_out.append(str(error))
    sizes = (
        None
        if config.method is None
        else packed_sizes(model, config.method, dtype, embedding_bits=config.model.embedding_bits)
    )
    memory = _memory(config, shape, sizes)
    stored = 0 if sizes is None else sizes.checkpoint_bytes + (sizes.linear_bytes if config.cache else 0)
    merged = shape.parameters * shape.dtype.itemsize if config.preprocess and config.preprocess.save_merged else 0
    return Estimate(memory, process, sizes, stored + merged, seconds, left_out)


def check_fits(config: RunConfig) -> None:
    """Check, from shapes alone, that a run is not certain to fail for lack of memory.

    Weights that are mapped from the model's files need no room of their own: short of memory, a run reads them again.

    Raises:
        UserError: it is, by a prediction that leaves room for its own error.
    """
    try:
        memory = _memory(config, shape_of(empty_model(config.model)), None)
    except UserError:  # the run itself says what is wrong with the model; a method of the user's own has no figures
        return
    room = available_memory(config.device)
    for phase, held in memory.items():
        for place, needed, there in (("host", held.host - held.mapped, room.host), ("GPU", held.device, room.device)):
            if needed / TOLERANCE > there:
                helps = f"; {MEMORY_VARIABLE}=BYTES says otherwise" if place == "host" else ""
                raise UserError(
                    f"the run does not fit: its phase {phase!r} is predicted to take {needed / 1e9:.3g} GB of "
                    f"{place} memory, and {there / 1e9:.3g} GB are available; ptq161 estimate shows what takes it, and "
                    f"model.stream=true quantizes a model that is larger than the memory{helps}."
                )


def _memory(config: RunConfig, shape: ModelShape, sizes: Sizes | None) -> dict[str, Held]:
    dtype = COMPUTE_DTYPES[config.dtype]
    parts = (shape, config.method, config.calib, config.eval, sizes)
    return run_memory(*parts, dtype=dtype, device=config.device, stream=config.model.stream)


def available_memory(device: torch.device) -> Held:
    """Return the bytes that this process can still take, on the host (swap included) and on a GPU.

    Raises:
        UserError: ``PTQ161_MEMORY`` is no number of bytes.
    """
    free = float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else math.inf
    if given := os.environ.get(MEMORY_VARIABLE):
        try:
            return Held(float(given), free)
        except ValueError as error:
            raise UserError(f"{MEMORY_VARIABLE}={given}: use a number of bytes, such as 16e9.") from error
    return Held(min(psutil.virtual_memory().available + psutil.swap_memory().free, _left_in_cgroup()), free)


def _left_in_cgroup(root: Path = _CGROUP) -> float:
    """Return what the limit of a container leaves; infinity without one."""
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        used = int((root / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return math.inf
    # Pages of files that were not used for long are given back first.
    return math.inf if limit == "max" else max(0.0, float(limit) - used + int(stat.get("inactive_file", 0)))


def _process() -> float:
    """Return what a process of a run holds once everything that it needs is imported."""
    import ptq161.evaluation.zero_shot
    import ptq161.run.pipeline  # noqa: F401  # for the memory that its libraries take

    return psutil.Process().memory_info().rss + _TEXTS


def _left_out(config: RunConfig) -> list[str]:
    found = []
    for group, training in (("preprocess", config.preprocess), ("finetune", config.finetune)):
        if training is not None:
            found.append(f"{group}: memory and time of its training are not in the estimate.")
    if config.eval.tasks:
        found.append("eval.tasks: the time of zero-shot tasks depends on their texts and is not in the estimate.")
    if config.eval.corpora and config.eval.max_windows is None:
        found.append("eval.max_windows=null: the time of perplexities depends on the length of the texts.")
    elif config.eval.corpora:
        found.append("A corpus that is shorter than eval.max_windows takes less time.")
    if config.device.type == "cuda":
        found.append(f"Other {CUDA_CONTEXT / 1e9:.1f} GB or so of the GPU go to its context.")
    return found
