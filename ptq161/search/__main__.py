"""Search settings for two objectives, such as few bits and a low perplexity; the result is their Pareto front.

Usage::

    python -m ptq161.search --trials 20 --out searches/first                      # bits against the first perplexity
    python -m ptq161.search --trials 50 --out DIR --space my_space.yaml eval=ppl  # what to vary; settings of run.py
    python -m ptq161.search --trials 50 --out DIR --objectives bits_per_weight zero_shot/piqa/acc

The same command again continues a killed search, or adds trials up to a larger ``--trials``; in several terminals, or
on machines that share the folder, it is one search in several processes. Each trial is a recorded run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from optuna.trial import TrialState

from ptq161.console import stdout_console
from ptq161.errors import UserError
from ptq161.files.streams import never_fail_to_print
from ptq161.run.conf import CONF
from ptq161.run.config import RunConfig
from ptq161.run.preflight import check_store, checked_config, name_local_model
from ptq161.search.front import front_table, short, write_front
from ptq161.search.space import Space, as_overrides, contains, corners, load_space
from ptq161.search.trials import Claim, Direction, Outcome, Search, claim_trial, open_search, run_trial
from ptq161.tracking.interrupts import Interrupts, exit_on_interrupt
from ptq161.tracking.metric_names import SIZES, is_perplexity

_DEFAULT_SPACE = CONF / "search.yaml"
_RESERVED_KEYS = ("hydra", "study")
"""Keys of run.py that a search does not accept: it sets the run directories itself, and a study is a sweep."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        the exit status: 0, or 1, with one sentence on stderr, for bad input or if no trial has finished.
    """
    options = _parser().parse_intermixed_args(arguments)
    try:
        search = _prepare(options)
        with Interrupts().installed():
            _run_trials(search, options.trials)
        return _show(search, options.trials)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


def _prepare(options: argparse.Namespace) -> Search:
    """Check the arguments of a search, and open it.

    Raises:
        UserError: an argument is wrong; nothing has been written then.
    """
    if options.trials < 1:
        raise UserError(f"--trials {options.trials}: use at least 1.")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: use at least 0.")
    overrides: list[str] = options.overrides
    space = load_space(Path(options.space))
    _check_keys(space, overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        base, config = _configure(overrides)
        objectives = _objectives(options.objectives, config)
        for corner in corners(space):
            _configure([*overrides, *as_overrides(corner)])
    if config.cache:
        check_store()
    configured = {key: OmegaConf.select(base, key) for key in space}
    return open_search(
        Path(options.out).absolute(),
        space,
        objectives,
        [_direction(name) for name in objectives],
        overrides,
        seed=options.seed,
        first=configured if contains(space, configured) else None,
    )


def _direction(metric: str) -> Direction:
    """Return the direction of an objective: ``minimize`` for sizes and perplexities, ``maximize`` for accuracies."""
    return "minimize" if metric in SIZES or is_perplexity(metric) else "maximize"


def _configure(overrides: Sequence[str]) -> tuple[DictConfig, RunConfig]:
    try:
        cfg = compose("config", list(overrides))
        name_local_model(cfg, list(overrides))
        return cfg, checked_config(cfg, list(overrides))
    except CompactHydraException as error:
        raise UserError(f"no trial can run with {' '.join(overrides)}: {' '.join(str(error).split())}") from error
    except UserError as error:
        raise UserError(f"a trial with {' '.join(overrides)} cannot run: {error}") from error


def _check_keys(space: Space, overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.partition(".")[0].partition("/")[0] in _RESERVED_KEYS:
            raise UserError(f"{override}: a search does not accept {key}; leave it out.")
        if key in space:
            raise UserError(f"{override}: the search varies {key}; leave it out, here or in the file of --space.")


def _objectives(names: Sequence[str] | None, config: RunConfig) -> tuple[str, str]:
    perplexities = [f"ppl/{corpus}@{config.eval.seq_len}" for corpus in config.eval.corpora]
    if names is None:
        if not perplexities:
            raise UserError("eval.corpora is empty, so there is no perplexity: name two results with --objectives.")
        return "bits_per_weight", perplexities[0]
    if names[0] == names[1]:
        raise UserError(f"--objectives {names[0]} {names[1]}: name two different results.")
    known = [*SIZES, *perplexities]
    tasks = [f"zero_shot/{task}/" for task in config.eval.tasks]
    for name in names:
        if name not in known and not name.startswith(tuple(tasks)):
            offered = ", ".join(known + [f"{task}METRIC" for task in tasks])
            raise UserError(f"--objectives {name}: no run with these settings measures it; use one of {offered}.")
    return names[0], names[1]


def _run_trials(search: Search, n_trials: int) -> None:
    try:
        while claim := claim_trial(search, n_trials):
            _print_trial(search, claim, run_trial(search, claim))
    except KeyboardInterrupt:
        print("Run the same command again to continue the search.", file=sys.stderr)
        raise


def _print_trial(search: Search, claim: Claim, outcome: Outcome) -> None:
    point = " ".join(f"{key}={short(value)}" for key, value in claim.values.items())
    if outcome.values is None:
        print(f"Trial {claim.number} ({point}) failed: {outcome.reason}", file=sys.stderr, flush=True)
        return
    scores = ", ".join(f"{name} {short(v)}" for name, v in zip(search.objectives, outcome.values, strict=True))
    seconds = "" if outcome.seconds is None else f" in {outcome.seconds:.0f} s"
    print(f"Trial {claim.number} ({point}): {scores}{seconds}", flush=True)


def _show(search: Search, n_trials: int) -> int:
    states = [trial.state for trial in search.study.get_trials(deepcopy=False)]
    finished, failed = states.count(TrialState.COMPLETE), states.count(TrialState.FAIL)
    if not finished:
        raise UserError(f"none of the {failed} trials in {search.folder} finished; the output.log of each says why.")
    written = ", ".join(path.name for path in write_front(search))
    stdout_console().print(front_table(search))
    running = states.count(TrialState.RUNNING)
    elsewhere = f", {running} still running in other processes" if running else ""
    print(f"{finished} of {n_trials} trials finished, {failed} failed{elsewhere}.")
    print(f"Written to {search.folder}: {written}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ptq161.search", description="Search settings of run.py for the Pareto front of two results."
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of run.py, the same for all trials")
    parser.add_argument(
        "--out",
        required=True,
        type=os.path.expanduser,
        metavar="DIR",
        help="folder of the search; trial N is recorded in DIR/N",
    )
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="trials in all, earlier ones included (20)")
    parser.add_argument(
        "--space",
        type=os.path.expanduser,
        default=str(_DEFAULT_SPACE),
        metavar="FILE",
        help="keys that vary (%(default)s)",
    )
    parser.add_argument(
        "--objectives",
        nargs=2,
        metavar="RESULT",
        help="names of two results (bits_per_weight and the first perplexity)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sampler (0)")
    return parser


if __name__ == "__main__":
    never_fail_to_print()
    with exit_on_interrupt():
        sys.exit(main())
