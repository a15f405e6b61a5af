"""Run a recorded run again, and report the differences.

Usage::

    python -m ptq161.replay outputs/2026-01-01/12-00-00                     # exit status 0: the same to the last bit
    python -m ptq161.replay RUN_DIR --out FOLDER --tolerance 1e-3           # on other hardware
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table

from ptq161.console import stdout_console
from ptq161.errors import UserError
from ptq161.files.atomic import write_atomically
from ptq161.files.reading import reading
from ptq161.files.streams import never_fail_to_print
from ptq161.files.strict_json import encode_json
from ptq161.replay.compare import Comparison, compare
from ptq161.tracking.find import is_run
from ptq161.tracking.interrupts import exit_on_interrupt
from ptq161.tracking.layout import SCHEMA_VERSION
from ptq161.tracking.read import RunData, read_run

_REPORT = "replay.json"
_LACKING: Mapping[str, Any] = {
    "method": {"name": "none"},
    "mask_ratio": 0.0,
    "block_size": 1,
    "calib": {"name": "squad", "n_samples": 1, "seq_len": 2},
    "preprocess": {"name": "none"},
    "finetune": {"name": "none"},
}
"""Settings that the schema requires but a record may lack: that of a packed checkpoint's evaluation, on which they have
no effect, and that of a run before there was any finetuning."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        the exit status: 0 if everything is equal; 1 if something differs, or if the run cannot be replayed (then with
        one sentence on stderr).
    """
    options = _parser().parse_args(arguments)
    try:
        recorded = _read_finished(options.run_dir)
        if not 0 <= options.tolerance < math.inf:
            raise UserError(f"--tolerance {options.tolerance}: use 0 or a small positive number.")
        out = Path(options.out).absolute() if options.out else _default_out(recorded.run_dir)
        _check_new(out)
        _restart_with_recorded_threads(recorded, [options.run_dir, f"--out={out}", f"--tolerance={options.tolerance}"])
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        comparison = _replay(recorded, out, options.tolerance)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    _print_comparison(comparison, out)
    return 0 if comparison.equal else 1


def _read_finished(run_dir: Path | str) -> RunData:
    """Read a record that can be replayed.

    Raises:
        UserError: there is no record, it is damaged or of another layout version, or its run has not finished.
    """
    run = read_run(run_dir)
    if run.results is None or run.manifest.get("exit_state") != "finished":
        state = run.manifest.get("exit_state", "unknown")
        raise UserError(
            f"{run_dir} did not finish (state: {state}): only a finished run can be compared with its replay."
        )
    if run.problems:
        raise UserError(f"{run_dir} cannot be replayed: its record is damaged ({run.problems[0].rstrip('.')}).")
    return dataclasses.replace(run, run_dir=run.run_dir.absolute())


def _replay(recorded: RunData, out: Path, tolerance: float = 0.0) -> Comparison:
    """Run a recorded configuration again, compare, and write ``replay.json`` beside the new record.

    Relative paths of the configuration are resolved in the recorded working directory, if that still exists.

    Args:
        recorded: from :func:`_read_finished`.
        out: directory of the new record.
        tolerance: relative difference up to which two numbers count as equal; 0 requires the same bits.

    Raises:
        UserError: the configuration cannot be run anymore (its model has gone, its schema has changed), or the run
            fails.
    """
    from ptq161.run.pipeline import run  # takes seconds, which a wrong directory need not wait for
    from ptq161.run.preflight import check_writable, checked_config, make_paths_absolute
    from ptq161.run.session import RunContext

    recorded_cwd = recorded.manifest.get("working_directory")
    with contextlib.chdir(recorded_cwd if recorded_cwd and Path(recorded_cwd).is_dir() else "."):
        try:
            with reading(recorded.run_dir / "config.yaml", "replay a run whose record is whole"):
                resolved = _replayed_config(recorded)
                recorded_config = OmegaConf.create(resolved)
                make_paths_absolute(recorded_config)
                config = checked_config(recorded_config, [])
        except UserError as error:
            raise UserError(f"{recorded.run_dir} cannot be replayed: {error}") from error
        check_writable("--out", str(out))
        _set_torch_threads(recorded.manifest)
        name = f"replay of {recorded.manifest.get('job_name')}"
        run(config, RunContext(run_dir=str(out), resolved=resolved, overrides=[], job_name=name))
    comparison = compare(recorded, read_run(out), tolerance)
    document = {"schema_version": SCHEMA_VERSION, "recorded": recorded.run_dir, **comparison.document()}
    write_atomically(out / _REPORT, encode_json(document, indent=2) + "\n")
    return comparison


def _replayed_config(recorded: RunData) -> dict[str, Any]:
    """Return the recorded configuration without mirror and cache, so that the run is computed again.

    A dtype of ``auto`` becomes the recorded one; a device of ``auto`` is resolved on this machine.
    """
    config = {**_LACKING, **copy.deepcopy(recorded.config)}
    method, dtype = config["method"], recorded.manifest.get("dtype")
    if config.get("dtype") == "auto" and dtype:
        config["dtype"] = dtype
        if method.get("compute_dtype") == "auto":
            method["compute_dtype"] = dtype
    return {**config, "tracker": {"name": "none"}, "cache": False, "force": False}


def _print_comparison(comparison: Comparison, out: Path) -> None:
    """Print a table of the metrics, the missing ones, the hashes, the differences in environment, and the verdict."""
    console = stdout_console()
    console.print(_metrics_table(comparison))
    for place in comparison.missing:
        console.print(f"The replay has no {place.name} {place.where} ({place.source}).", highlight=False)
    if comparison.extra:
        names = sorted({place.name for place in comparison.extra})
        console.print(f"Only the replay has {', '.join(names)}.", highlight=False)
    for name, (before, after) in comparison.hashes.items():
        verdict = "equal" if before == after else f"was {before}, is {after}"
        console.print(f"{name}: {verdict}", highlight=False, soft_wrap=True)
    if comparison.environment:
        console.print(_environment_table(comparison))
    else:
        console.print("Commit, sources, versions, hardware and threads are those of the recorded run.")
    console.print(_verdict(comparison), highlight=False, soft_wrap=True)
    console.print(f"Record: {out}", highlight=False, soft_wrap=True)


def _verdict(comparison: Comparison) -> str:
    missing = f", {len(comparison.missing)} are missing from the replay" if comparison.missing else ""
    within = f" by more than {comparison.tolerance:g}" if comparison.tolerance else ""
    numbers = f"{comparison.n_different} of {comparison.n_values} values differ{within}{missing}"
    hashes = f"; hashes that differ: {', '.join(comparison.differing_hashes)}" if comparison.differing_hashes else ""
    return f"{'Reproduced' if comparison.equal else 'Not reproduced'}: {numbers}{hashes}."


def _metrics_table(comparison: Comparison) -> Table:
    table = Table(title="The recorded run against its replay")
    for column in ("value of", "name", "compared", "different", "largest rel. diff.", "at", "recorded", "replayed"):
        table.add_column(column, justify="left" if column in ("value of", "name", "at") else "right", overflow="fold")
    for metric in comparison.metrics:
        row = [metric.source, metric.name, str(metric.n_values), str(metric.n_different)]
        difference = f"{metric.largest_relative_difference:.3g}"
        if metric.where is None:
            table.add_row(*row, difference)
        else:
            table.add_row(*row, difference, metric.where, str(metric.recorded), str(metric.replayed))
    return table


def _environment_table(comparison: Comparison) -> Table:
    table = Table(title="What differs around the two runs")
    for column in ("manifest", "recorded", "replayed"):
        table.add_column(column, overflow="fold")
    for key, (before, after) in comparison.environment.items():
        table.add_row(key, "-" if before is None else str(before), "-" if after is None else str(after))
    return table


def _default_out(run_dir: Path) -> Path:
    return run_dir / "replay" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _check_new(out: Path) -> None:
    if is_run(out):
        raise UserError(f"--out {out} holds a record already: choose a new directory.")


def _restart_with_recorded_threads(recorded: RunData, arguments: Sequence[str]) -> None:
    """Restart this process if the recorded thread variables differ: libraries read them when they are imported."""
    from ptq161.tracking.environment import THREAD_VARIABLES  # imports torch, which a wrong directory need not wait for

    plain = {name: value for name, value in os.environ.items() if not name.startswith(THREAD_VARIABLES)}
    wanted = plain | recorded.manifest.get("threads", {}).get("environment", {})
    if wanted != dict(os.environ):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", "ptq161.replay", *arguments], wanted)


def _set_torch_threads(manifest: Mapping[str, Any]) -> None:
    import torch

    threads = manifest.get("threads", {})
    if count := threads.get("torch"):
        torch.set_num_threads(count)
    # torch allows this once per process, and not at all after parallel work.
    if (count := threads.get("torch_interop")) and count != torch.get_num_interop_threads():
        torch.set_num_interop_threads(count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ptq161.replay", description="Run a recorded run again and compare every number with the record."
    )
    parser.add_argument("run_dir", type=os.path.expanduser, metavar="RUN_DIR", help="directory of a finished run")
    parser.add_argument(
        "--out", type=os.path.expanduser, metavar="DIR", help="directory of the new record (RUN_DIR/replay/DATE_TIME)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="T",
        help="relative difference up to which two numbers count as equal; above 0, hashes may differ (0: same bits)",
    )
    return parser


if __name__ == "__main__":
    never_fail_to_print()
    with exit_on_interrupt():
        sys.exit(main())
