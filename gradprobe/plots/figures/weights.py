"""The weight of every task's loss."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradprobe.plots import panels, series, style
from gradprobe.plots.panels import PanelTable
from gradprobe.runfile import Run

TITLE = "Task weights in force"


def lacks(run: Run) -> str | None:
    """Why there is nothing to draw; None where there is."""
    if reason := style.no_rows(run):
        return reason
    if not np.isfinite(run["weight"]).any():
        return (
            f"no task weights in this run ({style.holdings(run)}). Record with --trainer gradnorm, or pass the "
            "weights to probe.record()"
        )
    return None


def page(run: Run, figure: Figure) -> PanelTable:
    return panels.single_panel(run, figure, draw, tasks=True)


def draw(run: Run, ax: Axes) -> PanelTable:
    """Every task's weight over training steps, as it was in force.

    Returns:
        step, epoch, task; weight.
    """
    weight, steps = run["weight"], run["step"]
    series.scale(ax, weight)
    if series.many(run):
        series.in_grey(run, ax, weight)
    else:
        _lines(run, ax, weight)
    if ax.get_yscale() == "linear":
        ax.set_ylim(bottom=min(0.0, float(np.nanmin(weight[np.isfinite(weight)]))))
    series.finish(ax, steps, weight)
    ax.set_ylabel("weight" + (" (log)" if ax.get_yscale() == "log" else ""))
    style.titled(ax, TITLE, series.silent(run.tasks, weight) or "they do not enter any cosine")
    return series.per_task(run, "weight", weight, [])


def _lines(run: Run, ax: Axes, weight: NDArray[Any]) -> None:
    for i, task in enumerate(run.tasks):
        ax.plot(
            run["step"],
            np.where(np.isfinite(weight[:, i]), weight[:, i], np.nan),
            color=style.task_colour(run.tasks, task),
            # The first ones are wider, so that they show beneath those with the same weights.
            linewidth=1.6 + 2.4 * (1 - (i + 1) / len(run.tasks)),
            marker="o" if len(run) == 1 else None,
            label=style.legend_text(task),
        )
