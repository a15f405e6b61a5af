"""What a search found: its trials and their Pareto front, as tables and a figure."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from rich.table import Table

from ptq161.files.atomic import write_atomically
from ptq161.report.static import render
from ptq161.report.style import COLORS, GRAY, add, metric_axis, panels
from ptq161.search.trials import Outcome, Search, outcome_of


def trials_frame(search: Search) -> pd.DataFrame:
    """Lay out the trials that have begun.

    Returns:
        a row per trial, unrounded: ``trial``, the objectives, the settings, ``pareto_front`` (yes or no), ``state``,
        ``seconds``, ``reason`` (where one failed) and ``run_dir``.
    """
    frame = search.study.trials_dataframe(("number", "values", "params", "state"))
    settings = list(search.space)
    names = {"number": "trial"} | {f"values_{i}": name for i, name in enumerate(search.objectives)}
    frame = frame.rename(columns=names | {f"params_{key}": key for key in settings})
    frame = frame.reindex(columns=["trial", *search.objectives, *settings, "state"])
    frame = frame[frame.state != "WAITING"]
    ended = frame.state.isin(["COMPLETE", "FAIL"])
    outcomes = [outcome_of(search, n) if end else Outcome(None) for n, end in zip(frame.trial, ended, strict=True)]
    front = [trial.number for trial in search.study.best_trials]
    frame.insert(len(frame.columns) - 1, "pareto_front", frame.trial.isin(front).map({True: "yes", False: "no"}))
    return frame.assign(
        state=frame.state.str.lower(),
        seconds=[outcome.seconds for outcome in outcomes],
        reason=[outcome.reason for outcome in outcomes],
        run_dir=[str(search.run_dir(number)) for number in frame.trial],
    )


def pareto_front(search: Search) -> pd.DataFrame:
    """Return the trials that no other one beats in both objectives, in the order of the first objective."""
    trials = trials_frame(search)
    return trials[trials.pareto_front == "yes"].sort_values(list(search.objectives))


def front_table(search: Search) -> Table:
    """Lay the Pareto front out for a terminal, a trial a row."""
    table = Table(title="Pareto front")
    front = pareto_front(search)[["trial", *search.objectives, *search.space]]
    for column in front:
        table.add_column(column, justify="right", overflow="fold")
    for row in front.itertuples(index=False, name=None):
        table.add_row(*map(short, row))
    return table


def front_figure(search: Search) -> go.Figure:
    """Draw the second objective against the first: each trial a point, the front a line with the trials' numbers."""
    first, second = search.objectives
    trials = trials_frame(search)
    done, front = trials[trials.state == "complete"], pareto_front(search)
    others = done[done.pareto_front == "no"]
    traces = [
        go.Scatter(x=others[first], y=others[second], mode="markers", name="trial", marker_color=GRAY, opacity=0.6),
        go.Scatter(x=front[first], y=front[second], mode="lines", name="Pareto front", line_shape="hv"),
        go.Scatter(x=front[first], y=front[second], mode="markers", text=front.trial.astype(str), showlegend=False),
    ]
    for trace in traces[1:]:
        trace.update(line_color=COLORS[0], marker_color=COLORS[0])
    return add(panels(1), 0, traces, metric_axis(first, done[first]), metric_axis(second, done[second]))


def write_front(search: Search) -> list[Path]:
    """Write ``trials.csv``, ``pareto.csv``, ``pareto.svg`` and ``pareto.png`` into the search's folder.

    Raises:
        UserError: the folder cannot be written.
    """
    files: dict[str, str | bytes] = {
        "trials.csv": trials_frame(search).to_csv(index=False),
        "pareto.csv": pareto_front(search).to_csv(index=False),
    }
    files |= {f"pareto.{kind}": content for kind, content in render(front_figure(search)).items()}
    for name, content in files.items():
        write_atomically(search.folder / name, content)
    return [search.folder / name for name in files]


def short(value: object) -> str:
    """Write a value with as many digits as a reader needs."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
