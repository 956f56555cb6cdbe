"""What the optimizer made of the gradients, compared with the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.plots import series, style
from gradprobe.plots.panels import PanelTable, stack
from gradprobe.runfile import Run, schema
from gradprobe.summary import shared_gram
from gradprobe.summary.numbers import CLIPPED, gradient_share, update_effect

_PAIRS = 3
"""Of all pairs of tasks, those with the lowest cosines are drawn; the table has all."""

_EARLIER_COLOURS = ("#9A9A9A", "#C9A227")

Line = tuple[str, str, NDArray[Any], NDArray[Any]]
"""Quantity, name, steps and values of one series."""


def lacks(run: Run) -> str | None:
    """Why there is nothing to draw; None where there is."""
    if not run.count(schema.UPDATES):
        return (
            f"no updates in this run ({style.holdings(run)}). Record with --updates, or attach with optimizer= and "
            "updates=True"
        )
    return None


def page(run: Run, figure: Figure) -> PanelTable:
    """Six panels: shares, cosines, effects; clipping, BatchNorm, skipped steps.

    Returns:
        step, quantity, name; value.
    """
    style.head(figure, run, tasks=False)
    figure.set_size_inches(15, 8.5)
    shares, cosines, effects, clip, drift, skipped = figure.subplots(2, 3).flat
    gram, weight = shared_gram(run), run["weight"].astype(np.float64)
    lines = [
        *_shares(run, shares, gradient_share(gram, weight)),
        *_cosines(run, cosines),
        *_effects(run, effects, measures.effect(gram, weight)),
        *_clipping(run, clip),
        *_drift(run, drift),
        *_skipped(run, skipped),
    ]
    figure.supxlabel(
        f"{series.reading(run)}; dashed: of the gradient, on the same parameters", fontsize=8, color=style.GREY
    )
    return stack([_table(*line) for line in lines])


def _shares(run: Run, ax: Axes, gradient: NDArray[Any]) -> Iterator[Line]:
    values, steps = run["update/shared_share"], run["update/step"]
    colours = [*(style.task_colour(run.tasks, task) for task in run.tasks), *_EARLIER_COLOURS]
    for i, (source, colour) in enumerate(zip(run.sources, colours, strict=True)):
        series.trace(ax, steps, values[:, i], colour, source)
        yield "share of update", source, steps, values[:, i]
    for i, task in enumerate(run.tasks):
        _dashed(ax, run["step"], gradient[:, i], colours[i])
        yield "share of gradient", task, run["step"], gradient[:, i]
    _done(run, ax, values, "Share of the update", "share; sums to 1", _unknown(run, values))


def _cosines(run: Run, ax: Axes) -> Iterator[Line]:
    values, steps, gradient = run["update/shared_cosine"], run["update/step"], run["shared_cosine"]
    shown = style.lowest_pairs(run, _PAIRS)
    ax.axhline(0, color=style.GREY, linewidth=0.9)
    for i, pair in enumerate(run.pairs):
        if i in shown:
            colour = style.PAIR_COLOURS[shown.index(i)]
            series.trace(ax, steps, values[:, i], colour, style.pair_title(run, i))
            _dashed(ax, run["step"], gradient[:, i], colour)
        yield "cosine of updates", pair, steps, values[:, i]
        yield "cosine of gradients", pair, run["step"], gradient[:, i]
    fewer = f"lowest {len(shown)} of {len(run.pairs)} pairs" if len(shown) < len(run.pairs) else ""
    _done(run, ax, values, "Cosine between the tasks' parts", "cosine", _unknown(run, values) or fewer)


def _effects(run: Run, ax: Axes, gradient: NDArray[Any]) -> Iterator[Line]:
    values, steps = update_effect(run), run["update/step"]
    ax.axhline(0, color=style.GREY, linewidth=0.9)
    ordered = [(i, j) for i in range(len(run.tasks)) for j in range(len(run.tasks)) if i != j]
    for place, (i, j) in enumerate(ordered):
        name = f"{run.tasks[j]} on {run.tasks[i]}"
        if place < len(style.PAIR_COLOURS):
            series.trace(ax, steps, values[:, i, j], style.PAIR_COLOURS[place], name)
            _dashed(ax, run["step"], gradient[:, i, j], style.PAIR_COLOURS[place])
        yield "effect in the update", name, steps, values[:, i, j]
        yield "effect in the gradient", name, run["step"], gradient[:, i, j]
    _bounded(ax, values, gradient)
    note = _unknown(run, values.reshape(len(values), -1)) or "below 0: cancels the other's own progress"
    _done(run, ax, values, "Effect on the other's progress, first order", "part of own progress", note)


def _clipping(run: Run, ax: Axes) -> Iterator[Line]:
    scale, without, steps = run["update/clip_scale"], run["update/clip_scale_without"], run["update/step"]
    yield "clip scale", "", steps, scale
    yield from (("clip scale without", task, steps, without[:, i]) for i, task in enumerate(run.tasks))
    yield from (
        ("part in the squared norm", task, steps, run["update/clip_share"][:, i]) for i, task in enumerate(run.tasks)
    )
    if not np.isfinite(scale).any():
        style.unavailable(ax, "Clip scale", "what was done to the gradient is not known at any step")
        return
    series.trace(ax, steps, scale, style.GREY, "as it was")
    for i, task in enumerate(run.tasks):
        if (without[:, i] < CLIPPED).any() or (scale < CLIPPED).any():
            _dashed(ax, steps, without[:, i], style.task_colour(run.tasks, task), f"without {task}")
    ax.set_ylim(bottom=0)
    never = "never clipped" if not (scale < CLIPPED).any() else "dashed: had the task been absent"
    _done(run, ax, scale, "Clip scale", "scale; 1: not clipped", never)


def _drift(run: Run, ax: Axes) -> Iterator[Line]:
    steps = run["update/step"]
    names = {"bn_mean_drift": "means", "bn_variance_drift": "log variances"}
    values = {field: run[f"update/{field}"] for field in (*names, "bn_batches")}
    yield from ((field.replace("_", " "), "", steps, series_) for field, series_ in values.items())
    if not any(np.isfinite(values[field]).any() for field in names):
        style.unavailable(ax, "BatchNorm's running statistics", "the model has no running statistics, or one row alone")
        return
    series.scale(ax, np.stack([values[field] for field in names]))
    for (field, name), colour in zip(names.items(), style.PAIR_COLOURS, strict=False):
        series.trace(ax, steps, values[field], colour, name)
    batches = values["bn_batches"][np.isfinite(values["bn_batches"])]
    note = f"batches averaged per step: median {np.median(batches):.3g}" if batches.size else ""
    _done(run, ax, values["bn_mean_drift"], "BatchNorm's running statistics", "change since the row before", note)


def _skipped(run: Run, ax: Axes) -> Iterator[Line]:
    steps, skipped = run["update/step"], run["update/skipped"]
    yield "skipped steps so far", "", steps, skipped
    if not skipped.any():
        style.unavailable(ax, "Steps that changed nothing", "none so far")
        return
    ax.step(steps, skipped, where="post", color=style.GREY)
    _done(run, ax, skipped, "Steps that changed nothing", "so far", "")


def _dashed(ax: Axes, steps: NDArray[Any], values: NDArray[Any], colour: str, label: str | None = None) -> None:
    middle = series.running(values, series.window(len(values)))[1]
    ax.plot(steps, middle, color=colour, linewidth=1.2, linestyle="--", label=label)


def _bounded(ax: Axes, *values: NDArray[Any]) -> None:
    """Ratios have outliers; the axis shows the middle 96 % of them, and 0."""
    known = np.concatenate([v[np.isfinite(v)] for v in values])
    known = known[known != 1.0]
    if known.size:
        low, high = np.quantile(known, [0.02, 0.98])
        room = 0.1 * max(high - low, 1e-3)
        ax.set_ylim(min(low, 0) - room, max(high, 0) + room)


def _unknown(run: Run, values: NDArray[Any]) -> str:
    return "" if np.isfinite(values).any() else "no update of this run was split by task"


def _done(run: Run, ax: Axes, values: NDArray[Any], title: str, label: str, note: str) -> None:
    series.finish(ax, run["update/step"], values)
    ax.set_ylabel(label)
    style.titled(ax, title, note)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="best", fontsize=7.5, handlelength=1.4)


def _table(quantity: str, name: str, steps: NDArray[Any], values: NDArray[Any]) -> PanelTable:
    index = {
        "step": steps,
        "quantity": np.full(len(steps), quantity, object),
        "name": np.full(len(steps), name, object),
    }
    return PanelTable(index, {"value": np.asarray(values, dtype=np.float64)})
