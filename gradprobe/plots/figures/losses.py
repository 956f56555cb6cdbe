"""The unweighted training loss of every task."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradprobe.plots import panels, series, style
from gradprobe.plots.panels import PanelTable
from gradprobe.runfile import Run

TITLE = "Training loss, unweighted"


def lacks(run: Run) -> str | None:
    """Why there is nothing to draw; None where there is."""
    if reason := style.no_rows(run):
        return reason
    if not np.isfinite(run["loss"]).any():
        return f"no finite loss in this run ({style.holdings(run)}). Look at what the loss function returns"
    return None


def page(run: Run, figure: Figure) -> PanelTable:
    return panels.single_panel(run, figure, draw, tasks=True)


def draw(run: Run, ax: Axes) -> PanelTable:
    """Every task's loss over training steps.

    Returns:
        step, epoch, task; loss as recorded, and its running quartiles.
    """
    loss, steps = run["loss"], run["step"]
    series.scale(ax, loss)
    spreads = series.every_task(run, ax, loss)
    series.finish(ax, steps, loss)
    ax.set_ylabel("loss" + (" (log)" if ax.get_yscale() == "log" else ""))
    style.titled(ax, TITLE, series.silent(run.tasks, loss) or series.reading_of_tasks(run))
    return series.per_task(run, "loss", loss, spreads)
