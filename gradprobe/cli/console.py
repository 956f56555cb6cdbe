"""Text for a terminal: consoles to which names are text and no control, series as blocks, cosines as a matrix."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from gradprobe.foreign import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_WIDE = 160
"""Columns of a table in a pipe or a file, where nobody folds it."""


class _Visible:
    """A text stream that passes on what a terminal can be given, see :func:`gradprobe.foreign.visible`.

    All of a command goes through it: what it prints, warnings, log lines, and what is said of wrong flags.
    """

    def __init__(self, beneath: IO[str]) -> None:
        self.beneath = beneath

    def write(self, text: str) -> int:
        """Write text."""
        return self.beneath.write(visible(text))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.beneath, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Let stdout and stderr take text alone."""
    old = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Visible(stream) for stream in old)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = old


def stdout(*, soft_wrap: bool = False) -> Console:
    """As wide as the terminal; where there is none, and nobody says ``COLUMNS``, wide enough to split no word."""
    console = _console(soft_wrap=soft_wrap)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE
    return console


def number(value: float | None) -> str:
    """To four significant digits; a dash where there is none."""
    return "-" if value is None else f"{value:.4g}"


def titled_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> Table:
    """A table whose first columns hold ``names`` and whose others hold numbers, to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < names else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def stderr() -> Console:
    """For what is not the answer of a command."""
    return _console(stderr=True, soft_wrap=True)


def _console(**options: Any) -> Console:
    """A console that draws, and takes no word of a text for markup: neither brackets nor colons."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Drawing(Console):
        """Its own control sequences go to the terminal; text goes as :func:`visible` gives it."""

        @property
        def file(self) -> IO[str]:
            stream = super().file
            return getattr(stream, "beneath", stream)

        @file.setter
        def file(self, new: IO[str]) -> None:
            self._file = new

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else visible(text), style, control)

    return Drawing(highlight=False, markup=False, emoji=False, **options)


_SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Iterable[float | None], low: float | None = -1.0, high: float | None = 1.0) -> str:
    """A series between two bounds; what is missing is a space.

    Args:
        values: NaN and None are missing.
        low, high: The lowest and the highest block; None: the least and the greatest value.

    >>> sparkline([-1.0, 0.0, 1.0, None])
    '▁▅█ '
    >>> sparkline([5.0, 5.0], None, None)
    '▅▅'
    """
    series = [math.nan if value is None else value for value in values]
    known = [value for value in series if math.isfinite(value)]
    if not known:
        return " " * len(series)
    bottom, top = min(known) if low is None else low, max(known) if high is None else high
    return "".join(_block(value, bottom, top) if math.isfinite(value) else " " for value in series)


def _block(value: float, low: float, high: float) -> str:
    place = (value - low) / (high - low) if high > low else 0.5
    return _SPARKS[min(max(int(place * 8), 0), 7)]


_MARKS = ((-0.5, "█", "bright_red"), (-0.1, "-", "red"), (0.1, "·", "bright_black"), (0.5, "+", "blue"))
"""Upper ends of cosines, how they are drawn, and their colour; above the last: :data:`_HIGHEST`."""

_HIGHEST_MARK = ("#", "bright_blue")

MATRIX_LEGEND = (
    "cosine: █ below -0.5, - below -0.1, · about 0, + above 0.1, # above 0.5; columns in the order of the lines"
)

WIDEST_MATRIX = 64
"""Of more tasks no matrix is drawn: the lines would not fit."""


def cosine_lines(tasks: Sequence[str], medians: Mapping[str, float | None]) -> tuple[list[str], list[Text]]:
    """The tasks in clustered order, and each one's line of the matrix.

    Args:
        tasks: T names.
        medians: Of every pair, by its name, in stored order; None: not measured, which is drawn as a space.
    """
    import numpy as np

    from gradprobe.summary import many_tasks

    values = many_tasks.matrix([np.nan if v is None else v for v in medians.values()], len(tasks))
    order = many_tasks.clustered(values)
    shown = values[np.ix_(order, order)]
    return [tasks[i] for i in order], [_line(row.tolist(), place) for place, row in enumerate(shown)]


def named_line(name: str, width: int, line: Text) -> Text:
    """A task's line with its name before it, which is no markup."""
    from rich.text import Text

    return Text(f"{name:<{width}}  ", no_wrap=True, overflow="crop").append_text(line)


def _line(cosines: Sequence[float], own: int) -> Text:
    from rich.text import Text

    text = Text()
    for place, value in enumerate(cosines):
        text.append(*(("\\", "dim") if place == own else _cosine_mark(value)))
    return text


def _cosine_mark(cosine: float) -> tuple[str, str]:
    """How one cosine is drawn, and its colour.

    >>> [_cosine_mark(c)[0] for c in (-0.9, -0.3, 0.0, 0.3, 0.9, float("nan"))]
    ['█', '-', '·', '+', '#', ' ']
    """
    if cosine != cosine:
        return " ", ""
    return next(((mark, colour) for end, mark, colour in _MARKS if cosine < end), _HIGHEST_MARK)
