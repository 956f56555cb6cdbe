"""A number per run: a row per arm, a dot per seed, and their mean; with a line for a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradprobe.messages import Language
from gradprobe.report.bins import Array
from gradprobe.report.chart import Figure, in_short, numbers
from gradprobe.report.theme import Styles, axis, figure

SEEDS = 60
"""Dots of an arm at most; of more seeds, so many that are evenly spread in rank."""


@dataclass(frozen=True)
class Dots:
    """One arm's values, (seeds,).

    Attributes:
        arm: Its name.
        values: NaN: none.
        beyond: Where to put a seed that has none because it was not reached; NaN: nowhere.
    """

    arm: str
    values: Array
    beyond: float = float("nan")


def thinned(values: Array) -> Array:
    """At most :data:`SEEDS` values, lowest and highest among them."""
    if len(values) <= SEEDS:
        return values
    kept: Array = np.sort(values)[np.linspace(0, len(values) - 1, SEEDS).round().astype(int)]
    return kept


def draw(
    rows: Sequence[Dots], styles: Styles, words: Language, x_title: str, *, target: float | None = None, **x: Any
) -> Figure:
    """The figure; ``x`` are properties of the horizontal axis."""
    data = []
    for place, row in enumerate(rows):
        known = row.values[np.isfinite(row.values)]
        missed = len(row.values) - len(known)
        common = {"type": "scatter", "mode": "markers", "name": row.arm, "legendgroup": row.arm}
        colour, symbol = styles.colour(row.arm), styles.symbol(row.arm)
        shown = thinned(known)
        data.append(
            {
                **common,
                "x": numbers(shown),
                "y": [place + 0.14] * len(shown),
                "marker": {"color": f"{colour}/0.55", "size": 7, "symbol": symbol},
                "hovertemplate": words("dots.seed", value="%{x:.4~g}"),
            }
        )
        if len(known):
            data.append(
                {
                    **common,
                    "x": numbers([known.mean()]),
                    "y": [place - 0.14],
                    "marker": {
                        "color": colour,
                        "size": 13,
                        "symbol": symbol,
                        "line": {"color": "@surface", "width": 1},
                    },
                    "hovertemplate": words("dots.mean", value="%{x:.4~g}", n=len(known)),
                }
            )
        if missed and np.isfinite(row.beyond):
            data.append(
                {
                    **common,
                    "x": numbers([row.beyond]),
                    "y": [place + 0.14],
                    "mode": "markers",
                    "marker": {"color": colour, "size": 10, "symbol": "triangle-right-open"},
                    "hovertemplate": words("dots.missed", n=missed, step="%{x:.6~g}"),
                }
            )
    names = in_short([row.arm for row in rows], 22)
    y = axis(
        "",
        tickvals=list(range(len(rows))),
        ticktext=names,
        range=[len(rows) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return figure(
        data,
        axis(x_title, zeroline=False, nticks=6, **x),
        y,
        (50 if x_title else 30) + 34 * max(len(rows), 2), hovermode="closest",
        shapes=_target(target),
    )  # fmt: skip


def _target(value: float | None) -> list[dict[str, Any]]:
    if value is None:
        return []
    line = {"color": "@ink", "width": 1.5, "dash": "dash"}
    return [{"type": "line", "x0": value, "x1": value, "yref": "paper", "y0": 0, "y1": 1, "line": line}]
