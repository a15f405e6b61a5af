"""Figures of scores: against measured bits, against a swept number, and by variant.

Each is a plotly figure, which the page shows and :mod:`ptq161.report.static` prints. A trace's ``text`` is written
beside its points in print, where nobody can point at them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ptq161.errors import UserError
from ptq161.report.collect import FULL_PRECISION, TRAININGS
from ptq161.report.keys import describe, differing_keys, line_names
from ptq161.report.published import Published, published_frame
from ptq161.report.results import FULL, NOT_QUANTIZED, Results, is_drawable, method_name, pareto_front
from ptq161.report.style import GRAY, SYMBOLS, add, cycled, metric_axis, panels, titled
from ptq161.report.tables import metric_text, number_text, spread_text
from ptq161.report.texts import NO_TEXT, UNKNOWN, comparisons, remark
from ptq161.tracking.metric_names import better

MOST_LABELS = 16
"""Points that are labeled in print; more are told apart by their method's color alone."""
_LONGEST_LABEL = 28
"""Letters that leave room for the axes."""
MOST_LINES = 12
"""Lines that are told apart in one panel."""
_MOST_NOMINAL = 150
"""Results whose nominal bits are drawn from the start; of more, on request."""
_PAPERS = ("diamond", "diamond-open", "square", "square-open", "triangle-up", "triangle-up-open")
"""Symbols of published figures."""
_SPREAD = 0.3
"""Share of a row over which its colors are spread, so that none hides another."""


def bits_figure(results: Results, metrics: Sequence[str], published: Sequence[Published] = ()) -> go.Figure:
    """Draw scores against measured bits per weight, a point per result and a panel per metric.

    A hollow point, joined to the result's, is at the bits that the method's paper counts. Full precision is a dashed
    line, the Pareto front of each comparison (:func:`ptq161.report.texts.comparisons`) a dotted one, which names the
    calibration text where it is not the same for all.

    Args:
        results: to draw.
        metrics: names of scores.
        published: figures that are drawn in gray where model and metric match, with a symbol for each calibration text.

    Raises:
        UserError: no quantized result has one of the metrics.
    """
    rows = results.quantized.select(results.quantized.rows.bits.notna())
    shown = _with_scores(rows, metrics, "bits")
    papers = published_frame(published)
    papers = papers[papers.model.isin(results.rows.model) & (papers.method != FULL_PRECISION)]
    figure = panels(len(shown))
    for i, metric in enumerate(shown):
        frame = rows.of(metric)
        is_labeled = len(frame) <= MOST_LABELS and frame.label.str.len().max() <= _LONGEST_LABEL
        frame["text"] = frame.label if is_labeled else ""
        traces = [
            *_nominal(frame),
            *_fronts(frame, metric, names_text=bool(remark(rows.rows))),
            *_by_method(frame, "bits", rows, size=10 if len(frame) <= _MOST_NOMINAL else 6),
            *_published(papers[papers.metric == metric], metric, cycled(sorted(papers.calibration_text), _PAPERS)),
            *_full_precision(results, metric, _around(frame.bits, frame.nominal_bits), results.rows.model),
        ]
        add(figure, i, traces, titled("bits per weight, measured"), metric_axis(metric, results.of(metric).value))
    return figure


def sweep_figure(results: Results, x: str, metrics: Sequence[str]) -> go.Figure:
    """Draw scores against a swept number, a panel per metric, intervals or errors as bars, full precision dashed.

    Results that differ in more than ``x`` have lines of their own; more than ``MOST_LINES`` of these become points in
    their methods' colors.

    Args:
        results: to draw.
        x: a configured key whose values are numbers, such as ``mask_ratio``; results whose method does not read it are
            left out.
        metrics: names of scores.

    Raises:
        UserError: no result has both the key and a metric.
    """
    rows = _with_key(results, x)
    shown = _with_scores(rows, metrics, x)
    lines = line_names(rows.config, x)
    figure = panels(len(shown))
    for i, metric in enumerate(shown):
        frame = rows.of(metric).join(rows.config[x].astype(float).rename("x")).join(lines.rename("line"))
        frame = frame.assign(text="").sort_values("x")
        if lines.nunique() > MOST_LINES:
            traces = _by_method(frame, "x", rows, size=6)
        else:
            traces = _by_line(frame.dropna(subset="line"), cycled(lines))
        full = _full_precision(results, metric, _around(frame.x), frame.model)
        add(figure, i, [*traces, *full], titled(x), metric_axis(metric, results.of(metric).value))
    return figure


