"""Makes a figure of a run by name, and writes it with its table. Works headless and in any thread."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter

from gradprobe import whole_files
from gradprobe.errors import RunFileError, UsageError
from gradprobe.foreign import visible
from gradprobe.plots import (
    cosine,
    crowd,
    features,
    heatmap,
    layers,
    losses,
    matrix,
    metrics,
    norms,
    overview,
    series,
    style,
    updates,
    weights,
)
from gradprobe.plots.table import Table, long_csv, stack
from gradprobe.runfile import Run, thin
from gradprobe.whole_files import target, telling


class TaskPanel(Protocol):
    """A module that draws one series per task into one pair of axes."""

    TITLE: str

    def lacks(self, run: Run) -> str | None:
        """Why there is nothing to draw; None where there is."""

    def draw(self, run: Run, ax: Axes) -> Table:
        """Draw, and return the numbers drawn."""


WHAT = (
    "overview",
    "losses",
    "weights",
    "norms",
    "cosine",
    "matrix",
    "heatmap",
    "layers",
    "features",
    "updates",
    "metrics",
)
FORMATS = ("png", "svg", "pdf")

DPI = 150
BY_TASK: dict[str, TaskPanel] = {"losses": losses, "weights": weights, "norms": norms}
MANY_PANELS = 6
"""Of the pairs of many tasks, so many get a panel; all of them are in the matrix."""

PAIR_TITLES = {
    "cosine": "cosine over all shared layers",
    "heatmap": "cosine by layer",
    "layers": "stochastic conflict rate by layer",
}


def make(run: Run, what: str = "overview") -> tuple[Figure, dict[str, Table]]:
    """One figure, and the table of each of its panels. Of a long run every k-th row is drawn, and the title says so.

    Args:
        run: Finished or not.
        what: One of :data:`WHAT`.

    Returns:
        The figure, not shown and known to no window; tables by panel: one, named as ``what``, but for the overview.

    Raises:
        UsageError: There is no such figure; lists those there are.
        RunFileError: The run lacks what the figure shows; says what, and what the run holds. The overview is
            always drawn: its panels say it.
    """
    if what not in WHAT:
        raise UsageError(f"no figure {what!r}; --what takes one of: {', '.join(WHAT)}.")
    run = thin.thin(run)
    with style.styled():
        figure = Figure(layout="constrained")
        if what == "overview":
            return figure, overview.draw(run, figure)
        reason = _lacks(run, what)
        if reason:
            raise RunFileError(f"{run.path}: {reason}.")
        style.head(figure, run, tasks=what in BY_TASK)
        return figure, {what: _single(run, figure, what)}


def write(run: Run, what: str, out: Path, *, data: bool = True) -> list[Path]:
    """Draw a figure into a file, and its table beside it.

    Args:
        run: The run.
        what: One of :data:`WHAT`.
        out: Where the figure goes; its suffix is the format, one of :data:`FORMATS`. Replaced if it exists.
        data: Whether to write the table, under the same name with the suffix ``.csv``: for one panel with that
            panel's columns, for the overview in long form (:data:`gradprobe.plots.table.LONG`).

    Returns:
        The paths of the files written.

    Raises:
        RunFileError: As :func:`make`; or ``out`` cannot be written.
        UsageError: As :func:`make`; or the format is unknown.
    """
    kind = out.suffix[1:].lower()
    if kind not in FORMATS:
        raise UsageError(f"{out}: no figure format {kind!r}; take one of: {', '.join(FORMATS)}.")
    figure, tables = make(run, what)
    numbers = (long_csv(tables) if what == "overview" else tables[what].csv()) if data else None
    return _write(out, render(figure, kind), numbers)


def write_drawn(figure: Figure, table: Table, out: Path) -> list[Path]:
    """Write a figure that is drawn already, and its table as CSV beside it; paths and errors as of :func:`write`."""
    kind = out.suffix[1:].lower()
    if kind not in FORMATS:
        raise UsageError(f"{out}: no figure format {kind!r}; take one of: {', '.join(FORMATS)}.")
    return _write(out, render(figure, kind), table.csv())


def _write(out: Path, picture: bytes, numbers: str | None) -> list[Path]:
    """The picture, and its numbers as CSV beside it; neither where one of them cannot be there."""
    contents: dict[Path, bytes | str] = {out: picture}
    if numbers is not None:
        contents[out.with_suffix(".csv")] = numbers
    for path in contents:
        with telling(path):
            target(path)
    for path, content in contents.items():
        with telling(path):
            whole_files.write(path, content)
    return list(contents)


def render(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a file; the same figure always gives the same bytes."""
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    buffer = io.BytesIO()
    _show_as_text(figure)
    with style.styled():
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=undated)
    return buffer.getvalue()


