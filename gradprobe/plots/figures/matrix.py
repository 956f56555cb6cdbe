"""The cosine between every two tasks as one matrix, in which tasks that pull together stand together."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradprobe.display import short
from gradprobe.measures import pair_index
from gradprobe.plots import style
from gradprobe.plots.panels import PanelTable
from gradprobe.plots.style import MAP, MISSING, add_colorbar
from gradprobe.plots.style import no_cosines as lacks
from gradprobe.runfile import Run
from gradprobe.summary import conflict_rate, many_tasks, median

__all__ = ["TITLE", "draw", "lacks", "order", "page"]

TITLE = "Cosine over all shared layers, median over steps"

_WRITTEN = 10
"""Up to so many tasks have their numbers in the cells."""


def order(run: Run) -> NDArray[np.intp]:
    """(T,) the tasks as they stand along both axes."""
    return many_tasks.clustered(_medians(run))


def page(run: Run, figure: Figure) -> PanelTable:
    ax, _, room = matrix_axes(run, figure, 1)
    return draw(run, ax, room)


def matrix_axes(run: Run, figure: Figure, more: float) -> tuple[Axes, Any, int]:
    """Axes for the matrix that grow with the number of tasks, and others to its right.

    Args:
        run, figure: What is drawn, and where.
        more: Inches beside it; axes there only where a panel fits.

    Returns:
        Both axes (None: no panel fits), and how many names fit along the matrix.
    """
    side = min(16.0, max(6.0, 0.16 * len(run.tasks) + 2))
    style.head(figure, run, tasks=False)
    figure.set_size_inches(side + more, side)
    left, right = figure.subplots(1, 2, width_ratios=(side, more - 1)) if more > 2 else (figure.add_subplot(), None)
    return left, right, int((side - 2) / 0.085)


def draw(run: Run, ax: Axes, room: int = 50, square: bool = True) -> PanelTable:
    """The median cosine of every two tasks, the tasks in clustered order.

    Args:
        run: The run.
        ax: Where to draw.
        room: How many names fit along an axis.
        square: Whether cells are, with the scale beside them; else they fill ``ax``, beside a heatmap with a scale.

    Returns:
        pair; cosine (median), stochastic_conflict_rate, steps (measured). All pairs.
    """
    values, places = _medians(run), order(run)
    shown = values[np.ix_(places, places)]
    count = len(places)
    ax.imshow(shown, cmap=MAP, vmin=-1, vmax=1, interpolation="nearest", aspect="equal" if square else "auto")
    _mark_missing(ax, shown)
    names, every = short([run.tasks[i] for i in places], 18), max(1, -(-count // max(room, 1)))
    ticks = list(range(0, count, every))
    size = 8 if count <= 12 else max(4.5, min(7.5, 220 / count))
    ax.set_xticks(ticks, [names[i] for i in ticks], rotation=90, fontsize=size)
    ax.set_yticks(ticks, [names[i] for i in ticks], fontsize=size)
    ax.grid(False)
    if count <= _WRITTEN:
        _write(ax, shown)
    if square:
        add_colorbar([ax])
    some = "" if every == 1 else f"; every {every}. named"
    style.titled(ax, TITLE, f"{len(run.pairs)} pairs of {count} tasks, ordered by average linkage{some}")
    cosine = run["shared_cosine"]
    return PanelTable(
        {"pair": np.array(run.pairs, dtype=object)},
        {
            "cosine": median(cosine),
            "stochastic_conflict_rate": conflict_rate(cosine),
            "steps": np.isfinite(cosine).sum(axis=0),
        },
    )


def _medians(run: Run) -> NDArray[np.float64]:
    return many_tasks.matrix(median(run["shared_cosine"]), len(run.tasks))


def _mark_missing(ax: Axes, shown: NDArray[np.float64]) -> None:
    """A pair that was never measured is hatched; the diagonal is grey, as it says nothing."""
    look: dict[str, Any] = {"facecolor": "white", "edgecolor": "#AAAAAA", "hatch": MISSING, "linewidth": 0}
    for row, column in np.argwhere(np.isnan(shown)):
        if row == column:
            ax.broken_barh([(column - 0.5, 1)], (row - 0.5, 1), facecolor=style.PALE, linewidth=0)
        else:
            ax.broken_barh([(column - 0.5, 1)], (row - 0.5, 1), gid="never measured", **look)
    ax.set(xlim=(-0.5, len(shown) - 0.5), ylim=(len(shown) - 0.5, -0.5))


def _write(ax: Axes, shown: NDArray[np.float64]) -> None:
    for row, column in zip(*pair_index(len(shown)), strict=True):
        value = shown[row, column]
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.6 else "black"
            for x, y in ((column, row), (row, column)):
                ax.text(x, y, f"{value:+.2f}", ha="center", va="center", fontsize=7.5, color=colour)
