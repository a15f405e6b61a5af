"""What a search found: its trials and their Pareto front, as tables and a figure."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from ptq161.files.atomic import write_atomically
from ptq161.report.figures import COLORS, new_figure, render, score_axis
from ptq161.search.trials import Search, outcome_of
from ptq161.tracking.metric_names import is_perplexity


def pareto_front(search: Search) -> list[FrozenTrial]:
    """Return the trials that no other one beats in both objectives, in the order of the first objective."""
    return sorted(search.study.best_trials, key=lambda trial: trial.values)


def front_table(search: Search) -> Table:
    """Lay the Pareto front out for a terminal, a trial a row."""
    table = Table(title="Pareto front")
    for column in ("trial", *search.objectives, *search.space):
        table.add_column(column, justify="right", overflow="fold")
    for trial in pareto_front(search):
        values = [*trial.values, *(trial.params[key] for key in search.space)]
        table.add_row(str(trial.number), *map(short, values))
    return table


def csv_table(search: Search, trials: list[FrozenTrial]) -> str:
    """Lay trials out as CSV, unrounded: values, settings, state, seconds, and the reason where one failed."""
    front = {trial.number for trial in pareto_front(search)}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["trial", *search.objectives, *search.space, "pareto_front", "state", "seconds", "reason", "run_dir"]
    )
    for trial in trials:
        ended = trial.state in (TrialState.COMPLETE, TrialState.FAIL)
        outcome = outcome_of(search, trial.number) if ended else None
        writer.writerow(
            [
                *[trial.number, *(trial.values or ("", ""))],
                *[trial.params.get(key, "") for key in search.space],
                *["yes" if trial.number in front else "no", trial.state.name.lower()],
                *([outcome.seconds, outcome.reason] if outcome else ["", ""]),
                search.run_dir(trial.number),
            ]
        )
    return stream.getvalue()


def figure(search: Search) -> Figure:
    """Draw the second objective against the first: each trial a point with its number, the front a line."""
    drawing = new_figure(1)
    axes = drawing.subplots()
    front = pareto_front(search)
    x, y = search.objectives
    done = search.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    others = [trial for trial in done if trial.number not in {best.number for best in front}]
    axes.plot(*_points(others), "o", color="grey", alpha=0.5, markersize=4, label="trial")
    axes.plot(*_points(front), "o-", drawstyle="steps-post", color=COLORS[0], label="Pareto front")
    for trial in front:
        axes.annotate(str(trial.number), trial.values, (4, 4), textcoords="offset points", fontsize="small")
    axes.set_xlabel(x.replace("_", " "))
    score_axis(axes, y, is_perplexity(y))
    axes.legend(frameon=False, fontsize="small")
    return drawing


def write_front(search: Search) -> list[Path]:
    """Write ``trials.csv``, ``pareto.csv``, ``pareto.svg`` and ``pareto.png`` into the search's folder.

    Raises:
        UserError: the folder cannot be written.
    """
    front, drawing = pareto_front(search), figure(search)
    trials = [t for t in search.study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
    files: dict[str, str | bytes] = {
        "trials.csv": csv_table(search, trials),
        "pareto.csv": csv_table(search, front),
        **{f"pareto.{kind}": content for kind, content in render(drawing).items()},
    }
    for name, content in files.items():
        write_atomically(search.folder / name, content)
    return [search.folder / name for name in files]


def short(value: object) -> str:
    """Write a value with as many digits as a reader needs."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _points(trials: list[FrozenTrial]) -> tuple[list[float], list[float]]:
    return [trial.values[0] for trial in trials], [trial.values[1] for trial in trials]