def variants_figure(results: Results, x: str, metrics: Sequence[str]) -> go.Figure:
    """Draw scores in a row per value of ``x``, with a panel per metric; full precision is a dashed line.

    Results that share a row have colors by what else they differ in. Of methods, the row is the quantizer's alone:
    with and without preprocessing and finetuning are colors. A hollow point is a preprocessed model before it is
    quantized.

    Args:
        results: to draw.
        x: a configured key whose values are names, such as ``method``; results whose method does not read it are left
            out.
        metrics: names of scores.

    Raises:
        UserError: no result has both the key and a metric.
    """
    rows = _with_key(results, x)
    shown = _with_scores(rows, metrics, x)
    names = _quantizers(rows) if x == "method" else rows.config[x].map(str)
    groups = _groups(rows, names, x).rename("group")
    (row, row_names), (color, _), colors = pd.factorize(names), pd.factorize(groups), cycled(groups)
    places = pd.Series(row + _SPREAD * ((color + 0.5) / len(colors) - 0.5), names.index, name="place")
    ends = [len(row_names) - 0.1, -0.5]  # the first row on top, and room for a label below the last
    figure = panels(len(shown), height=150 + 36 * max(2, len(row_names)), shared_yaxes=True)
    for i, metric in enumerate(shown):
        by_group = list(rows.of(metric).join(places).join(groups).groupby("group", sort=False))
        traces = [_variants(frame, group, colors[group]) for group, frame in by_group]
        traces += [_restored(frame, metric, colors[group]) for group, frame in by_group]
        traces += _full_precision(results, metric, ends, results.rows.model, is_vertical=True)
        vertical = {"range": ends, "tickvals": list(range(len(row_names))), "ticktext": list(row_names)}
        add(figure, i, traces, metric_axis(metric, results.of(metric).value), vertical | titled("" if i else x))
    return figure


def _with_key(results: Results, key: str) -> Results:
    """Return the quantized results whose method reads a key."""
    rows = results.quantized
    return rows.select(rows.config[key].notna())


def _with_scores(results: Results, metrics: Sequence[str], key: str) -> list[str]:
    """Return the metrics that any result has."""
    shown = [metric for metric in metrics if metric in set(results.scores.metric)]
    if not shown:
        raise UserError(f"no run has both {key} and one of {', '.join(metrics)}: there is nothing to draw.")
    return shown


def _by_method(frame: pd.DataFrame, x: str, results: Results, size: int) -> list[go.Scatter]:
    """Return points of the color and the symbol that each method has among ``results``."""
    colors, symbols = cycled(results.rows.method), cycled(results.rows.method, SYMBOLS)
    return [
        _scores(
            mine, x, name=method_name(method), mode="markers", marker=_marker(colors[method], size, symbols[method])
        )
        for method, mine in frame.groupby("method", sort=False)
    ]


def _by_line(frame: pd.DataFrame, colors: Mapping[str, str]) -> list[go.Scatter]:
    """Return a line for each name in the column ``line``, whose last point is labeled with it."""
    traces = []
    for line, mine in frame.groupby("line", sort=False):
        name, marker = line or method_name(mine.method.iloc[0]), _marker(colors[line], 8)
        mine = mine.assign(text=[""] * (len(mine) - 1) + [name])
        traces.append(_scores(mine, "x", name=name, mode="lines+markers", line_color=colors[line], marker=marker))
    return traces


