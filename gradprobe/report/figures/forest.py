"""Numbers with their intervals, one row each, the seeds' own values as dots; where it has one, the margin as a band."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradprobe.messages import Language
from gradprobe.report.chart import Figure, numbers
from gradprobe.report.figures.dots import thinned
from gradprobe.report.look import axis, figure

ROWS = 40
"""Drawn at most."""

_ROW_HEIGHT = 56
NAN = math.nan


@dataclass(frozen=True)
class Row:
    """One row. NaN: not there.

    Attributes:
        label: Above the interval, at the left.
        said: The same at the right, such as the verdict.
        group: What is hidden and shown together.
        colour, symbol: Of the marker.
        mean: Where the marker stands.
        low95, high95, low90, high90: Ends of the intervals.
        margin: Half the width of the band around 0.
        seeds: (n,).
    """

    label: str
    said: str
    group: str
    colour: str
    symbol: str
    mean: float
    low95: float = NAN
    high95: float = NAN
    low90: float = NAN
    high90: float = NAN
    margin: float = NAN
    seeds: Sequence[float] = ()


def draw(rows: Sequence[Row], words: Language, x_title: str) -> Figure:
    """The figure: names and verdicts stand above each interval, so that it fits a phone too."""
    data: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    shown = rows[:ROWS]
    for place, row in enumerate(shown):
        shapes += _frame(place, row)
        notes += [_text(place, row.label, "left", "@ink"), _text(place, row.said, "right", row.colour)]
        if math.isfinite(row.mean):
            data += _row(place, row, words)
        data += _seeds(place, row, words)
    y = axis(
        "",
        range=[len(shown) - 0.42, -0.5],
        showticklabels=False,
        showgrid=False,
        showline=False,
        ticks="",
        zeroline=False,
        fixedrange=True,
    )
    x = axis(x_title, zeroline=True, zerolinecolor="@ink", zerolinewidth=1.5, nticks=7, range=_range(shown))
    if not data:
        data = [{"type": "scatter", "x": [None], "y": [None], "hoverinfo": "skip"}]
    height = 60 + _ROW_HEIGHT * len(shown)
    return figure(data, x, y, height, annotations=notes, shapes=shapes, hovermode="closest")


def _range(rows: Sequence[Row]) -> list[float]:
    """All that is drawn, with room at both ends."""
    ends = [0.0]
    for row in rows:
        ends += [row.mean, row.low95, row.high95, row.low90, row.high90, -row.margin, row.margin, *row.seeds]
    known = [value for value in ends if math.isfinite(value)]
    low, high = min(known), max(known)
    room = 0.05 * (high - low) or 1.0
    return numbers([low - room, high + room])


def _text(place: int, text: str, side: str, colour: str) -> dict[str, Any]:
    return {
        "text": text,
        "x": 0 if side == "left" else 1,
        "xref": "paper",
        "xanchor": side,
        "y": place - 0.27,
        "yanchor": "middle",
        "showarrow": False,
        "bgcolor": "@surface/0.8",
        "borderpad": 1,
        "font": {"color": colour, "size": 12, **({"weight": 700} if side == "right" else {})},
    }


def _frame(place: int, row: Row) -> list[dict[str, Any]]:
    """The band of the margin behind the row, and a line above it."""
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": place - 0.5, "y1": place - 0.5}
    shapes: list[dict[str, Any]] = [{**line, "line": {"color": "@grid", "width": 1}, "layer": "below"}]
    if math.isfinite(row.margin):
        band = {"type": "rect", "x0": -row.margin, "x1": row.margin, "y0": place - 0.08, "y1": place + 0.5}
        shapes.append({**band, "fillcolor": "@band/0.14", "line": {"width": 0}, "layer": "below"})
    return shapes


def _row(place: int, row: Row, words: Language) -> list[dict[str, Any]]:
    """Interval at 95 % thin, at 90 % thick, and the mean."""
    common = _common(row)
    drawn = []
    for low, high, width in ((row.low95, row.high95, 1.5), (row.low90, row.high90, 5)):
        if math.isfinite(low) and math.isfinite(high):
            line = {"color": row.colour, "width": width}
            ends = {"x": numbers([low, high]), "y": [place + 0.12] * 2}
            drawn.append({**common, "mode": "lines", **ends, "line": line, "hoverinfo": "skip"})
    told = [row.label, row.said, *words.estimate(row.mean, row.low95, row.high95, signed=True), len(row.seeds)]
    edge = {"color": row.colour, "width": 2 * ("open" in row.symbol)}
    drawn.append(
        {
            **common,
            "mode": "markers",
            "x": numbers([row.mean]),
            "y": [place + 0.12],
            "customdata": [told],
            "marker": {"color": row.colour, "symbol": row.symbol, "size": 13, "line": edge},
            "hovertemplate": "%{customdata[0]}<br><b>%{customdata[1]}</b><br>"
            + words("forest.hover", effect="%{customdata[2]}", span="%{customdata[3]}", n="%{customdata[4]}")
            + "<extra></extra>",
        }
    )
    return drawn


def _seeds(place: int, row: Row, words: Language) -> list[dict[str, Any]]:
    """A dot for each seed that has a number, also where not all have one and there is no mean."""
    seeds = thinned(np.array([value for value in row.seeds if math.isfinite(value)]))
    if not len(seeds):
        return []
    return [
        {
            **_common(row),
            "mode": "markers",
            "x": numbers(seeds),
            "y": [place + 0.36] * len(seeds),
            "customdata": [words.signed(value) for value in seeds],
            "marker": {"color": "@soft/0.65", "size": 6},
            "hovertemplate": words("forest.seed", value="%{customdata}") + "<extra></extra>",
        }
    ]


def _common(row: Row) -> dict[str, Any]:
    return {"type": "scatter", "legendgroup": row.group, "name": row.label}
