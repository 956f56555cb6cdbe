"""Colours of a report, light and dark, and what every figure has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradprobe.report.chart import Figure

# Okabe & Ito's colour-blind-safe hues, each as dark (as light) as its page needs for a contrast of 3 or more.
LIGHT = {
    "page": "#f6f7f9",
    "surface": "#ffffff",
    "raised": "#eef1f5",
    "ink": "#16202c",
    "soft": "#4a5868",
    "line": "#ccd4de",
    "grid": "#e4e9ef",
    "link": "#0b5cad",
    "baseline": "#5a6675",
    "series0": "#0072b2",
    "series1": "#c24e00",
    "series2": "#00805c",
    "series3": "#a8468c",
    "series4": "#7a6a00",
    "series5": "#5b4bb5",
    "series6": "#9c2f3d",
    "series7": "#00788a",
    "reduced": "#00715a",
    "increased": "#b3261e",
    "same": "#3a5f95",
    "open": "#80610a",
    "none": "#5a6675",
    "band": "#0b5cad",
    "minus": "#b2182b",
    "minus2": "#ef9a80",
    "zero": "#f4f4f2",
    "plus2": "#86b8dc",
    "plus": "#17578f",
}
DARK = {
    "page": "#0f1419",
    "surface": "#171d24",
    "raised": "#212932",
    "ink": "#e8edf3",
    "soft": "#aab6c3",
    "line": "#3a4653",
    "grid": "#2a333d",
    "link": "#7cbcff",
    "baseline": "#9aa7b5",
    "series0": "#5ab4ee",
    "series1": "#f5934e",
    "series2": "#41c79c",
    "series3": "#e592c9",
    "series4": "#d9c54a",
    "series5": "#a99bf2",
    "series6": "#f08792",
    "series7": "#4fc6d6",
    "reduced": "#4fd0ab",
    "increased": "#ff8a7d",
    "same": "#8fb7f0",
    "open": "#e3be58",
    "none": "#9aa7b5",
    "band": "#7cbcff",
    "minus": "#ff7a66",
    "minus2": "#a8493d",
    "zero": "#262e37",
    "plus2": "#3d77aa",
    "plus": "#79bdf7",
}
SERIES = 8
DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon", "star")

DIVERGING = [[0, "@minus"], [0.25, "@minus2"], [0.5, "@zero"], [0.75, "@plus2"], [1, "@plus"]]


class Styles:
    """The look of each arm, the same in every figure: the baseline in grey, the others in colours.

    Controls are dashed. Beyond eight arms the colours come round again with another dash.
    """

    def __init__(self, arms: list[str], baseline: str | None, controls: Sequence[str] = ()) -> None:
        self.baseline = baseline
        self.controls = controls
        self.order = [arm for arm in arms if arm != baseline]

    def colour(self, arm: str) -> str:
        """Such as "@series0"."""
        return "@baseline" if arm == self.baseline else f"@series{self._place(arm) % SERIES}"

    def dash(self, arm: str) -> str:
        """One of :data:`DASHES`."""
        if arm == self.baseline:
            return "solid"
        return DASHES[(self._place(arm) // SERIES + (arm in self.controls)) % len(DASHES)]

    def symbol(self, arm: str) -> str:
        """One of :data:`_SYMBOLS`."""
        return "circle" if arm == self.baseline else _SYMBOLS[(1 + self._place(arm)) % len(_SYMBOLS)]

    def _place(self, arm: str) -> int:
        """Those that are not drawn, because there are too many, come after the others."""
        return self.order.index(arm) if arm in self.order else len(self.order)


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """An axis in the colours of the page."""
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "@grid",
        "linecolor": "@line",
        "zerolinecolor": "@line",
        "tickcolor": "@line",
        "automargin": True,
        **more,
    }


def figure(data: list[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], height: int, **layout: Any) -> Figure:
    """A figure without title and legend: the page has them, as text that can be read and pressed."""
    return {
        "data": data,
        "layout": {
            "height": height,
            "margin": {"l": 12, "r": 12, "t": 10, "b": 12},
            "showlegend": False,
            "paper_bgcolor": "@surface",
            "plot_bgcolor": "@surface",
            "font": {"color": "@ink", "size": 12},
            "hoverlabel": {"bgcolor": "@raised", "bordercolor": "@line", "font": {"color": "@ink"}, "namelength": -1},
            "xaxis": x,
            "yaxis": y,
            **layout,
        },
    }
