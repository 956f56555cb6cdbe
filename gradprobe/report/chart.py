"""What a page is made of: sections of panels, tables and notices. Figures are plain dicts, as plotly.js takes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gradprobe.display import short
from gradprobe.foreign import LONGEST, clean, visible

Figure = dict[str, Any]
"""``{"data": [trace, ...], "layout": {...}}``. Colours are names of :data:`gradprobe.report.theme.LIGHT`, as "@ink"."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend: what belongs to ``group`` is shown and hidden together.

    Attributes:
        group: ``legendgroup`` of the traces.
        label: As it is read.
        colour: Such as "@series0".
        dash: "solid", "dash", "dot" or "dashdot".
        symbol: A marker of plotly's; empty: a line.
    """

    group: str
    label: str
    colour: str
    dash: str = "solid"
    symbol: str = ""


@dataclass(frozen=True)
class NumberTable:
    """Numbers in words.

    Attributes:
        caption: What it shows.
        columns: Titles.
        rows: Cells, as text.
        text: How many columns from the left hold names; the others hold numbers.
        note: Below it; empty: nothing.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """One drawing: its title, the figure, and what it shows for those who do not see it."""

    title: str
    figure: Figure
    alt: str


@dataclass(frozen=True)
class Panel:
    """Charts that are read together, with one legend, and the table that says the same.

    Attributes:
        title: What is shown.
        note: How to read it.
        charts: At least one.
        table: The same in numbers.
        legend: Common to the charts.
        size: What a chart takes of the width where there is enough of it: all, half or a third.
        scale: Whether colours stand for cosines, so that their scale is shown.
    """

    title: str
    note: str
    charts: Sequence[Chart]
    table: NumberTable
    legend: Sequence[Key] = ()
    size: Literal["wide", "half", "small"] = "half"
    scale: bool = False


@dataclass(frozen=True)
class Notice:
    """A sentence that must be seen: why something is not shown, or what is wrong.

    Attributes:
        kind: "missing": not recorded; "open": not answered; "warning"; "refusal".
        text: The sentence.
    """

    kind: Literal["missing", "open", "warning", "refusal"]
    text: str


@dataclass(frozen=True)
class Prose:
    """Paragraphs, or points."""

    paragraphs: Sequence[str]
    points: bool = False


Block = Panel | NumberTable | Notice | Prose


@dataclass(frozen=True)
class Section:
    """A part of the report under one heading."""

    key: str
    title: str
    lead: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def numbers(values: Iterable[Any], digits: int = 4) -> list[Any]:
    """Numbers for JSON, to so many significant digits, nested as they are; None: not there, or not finite.

    >>> numbers([1.23456, float("nan"), [2]])
    [1.235, None, [2]]
    """
    return [_number(v, digits) if np.ndim(v) == 0 else numbers(v, digits) for v in values]


def _number(value: Any, digits: int) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    if float(value).is_integer() and abs(value) < 1e15:
        return int(value)
    return float(f"{float(value):.{digits}g}")


_OURS = ("hovertemplate",)
"""Keys whose text is from the message catalogue alone, and may hold tags."""


def inert(figure: Any, key: str = "") -> Any:
    """The figure with all text as it is to be read.

    plotly.js takes ``<a href=...>``, ``<b>`` and entities in any text for markup, and a name may hold them. It may
    hold what turns or hides text, too.

    >>> inert({"name": "<b>&"})
    {'name': '&lt;b&gt;&amp;'}
    """
    if isinstance(figure, Mapping):
        return {name: inert(value, name) for name, value in figure.items()}
    if isinstance(figure, (list, tuple)):
        return [inert(value, key) for value in figure]
    if isinstance(figure, str) and key not in _OURS:
        return visible(figure).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return figure


def distinct(names: Sequence[object], limit: int = LONGEST) -> list[str]:
    """Clean names, no two alike: an axis of categories would lay those over each other.

    >>> distinct(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    seen: dict[str, int] = {}
    result = []
    for name in names:
        shown = clean(name, limit)
        seen[shown] = seen.get(shown, 0) + 1
        candidate = shown if seen[shown] == 1 else f"{shown} ({seen[shown]})"
        while candidate in result:
            seen[shown] += 1
            candidate = f"{shown} ({seen[shown]})"
        result.append(candidate)
    return result


def in_short(names: Sequence[str], limit: int = 24) -> list[str]:
    """Names of layers for a narrow axis, as of :func:`gradprobe.display.short`, no two alike.

    >>> in_short(["net.stem", "net.head"], limit=7)
    ['…stem', '…head']
    """
    return distinct(short(names, limit), limit)
