"""Everything about one run on one page."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure, SubFigure

from gradprobe.plots import series, style
from gradprobe.plots.figures import cosine, features, heatmap, layers, losses, matrix, metrics, norms, weights
from gradprobe.plots.panels import PanelTable
from gradprobe.runfile import Run

_PAIRS = 3
"""Pairs of tasks in the cosine panel; the layer panels show one."""

_ROOM, _MATRIX_ROOM = 33, 44
"""Names of layers, and of tasks, that fit."""


def lacks(run: Run) -> str | None:
    """Nothing: a panel without data says why."""
    return None


def page(run: Run, figure: Figure) -> dict[str, PanelTable]:
    """Losses, weights, norms, cosine, metrics, and cosine by layer; a panel without data says why.

    Returns:
        The table of each panel that has data, by name.
    """
    many = series.many(run)  # their names need room
    figure.set_size_inches(14, 12.5 if many else 10)
    style.head(figure, run)
    # A row is a figure of its own, so that long layer names squeeze no other row.
    rows: Any = figure.subfigures(3, 1, height_ratios=(1, 1, 2.9 if many else 1.9))
    top, middle, bottom = rows
    return {**_tasks(run, top), **_cosine_and_metrics(run, middle), **_layers(run, bottom)}


def _tasks(run: Run, row: SubFigure) -> dict[str, PanelTable]:
    tables = {}
    panels = (("losses", losses), ("weights", weights), ("norms", norms))
    for (name, panel), ax in zip(panels, row.subplots(1, 3), strict=True):
        if reason := panel.lacks(run):
            style.unavailable(ax, panel.TITLE, reason)
        else:
            tables[name] = panel.draw(run, ax)
    return tables


def _cosine_and_metrics(run: Run, row: SubFigure) -> dict[str, PanelTable]:
    both = metrics.lacks(run) is None and all(metrics.groups(run))
    left, *right = row.subplots(1, 3 if both else 2, width_ratios=(1, 1, 1) if both else (1, 2))
    tables = {}
    reason = cosine.lacks(run)
    if reason and features.lacks(run) is None:
        tables["features"] = features.draw(run, left)
    elif reason:
        style.unavailable(left, "Cosine over all shared layers", reason)
    else:
        tables["cosine"] = cosine.draw(run, left, style.lowest_pairs(run, _PAIRS))
    if reason := metrics.lacks(run):
        style.unavailable(right[0], "Metrics per epoch", reason)
    else:
        tables["metrics"] = metrics.draw(run, right, gap=0.095)
    return tables


def _layers(run: Run, row: SubFigure) -> dict[str, PanelTable]:
    if reason := cosine.lacks(run):
        style.unavailable(row.subplots(), "Cosine and conflict by layer", reason)
        return {}
    pair = style.lowest_pairs(run, 1)[0]
    if series.many(run):
        first, left, right = row.subplots(1, 3, width_ratios=(1.5, 1.5, 0.9))
        tables = {"matrix": matrix.draw(run, first, _MATRIX_ROOM, square=False)}
    else:
        left, right = row.subplots(1, 2, width_ratios=(2.4, 1))
        tables = {}
    tables |= {
        "heatmap": heatmap.draw(run, left, pair, _ROOM),
        "layers": layers.draw(run, right, pair, _ROOM, named=False),
    }
    if series.many(run):
        right.set_title("Stochastic conflict rate of that pair\n")
    if len(run.pairs) > 1:
        left.set_title(f"Cosine by layer, {style.pair_title(run, pair)} (lowest of {len(run.pairs)} pairs)\n")
    return tables