def _scores(frame: pd.DataFrame, x: str, **style: Any) -> go.Scatter:
    """Return scores over a column, with what the page says of each when one points at it."""
    style |= {"text": frame.text, "hoverinfo": "text", "hovertext": _hover(frame)}
    return go.Scatter(x=frame[x], y=frame.value, error_y=_bars(frame), **style)


def _variants(frame: pd.DataFrame, group: str, color: str) -> go.Scatter:
    style = {"mode": "markers", "marker": _marker(color, 9), "name": group, "hoverinfo": "text"}
    return go.Scatter(x=frame.value, y=frame.place, error_x=_bars(frame), hovertext=_hover(frame), **style)


def _restored(frame: pd.DataFrame, metric: str, color: str) -> go.Scatter:
    """Return the preprocessed models of some results before they were quantized, as hollow points."""
    runs = frame.explode("runs")
    runs["value"] = [run.merged.get(metric, np.nan) for run in runs.runs]
    runs = runs[is_drawable(metric, runs.value)]
    hover = [f"{row.label}{NOT_QUANTIZED}<br>{metric_text(metric, row.value)}" for row in runs.itertuples()]
    style = {"mode": "markers", "marker": _marker(color, 9, "circle-open"), "name": f"preprocessed{NOT_QUANTIZED}"}
    return go.Scatter(x=runs.value, y=runs.place, hoverinfo="text", hovertext=hover, **style)


def _fronts(frame: pd.DataFrame, metric: str, *, names_text: bool) -> list[go.Scatter]:
    """Return the Pareto front of each comparison as steps, whose end may be labeled with the calibration text."""
    style: dict[str, Any] = {
        "mode": "lines+text" if names_text else "lines",
        "name": "Pareto front",
        "hoverinfo": "skip",
    }
    style |= {"line": {"color": GRAY, "width": 1.5, "dash": "dot", "shape": "hv"}, "textposition": "top right"}
    traces = []
    for _, text, rows in comparisons(frame):
        front = pareto_front(rows, metric)
        texts = [""] * (len(front) - 1) + [f"front of {text}"] if names_text else None
        traces.append(go.Scatter(x=front.bits, y=front.value, text=texts, **style))
    return traces


def _nominal(frame: pd.DataFrame) -> list[go.Scatter]:
    """Return the nominal bits as hollow points, and what joins them to the measured ones."""
    frame = frame.dropna(subset="nominal_bits")
    style = {"name": "nominal bits", "visible": True if len(frame) <= _MOST_NOMINAL else "legendonly"}
    gap, marker = np.full(len(frame), np.nan), _marker(GRAY, 7, "circle-open")
    x = np.column_stack([frame.nominal_bits, frame.bits, gap]).ravel()
    y = np.column_stack([frame.value, frame.value, gap]).ravel()
    points = go.Scatter(
        x=frame.nominal_bits,
        y=frame.value,
        mode="markers",
        marker=marker,
        hovertemplate="nominal %{x:.2f} bits",
        **style,
    )
    joints = go.Scatter(x=x, y=y, mode="lines", line_color=GRAY, line_width=1, opacity=0.5, hoverinfo="skip", **style)
    return [points, joints]


def _published(papers: pd.DataFrame, metric: str, symbols: Mapping[str, str]) -> list[go.Scatter]:
    """Return points of the symbol that each calibration text of the papers has."""
    papers = papers[is_drawable(metric, papers.value)]
    traces = []
    for text, rows in papers.groupby("calibration_text"):
        hover = [
            f"{row.method}, {row.model}: {number_text(row.value)}<br>{row.source}, {row.table}".rstrip(", ")
            + (f"<br>{row.training_tokens} tokens" if row.training_tokens else "")
            for row in rows.itertuples()
        ]
        name = "published" if text == UNKNOWN else f"published, calibrated on {text}"
        style = {"mode": "markers", "marker": _marker(GRAY, 7, symbols[str(text)]), "name": name, "hoverinfo": "text"}
        traces.append(go.Scatter(x=rows.bits, y=rows.value, text=rows.method, hovertext=hover, **style))
    return traces


