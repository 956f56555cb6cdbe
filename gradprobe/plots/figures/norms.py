"""The length of every task's gradient over all shared layers it reaches."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradprobe.plots import panels, series, style
from gradprobe.plots.panels import PanelTable
from gradprobe.runfile import Run

TITLE = "Gradient norm over the shared layers"


def lacks(run: Run) -> str | None:
    """Why there is nothing to draw; None where there is."""
    if reason := style.no_rows(run):
        return reason
    norm = run["shared_grad_norm"]
    if not len(run.layers):
        return f"no gradient norms in this run: {style.why_no_layers(run)} ({style.holdings(run)})"
    if not np.isfinite(norm).any():
        return f"no row of this run holds a finite gradient norm ({style.holdings(run)}){style.why_not_measured(run)}"
    if not (norm[np.isfinite(norm)] > 0).any():
        return f"every gradient of this run is exactly zero ({style.holdings(run)}). Are the losses detached?"
    return None


def page(run: Run, figure: Figure) -> PanelTable:
    return panels.single_panel(run, figure, draw, tasks=True)


def draw(run: Run, ax: Axes) -> PanelTable:
    """Every task's gradient norm over training steps, on a logarithmic axis.

    Returns:
        step, epoch, task; grad_norm in loss per unit of parameter, and its running quartiles.
    """
    norm, steps = run["shared_grad_norm"], run["step"]
    ax.set_yscale("log")
    spreads = series.every_task(run, ax, norm)
    series.finish(ax, steps, norm)
    ax.set_ylabel("norm (log)\nin loss per unit of parameter", fontsize=8)
    note = series.silent(run.tasks, norm) or _zeros(run.tasks, norm) or series.reading_of_tasks(run)
    style.titled(ax, TITLE, note)
    return series.per_task(run, "grad_norm", norm, spreads)


def _zeros(tasks: tuple[str, ...], norm: NDArray[np.float32]) -> str:
    """A logarithmic axis cannot show 0, so the note says where there are some."""
    counts = {task: int(n) for task, n in zip(tasks, (norm == 0).sum(axis=0), strict=True) if n}
    if not counts:
        return ""
    return "exactly 0, not drawn: " + ", ".join(f"{task} in {n} rows" for task, n in counts.items())
