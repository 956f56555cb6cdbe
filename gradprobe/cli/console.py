"""Where text goes: nothing that anyone wrote into a file or its name reaches a terminal but as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from gradprobe.foreign import visible

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 160
"""Columns of a table in a pipe or a file, where nobody folds it."""


class _Visible:
    """A text stream that hands on what a terminal can be given, see :func:`gradprobe.foreign.visible`.

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
        console.width = WIDE
    return console


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
