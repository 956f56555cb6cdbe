"""The panels of a figure, one or one for each pair of tasks, and the numbers in them as tidy tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradprobe.foreign import cell
from gradprobe.plots import style
from gradprobe.runfile import Run
from gradprobe.summary import many_tasks

LONG = ("panel", "step", "epoch", "layer", "series", "quantity", "value")
"""Columns of several tables put together; ``layer`` may be a feature, ``series`` is a task, a pair or a metric."""


@dataclass(frozen=True)
class PanelTable:
    """Columns of equal length.

    Attributes:
        index: What an observation belongs to: "step", "epoch", "layer", and the series ("task", "pair",
            "metric").
        values: What was observed, numbers. NaN: not there, an empty cell in the CSV.
    """

    index: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    values: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """All columns by name, those of the index first."""
        return {**self.index, **self.values}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def csv(self) -> str:
        """The table as CSV with a header line; numbers in the fewest digits that give them back exactly."""
        return _csv(tuple(self.columns), zip(*map(_cells, self.columns.values()), strict=True))


def stack(tables: Sequence[PanelTable]) -> PanelTable:
    """Tables with the same columns below each other; an empty table where there are none."""
    filled = [table for table in tables if len(table)]
    if not filled:
        return tables[0] if tables else PanelTable()
    return PanelTable(
        {k: np.concatenate([t.index[k] for t in filled]) for k in filled[0].index},
        {k: np.concatenate([t.values[k] for t in filled]) for k in filled[0].values},
    )


def long_csv(tables: Mapping[str, PanelTable]) -> str:
    """Tables of several panels as one CSV with the columns :data:`LONG`."""
    rows: list[tuple[str, ...]] = []
    for panel, table in tables.items():
        cells = {name: _cells(values) for name, values in table.index.items()}
        blank = [""] * len(table)
        series = next((v for k, v in cells.items() if k in ("task", "pair", "metric")), blank)
        place = cells.get("layer", cells.get("feature", blank))
        fixed = [*(cells.get(name, blank) for name in ("step", "epoch")), place]
        for quantity, values in table.values.items():
            rows += zip([panel] * len(table), *fixed, series, [quantity] * len(table), _cells(values), strict=True)
    return _csv(LONG, rows)


def _cells(values: NDArray[Any]) -> list[str]:
    # str() of a numpy number is the shortest text that gives the number back in its own precision.
    return ["" if isinstance(v, np.floating) and np.isnan(v) else str(v) for v in values]


def _csv(header: Sequence[str], rows: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(cell, header))
    writer.writerows(map(cell, row) for row in rows)
    return text.getvalue()


_PANELS = 6
"""Of the pairs of many tasks, so many get a panel; all of them are in the matrix."""

_DrawPair = Callable[[Run, Axes, int, int], PanelTable]
"""Of a run into some axes: which pair of tasks, and how many names of layers fit."""


def single_panel(
    run: Run, figure: Figure, draw: Callable[[Run, Axes], PanelTable], *, tasks: bool = False
) -> PanelTable:
    """One panel.

    Args:
        run, figure: What is drawn, and where.
        draw: Draws the panel.
        tasks: Whether the tasks and their colours are named above it.
    """
    figure.set_size_inches(11, 6)
    style.head(figure, run, tasks=tasks)
    return draw(run, figure.add_subplot())


def pair_panels(run: Run, figure: Figure, title: str, draw: _DrawPair, *, by_layer: bool = True) -> PanelTable:
    """A panel for each pair of tasks; of many tasks, for those with the lowest cosines.

    Args:
        run, figure: What is drawn, and where.
        title: Of the page, where it has several panels.
        draw: Draws one panel.
        by_layer: Whether layers go down the panels: then they get what their names need, up to what a screen can
            show, and share their names.
    """
    many = many_tasks.many(run.tasks)
    shown = style.lowest_pairs(run, _PANELS) if many else list(range(len(run.pairs)))
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