def _full_precision(
    results: Results, metric: str, ends: Sequence[float], models: pd.Series, *, is_vertical: bool = False
) -> list[go.Scatter]:
    """Return full precision as dashed lines that say their value, between two ends on the other axis."""
    full = results.of(metric)
    full = full[(full.kind == FULL) & full.model.isin(models)].drop_duplicates(["model", "value"])
    style = {"mode": "lines+text", "line": {"color": GRAY, "width": 1.5, "dash": "dash"}, "showlegend": False}
    traces = []
    for n, row in enumerate(full.itertuples()):
        text = f"full precision{f', {row.model}' if full.model.nunique() > 1 else ''} {metric_text(metric, row.value)}"
        value, texts = [row.value, row.value], [text, ""]
        # Nothing is better than full precision: beside an upright line, its label is on the side of the results.
        position = "top left" if is_vertical and better(metric) > 0 else "top right"
        if n % 2 and not is_vertical:  # those of two models may be close
            texts, position = ["", text], "top left"
        x, y = (value, ends) if is_vertical else (ends, value)
        traces.append(go.Scatter(x=x, y=y, text=texts, textposition=position, hoverinfo="none", **style))
    return traces


def _around(*values: pd.Series) -> list[float]:
    """Return two ends with some room around all values."""
    found = pd.concat(values)
    room = 0.04 * (found.max() - found.min()) or 0.04 * abs(found.max()) or 1.0
    return [found.min() - room, found.max() + room]


def _bars(frame: pd.DataFrame) -> dict[str, Any]:
    return {"type": "data", "symmetric": False, "array": frame.up, "arrayminus": frame.down}


def _marker(color: str, size: int, symbol: str = "circle") -> dict[str, Any]:
    return {"color": color, "size": size, "symbol": symbol}


def _hover(frame: pd.DataFrame) -> list[str]:
    """Return what is said of each result when one points at it."""
    texts = []
    for row in frame.itertuples():
        spread = spread_text(row.metric, row.low, row.high, row.standard_error)
        lines = [f"<b>{row.label}</b>", f"{row.metric} {metric_text(row.metric, row.value)} {spread}".strip()]
        if not np.isnan(row.bits):
            nominal = "" if np.isnan(row.nominal_bits) else f", {number_text(row.nominal_bits)} nominal"
            lines.append(f"{number_text(row.bits)} bits measured{nominal}")
        lines.append(f"calibration text: {row.calibration_text}")
        if len(row.runs) > 1:
            lines.append(f"seeds {row.seeds.replace(' ', ', ')}")
        if row.runs[0].run_dir is not None:
            lines.append("/".join(row.runs[0].run_dir.parts[-3:]))
        texts.append("<br>".join(lines))
    return texts


def _quantizers(results: Results) -> pd.Series:
    names = results.rows.method
    for suffix in reversed(TRAININGS.values()):
        names = names.str.removesuffix(suffix)
    return names


def _groups(results: Results, names: pd.Series, x: str) -> pd.Series:
    """Return what tells the results of one row apart: what differs between rows alone belongs to the row.

    But for the calibration text: of methods, each says on which, where it is not the same for all.
    """
    rows = results.config.groupby(names, sort=False)
    keys = dict.fromkeys(key for _, row in rows for key in differing_keys(row) if key != x)
    leads = {"method": _quantizers(results), "model": results.rows.model}
    several = [lead for key, lead in leads.items() if key != x and (lead.groupby(names).nunique() > 1).any()]
    if x == "method" and remark(results.rows):
        keys.pop("calib", None)
        several.append(results.rows.calibration_text.map(lambda text: "" if text == NO_TEXT else f"on {text}"))
    return describe(results.config, list(keys), several)
