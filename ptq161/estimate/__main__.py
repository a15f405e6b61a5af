"""What a run will take, before it is begun: memory, disk, bits and time.

::

    ptq161 estimate method=gptq model=llama2_7b calib.n_samples=128      # the settings of ptq161 run
    ptq161 estimate model.path=FOLDER --no-time                          # a folder with a config.json is enough
    ptq161 estimate model=llama2_7b --gpu                                # on a GPU, whether there is one here or not
    ptq161 estimate --json

Memory, disk and bits follow from the model's config and the settings; no weights are read. Time rests on a benchmark of
seconds on this machine: the method on one block of random weights and a few windows. All figures are predictions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from ptq161.console import stdout_console
from ptq161.errors import UserError
from ptq161.estimate.predict import Estimate, estimate
from ptq161.files.streams import never_fail_to_print
from ptq161.run.command_line import sentence_of
from ptq161.run.conf import CONF
from ptq161.run.config import RunConfig
from ptq161.run.preflight import checked_config, make_paths_absolute, name_local_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        the exit status: 0, or 1 with one sentence on stderr.
    """
    options = _parser().parse_intermixed_args(arguments)
    try:
        config = composed(options.overrides)
        if options.gpu:
            config = dataclasses.replace(config, device=torch.device("cuda"))
        found = estimate(config, measure_time=not (options.no_time or options.gpu))
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(sentence_of(error), file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(as_json(config, found), indent=1))
    else:
        _print(config, found)
    return 0


def composed(overrides: Sequence[str]) -> RunConfig:
    """Compose the configuration of a run as ``ptq161 run`` does.

    Raises:
        UserError: a key or value is wrong, or a file is missing.
        HydraException: an override cannot be read.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", list(overrides))
    make_paths_absolute(cfg)
    name_local_model(cfg, overrides)
    return checked_config(cfg, overrides)


def as_json(config: RunConfig, found: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON values: bytes and seconds."""
    return {
        "predicted": True,
        "model": config.model.name,
        "method": config.method_name,
        "device": str(config.device),
        "dtype": config.dtype,
        "host_bytes": round(found.host_bytes),
        "device_bytes": round(found.device_bytes),
        "process_bytes": round(found.process),
        "phases": {name: dataclasses.asdict(held) for name, held in found.memory.items()},
        "disk_bytes": found.disk_bytes,
        "sizes": None if found.sizes is None else dataclasses.asdict(found.sizes),
        "seconds": None if found.seconds is None else dataclasses.asdict(found.seconds),
        "left_out": found.left_out,
    }


def _print(config: RunConfig, found: Estimate) -> None:
    console = stdout_console()
    table = Table(title=f"Predicted: {config.method_name} on {config.model.name}")
    for column in ("what", "host", *(["GPU"] if found.device_bytes else [])):
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)

    def row(name: str, host: float, device: float) -> None:
        table.add_row(name, _gigabytes(host), *([_gigabytes(device)] if found.device_bytes else []))

    row("peak memory", found.host_bytes, found.device_bytes)
    for name, held in found.memory.items():
        row(f"  {name}", found.process + held.host, held.device)
    row("disk", found.disk_bytes, 0)
    console.print(table)
    mapped = max(held.mapped for held in found.memory.values())
    console.print(f"Up to {_gigabytes(mapped)} of it is mapped from the model's files and can be read again.")
    if found.sizes is not None:
        sizes = found.sizes
        console.print(
            f"Bits per weight: {sizes.bits_per_weight:.3f} measured, {sizes.nominal_bits_per_weight:.3g} nominal. "
            f"Checkpoint: {_gigabytes(sizes.checkpoint_bytes)}, {_gigabytes(sizes.other_bytes)} of it not quantized."
        )
    if found.seconds is not None:
        console.print(
            f"Time on this machine as it is now: {found.seconds.quantize:.0f} s to quantize, "
            f"{found.seconds.evaluate:.0f} s for perplexities."
        )
    for sentence in found.left_out:
        console.print(sentence, soft_wrap=True)


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB" if n_bytes else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ptq161.estimate",
        description="Predict the memory, disk, bits and time of a run; nothing is quantized, no weights are read.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the settings of ptq161 run")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    parser.add_argument("--gpu", action="store_true", help="memory as on a GPU, without time; this machine needs none")
    parser.add_argument("--no-time", action="store_true", help="leave out the benchmark of seconds")
    return parser


if __name__ == "__main__":
    never_fail_to_print()
    sys.exit(main())
