"""How a figure fills its page: with one panel, or with one for each pair of tasks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradprobe.plots import crowd, style
from gradprobe.plots.table import Table, stack
from gradprobe.runfile import Run

PANELS = 6
"""Of the pairs of many tasks, so many get a panel; all of them are in the matrix."""

_DrawPair = Callable[[Run, Axes, int, int], Table]
"""Of a run into some axes: which pair of tasks, and how many names of layers fit."""


def single(run: Run, figure: Figure, draw: Callable[[Run, Axes], Table], *, tasks: bool = False) -> Table:
    """One panel.

    Args:
        run, figure: What is drawn, and where.
        draw: Draws the panel.
        tasks: Whether the tasks and their colours are named above it.
    """
    figure.set_size_inches(11, 6)
    style.head(figure, run, tasks=tasks)
    return draw(run, figure.add_subplot())


def of_pairs(run: Run, figure: Figure, title: str, draw: _DrawPair, *, by_layer: bool = True) -> Table:
    """A panel for each pair of tasks; of many tasks, for those with the lowest cosines.

    Args:
        run, figure: What is drawn, and where.
        title: Of the page, where it has several panels.
        draw: Draws one panel.
        by_layer: Whether layers go down the panels: then they get what their names need, up to what a screen can
            show, and share their names.
    """
    many = crowd.many(run)
    shown = style.lowest_pairs(run, PANELS) if many else list(range(len(run.pairs)))
    count = len(shown)
    across = count if count <= 3 else math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    tall = min(max(0.125 * len(run.layers) + 1.5, 4.0), 24.0 / down) if by_layer else (6.0 if down == 1 else 3.2)
    style.head(figure, run, tasks=False)
    figure.set_size_inches(min(24.0, 11 if across == 1 else 5.5 * across), tall * down)
    axes: list[Any] = list(figure.subplots(down, across, squeeze=False, sharey=by_layer).flat)
    for empty in axes[count:]:
        empty.remove()
    tables = []
    for place, (pair, ax) in enumerate(zip(shown, axes, strict=False)):
        tables.append(draw(run, ax, pair, int((tall - 1.3) / 0.125)))
        if count > 1:
            ax.set_title(f"{style.pair_title(run, pair)}\n")
        if place % across and by_layer:
            ax.set_ylabel("")
    if count > 1:
        of = f"lowest {count} of {len(run.pairs)}" if many else f"{count}"
        style.head(figure, run, f"{title} of {of} pairs", tasks=False)
    return stack(tables)