def _show_as_text(figure: Figure) -> None:
    """Of names that anyone gave, draw what can be seen."""
    for text in figure.findobj(Text):
        text.set_text(visible(text.get_text()))
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(fixed := axis.get_major_formatter(), FixedFormatter):
                fixed.seq = [visible(str(name)) for name in fixed.seq]


def _lacks(run: Run, what: str) -> str | None:
    if what in BY_TASK:
        return BY_TASK[what].lacks(run)
    lacks = {"metrics": metrics.lacks, "features": features.lacks, "updates": updates.lacks}.get(what, cosine.lacks)
    return lacks(run)


def _single(run: Run, figure: Figure, what: str) -> Table:
    figure.set_size_inches(11, 6)
    if what in BY_TASK:
        return BY_TASK[what].draw(run, figure.add_subplot())
    if what == "features":
        return features.draw(run, figure.add_subplot())
    if what == "matrix" or (what == "cosine" and crowd.many(run)):
        return _tasks_by_tasks(run, figure, what)
    if what == "updates":
        return updates.draw(run, figure)
    if what == "metrics":
        count = 2 if all(metrics.groups(run)) else 1
        return metrics.draw(run, list(figure.subplots(1, count, squeeze=False).flat), gap=0.04)
    return _pair_panels(run, figure, what)


def _tasks_by_tasks(run: Run, figure: Figure, what: str) -> Table:
    """All pairs as one matrix; beside it, where cosines were asked for, those of the lowest pairs over steps."""
    side = min(16.0, max(6.0, 0.16 * len(run.tasks) + 2))
    figure.set_size_inches(side + (8 if what == "cosine" else 1), side)
    room = int((side - 2) / 0.085)
    if what == "matrix":
        return matrix.draw(run, figure.add_subplot(), room)
    left, right = figure.subplots(1, 2, width_ratios=(side, 7))
    table = matrix.draw(run, left, room)
    cosine.draw(run, right, style.lowest_pairs(run, len(style.PAIR_COLOURS)))
    return table


def _pair_panels(run: Run, figure: Figure, what: str) -> Table:
    """One panel per pair of tasks, all on the same scales; of many tasks, of those with the lowest cosines."""
    many = crowd.many(run)
    shown = style.lowest_pairs(run, MANY_PANELS) if many else list(range(len(run.pairs)))
    count = len(shown)
    across = count if count <= 3 else math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    tall = _height(run, what, down)
    figure.set_size_inches(min(24.0, 11 if across == 1 else 5.5 * across), tall * down)
    axes = figure.subplots(down, across, squeeze=False, sharey=what != "cosine")
    room = int((tall - 1.3) / 0.125)
    tables = []
    for place, ax in enumerate(axes.flat):
        if place >= count:
            ax.remove()
            continue
        pair = shown[place]
        tables.append(_pair_panel(run, ax, what, pair, room))
        if count > 1:
            ax.set_title(f"{style.pair_title(run, pair)}\n")
        if place % across and what != "cosine":
            ax.set_ylabel("")
    if what == "cosine":
        figure.supxlabel(series.reading(run), fontsize=8, color=style.GREY)
    if count > 1:
        if what == "heatmap":
            heatmap.add_colorbar(figure.axes)
        of = f"lowest {count} of {len(run.pairs)}" if many else f"{count}"
        style.head(figure, run, f"{PAIR_TITLES[what]} of {of} pairs", tasks=False)
    return stack(tables)


def _height(run: Run, what: str, down: int) -> float:
    """Inches per panel: layers get what their names need, up to what a screen can show."""
    if what == "cosine":
        return 6.0 if down == 1 else 3.2
    return min(max(0.125 * len(run.layers) + 1.5, 4.0), 24.0 / down)


def _pair_panel(run: Run, ax: Axes, what: str, pair: int, room: int) -> Table:
    if what == "cosine":
        return cosine.draw(run, ax, [pair])
    if what == "layers":
        return layers.draw(run, ax, pair, room)
    return heatmap.draw(run, ax, pair, room, colorbar=len(run.pairs) == 1)
