"""A quantity over steps or epochs: a line per arm, and what its seeds span as a band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradprobe.display import logarithmic
from gradprobe.messages import Language
from gradprobe.report.bins import Array, band
from gradprobe.report.chart import Chart, Figure, NumberTable, numbers
from gradprobe.report.theme import Styles, axis, figure

_HEIGHT = 290
_TABLE_POINTS = 6


@dataclass(frozen=True)
class Series:
    """One arm's: x (B,), and values (seeds, B), NaN where there is none."""

    arm: str
    x: Array
    values: Array

    def known(self) -> tuple[Array, Array, Array, Array]:
        """x, lowest, mean, highest over seeds, where any seed has a value."""
        low, mean, high = band(self.values)
        has = np.isfinite(mean)
        return self.x[has], low[has], mean[has], high[has]


def draw(
    series: Sequence[Series],
    styles: Styles,
    x_title: str,
    y_title: str,
    *,
    within: tuple[float, float] | None = None,
    whole: bool = False,
) -> Figure:
    """The figure.

    Args:
        series: One per arm.
        styles: Colours of the arms.
        x_title, y_title: Titles of the axes.
        within: Limits of y, for a quantity that has some.
        whole: Whether x is counted in whole numbers, as epochs are.
    """
    data = []
    for one in series:
        x, low, mean, high = one.known()
        if len(one.values) > 1 and len(x):
            edge = {
                "x": numbers([*x, *x[::-1]]),
                "y": numbers([*high, *low[::-1]]),
                "fill": "toself",
                "fillcolor": f"{styles.colour(one.arm)}/0.16",
                "line": {"width": 0},
            }
            data.append({"type": "scatter", "mode": "lines", "hoverinfo": "skip", "legendgroup": one.arm, **edge})
    for one in sorted(series, key=lambda one: styles.dash(one.arm) != "solid"):  # a dashed line hides no solid one
        x, low, mean, high = one.known()
        data.append(
            {
                "type": "scatter",
                "mode": "lines" if len(x) > 1 else "markers",
                "name": one.arm,
                "legendgroup": one.arm,
                "x": numbers(x),
                "y": numbers(mean),
                "customdata": numbers(np.stack([low, high], axis=1)),
                "line": {"color": styles.colour(one.arm), "dash": styles.dash(one.arm), "width": 2},
                "marker": {"color": styles.colour(one.arm), "symbol": styles.symbol(one.arm), "size": 8},
                "hovertemplate": "%{y:.4~g}"
                + (" (%{customdata[0]:.4~g} … %{customdata[1]:.4~g})" if len(one.values) > 1 else ""),
            }
        )
    y = axis(y_title, **_scale(series, within))
    x_axis = axis(x_title, hoverformat=".0f", zeroline=False, nticks=6, **(_whole(series) if whole else {}))
    return figure(data, x_axis, y, _HEIGHT, hovermode="x unified")


def _whole(series: Sequence[Series]) -> dict[str, object]:
    """Ticks at whole numbers, for an axis of epochs."""
    last = max((one.x.max() for one in series if len(one.x)), default=1)
    return {"tick0": 0, "dtick": max(1, math.ceil(last / 6))}


def _scale(series: Sequence[Series], within: tuple[float, float] | None) -> dict[str, object]:
    if within is not None:
        return {"range": list(within)}
    known = np.concatenate([one.values[np.isfinite(one.values)] for one in series] or [np.zeros(0)])
    if logarithmic(known):
        if known.max() > 1000 * known.min():
            return {"type": "log", "dtick": 1, "exponentformat": "power"}
        return {"type": "log", "dtick": "D2", "tickformat": "~g"}  # else .5 is labelled 5
    return {"nticks": 6, **({"rangemode": "nonnegative"} if known.size and known.min() >= 0 else {})}


def chart(
    title: str, series: Sequence[Series], styles: Styles, words: Language, x_title: str, y_title: str, **axis: Any
) -> Chart:
    """The figure with what it shows in words, where each arm begins and ends; ``axis`` as for :func:`draw`."""
    parts = []
    for one in series:
        x, _, mean, _ = one.known()
        if len(x):
            ends = {"first": words.number(mean[0]), "last": words.number(mean[-1])}
            parts.append(words("lines.ends", arm=one.arm, **ends))
        else:
            parts.append(words("lines.nothing", arm=one.arm))
    text = words("lines.alt", title=title, x=x_title, said=words.join(parts))
    return Chart(title, draw(series, styles, x_title, y_title, **axis), text)


def table(caption: str, named: Mapping[str, Sequence[Series]], words: Language, x_title: str) -> NumberTable:
    """Mean and span over seeds at a few places of each series; ``named`` by task, pair or metric."""
    rows = []
    for title, series in named.items():
        for one in series:
            x, low, mean, high = one.known()
            for i in np.unique(np.linspace(0, len(x) - 1, _TABLE_POINTS).round().astype(int)) if len(x) else ():
                span = words.span(low[i], high[i]) if len(one.values) > 1 else ""
                rows.append([title, one.arm, words.number(x[i]), words.number(mean[i]), span])
    columns = [*words.columns("what", "arm"), x_title, *words.columns("mean", "seeds_span")]
    return NumberTable(caption, columns, rows, text=2)
