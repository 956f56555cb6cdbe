"""Makes a figure of a run by name, and writes it with its table. Works headless and in any thread."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter

from gradprobe import whole_files
from gradprobe.errors import GradprobeError, RunFileError, UsageError
from gradprobe.foreign import visible
from gradprobe.plots import FORMATS, WHAT, style
from gradprobe.plots.panels import PanelTable, long_csv
from gradprobe.runfile import Run, thin
from gradprobe.whole_files import target, telling

__all__ = ["write_drawn"]


_DPI = 150

_Page = Callable[[Run, Figure], PanelTable | Mapping[str, PanelTable | Mapping[str, Any]] | None]
"""Draws a run into a figure; returns the numbers in it: a table, or one for each panel by its name."""


def make(run: Run, what: str | _Page = "overview") -> tuple[Figure, dict[str, PanelTable]]:
    """One figure, and the table of each of its panels. Of a long run every k-th row is drawn, and the title says so.

    Args:
        run: Finished or not.
        what: One of :data:`gradprobe.plots.WHAT`; or a function of your own that draws a run into an empty matplotlib
            figure. It returns a table, tables by panel, or None; a table may be a dict of equally long columns.

    Returns:
        The figure, not shown and known to no window; tables by panel: one, named as ``what``, but for the overview.

    Raises:
        UsageError: There is no such figure; lists those there are. Or a function of your own failed, or returned
            something else.
        RunFileError: The run lacks what the figure shows; says what, and what the run holds. The overview is
            always drawn: its panels say it.
    """
    if isinstance(what, str):
        if what not in WHAT:
            raise UsageError(f"no figure {what!r}; --what takes one of: {', '.join(WHAT)}; or my_module:function.")
        module = import_module(f"gradprobe.plots.figures.{what}")
        page, lacks = module.page, module.lacks
    else:
        page, lacks = _guarded(what), lambda run: None
    run = thin.thin(run)
    with style.styled():
        figure = Figure(layout="constrained")
        if reason := lacks(run):
            raise RunFileError(f"{run.path}: {reason}.")
        drawn = page(run, figure)
    return figure, drawn if isinstance(drawn, dict) else {_name_of(what): drawn}


def _name_of(what: str | _Page) -> str:
    """The figure's name, as it is in file names."""
    return what if isinstance(what, str) else getattr(what, "__name__", type(what).__name__)


def _guarded(page: _Page) -> Callable[[Run, Figure], PanelTable | dict[str, PanelTable]]:
    """A function of the user's, whose failure says that it is theirs."""

    def guarded(run: Run, figure: Figure) -> PanelTable | dict[str, PanelTable]:
        try:
            drawn = page(run, figure)
            if not isinstance(drawn, Mapping):
                return _table(drawn)
            if any(isinstance(value, (PanelTable, Mapping)) for value in drawn.values()):
                return {str(name): _table(value) for name, value in drawn.items()}
            return _table(drawn)
        except GradprobeError:
            raise
        except Exception as error:
            raise UsageError(f"figure {_name_of(page)}: {type(error).__name__}: {error}") from error

    return guarded


def _table(drawn: Any) -> PanelTable:
    """What a user's function may return for one panel, as a table."""
    if drawn is None or isinstance(drawn, PanelTable):
        return drawn or PanelTable()
    columns = {str(name): np.atleast_1d(np.asarray(values)) for name, values in dict(drawn).items()}
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
        raise UsageError(f"the columns of a table differ in length: {lengths}.")
    return PanelTable(values=columns)


def write(run: Run, what: str | _Page, out: Path, *, data: bool = True) -> list[Path]:
    """Draw a figure into a file, and write its table as CSV.

    Args:
        run: The run.
        what: As for :func:`make`.
        out: Where the figure goes; its suffix is the format, one of :data:`gradprobe.plots.FORMATS`. Replaced if it
            exists.
        data: Whether to write the table, under the same name with the suffix ``.csv``: for one panel with that
            panel's columns, for several in long form (:data:`gradprobe.plots.panels.LONG`). None where it is empty.

    Returns:
        The paths of the files written.

    Raises:
        RunFileError: As :func:`make`; or ``out`` cannot be written.
        UsageError: As :func:`make`; or the format is unknown.
    """
    kind = _format_of(out)
    figure, tables = make(run, what)
    one = tables.get(_name_of(what))
    numbers = long_csv(tables) if one is None else one.csv() if one.columns else None
    return _write(out, render(figure, kind), numbers if data else None)


def write_drawn(figure: Figure, table: PanelTable, out: Path) -> list[Path]:
    """Write a figure that is drawn already, and its table as CSV; paths and errors as of :func:`write`."""
    kind = _format_of(out)
    return _write(out, render(figure, kind), table.csv())


def _format_of(out: Path) -> str:
    kind = out.suffix[1:].lower()
    if kind not in FORMATS:
        raise UsageError(f"{out}: no figure format {kind!r}; take one of: {', '.join(FORMATS)}.")
    return kind


def _write(out: Path, picture: bytes, numbers: str | None) -> list[Path]:
    """The picture and its numbers as CSV; neither where one of them cannot be written."""
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
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata=undated)
    return buffer.getvalue()


def _show_as_text(figure: Figure) -> None:
    """Of names that anyone gave, draw what can be seen."""
    for text in figure.findobj(Text):
        text.set_text(visible(text.get_text()))
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(fixed := axis.get_major_formatter(), FixedFormatter):
                fixed.seq = [visible(str(name)) for name in fixed.seq]
