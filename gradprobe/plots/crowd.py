"""One quantity of many tasks over steps: a line each would need as many colours, so most stand back."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from gradprobe.display import short
from gradprobe.plots import series, style
from gradprobe.runfile import Run
from gradprobe.summary import crowd, median, quantiles

NAMED = 2
"""So many tasks at either end are drawn in colour and named."""


def trace(run: Run, ax: Axes, values: NDArray[Any]) -> list[NDArray[np.float32]]:
    """Every task's running median in grey, the middle half of the tasks as a band, the outermost named.

    Args:
        run: The run.
        ax: Where to draw.
        values: (n, T).

    Returns:
        T times what :func:`gradprobe.plots.series.running` gives.
    """
    steps, positive = run["step"], ax.get_yscale() == "log"
    spreads = [series.running(values[:, i], series.window(len(values))) for i in range(len(run.tasks))]
    lines = np.stack([spread[1] for spread in spreads], axis=1)
    if positive:
        lines = np.where(lines > 0, lines, np.nan)
    ax.plot(steps, lines, color="#BBBBBB", linewidth=0.6, gid="every task")
    low, middle, high = quantiles(lines, (0.25, 0.5, 0.75), axis=1)
    ax.fill_between(steps, low, high, color=style.GREY, alpha=0.25, linewidth=0)
    ax.plot(steps, middle, color="black", linewidth=1.6, label="median of the tasks")
    for colour, task in zip(style.TASK_COLOURS, outermost(values), strict=False):
        label = style.legend_text(short([run.tasks[task]], 20)[0])
        ax.plot(steps, lines[:, task], color=colour, linewidth=1.3, label=label)
    ax.legend(loc="best", fontsize=7, handlelength=1.2, ncols=2, columnspacing=1)
    return spreads


def outermost(values: NDArray[Any]) -> list[int]:
    """The tasks with the highest and the lowest median over all rows, :data:`NAMED` of each; (n, T)."""
    middle = median(values)
    if np.nanmax(middle, initial=-np.inf) <= np.nanmin(middle, initial=np.inf):
        return []  # all alike
    order = [int(i) for i in np.argsort(middle, kind="stable") if np.isfinite(middle[i])]
    return [*reversed(order[-NAMED:]), *order[: max(0, min(NAMED, len(order) - NAMED))]]


def reading(run: Run) -> str:
    """How to read a panel drawn with :func:`trace`."""
    return f"grey: each task, median of {series.window(len(run))} rows; black: median of {len(run.tasks)} tasks"


def many(run: Run) -> bool:
    """Whether a run's tasks are drawn so."""
    return crowd.many(run.tasks)
