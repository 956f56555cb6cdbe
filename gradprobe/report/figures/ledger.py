"""The loss ledger as stacked bars: what each part of the update did to one task's loss, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradprobe.messages import Language
from gradprobe.report.bins import Array
from gradprobe.report.chart import Figure, Key, numbers
from gradprobe.report.look import axis, figure
from gradprobe.report.names import in_short


def parts(sources: Sequence[str], words: Language) -> list[Key]:
    """The segments: what an update of shared layers comes from, and the task's private layers. The legend, too."""
    names = {"weight decay": words("ledger.decay"), "earlier momentum": words("ledger.momentum")}
    shown = [Key(f"source {i}", names.get(s, s), f"@series{i % 8}", symbol="square") for i, s in enumerate(sources)]
    head = Key("head", words("ledger.head"), "@none", symbol="square")
    return [*shown, head, Key("change", words("ledger.change"), "@ink", symbol="diamond")]


def draw(arms: Sequence[str], segments: Array, change: Array, keys: Sequence[Key], words: Language) -> Figure:
    """One task's ledger.

    Args:
        arms: (A,) names.
        segments: (A, S + 1), mean over seeds of the change by each source and, last, the private layers.
        change: (A,), measured.
        keys: Of :func:`parts`.
        words: The language.
    """
    places = list(range(len(arms)))
    data = []
    for i, key in enumerate(keys[:-1]):
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": key.label,
                "legendgroup": key.group,
                "x": numbers(segments[:, i]),
                "y": places,
                "customdata": [words.signed(value) for value in segments[:, i]],
                "marker": {"color": key.colour, "line": {"color": "@surface", "width": 1}},
                "hovertemplate": "%{customdata}",
            }
        )
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": keys[-1].label,
            "legendgroup": keys[-1].group,
            "x": numbers(change),
            "y": places,
            "customdata": [words.signed(value) for value in change],
            "marker": {
                "color": keys[-1].colour,
                "symbol": "diamond",
                "size": 11,
                "line": {"color": "@surface", "width": 1.5},
            },
            "hovertemplate": "%{customdata}",
        }
    )
    y = axis(
        "",
        tickvals=places,
        ticktext=in_short(list(arms), 22),
        range=[len(arms) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    x = axis(words("ledger.axis"), zeroline=True, zerolinecolor="@ink", nticks=6)
    return figure(data, x, y, 80 + 46 * len(arms), barmode="relative", bargap=0.35, hovermode="closest")


def mean(values: Sequence[Array]) -> Array:
    """Over seeds, (...); NaN where no seed has a value."""
    stacked = np.stack(values)
    known = np.isfinite(stacked)
    with np.errstate(invalid="ignore"):
        result: Array = np.where(known, stacked, 0.0).sum(axis=0) / known.sum(axis=0)
    return result
