"""Figures of a run, each drawn from its file alone and with a tidy table of the numbers in it.

matplotlib is imported when one is drawn, so that the command line knows their names at no cost.
"""

from __future__ import annotations

from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradprobe.plots.figure import make, render, write

FORMATS = ("png", "svg", "pdf")

WHAT = tuple(
    sorted((module.name for module in iter_modules([str(Path(__file__).parent / "figures")])), key="overview".__ne__)
)
"""Names of the figures, the overview first: the files of :mod:`gradprobe.plots.figures`."""

__all__ = ["FORMATS", "WHAT", "make", "render", "write"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gradprobe.plots' has no attribute {name!r}")
    from gradprobe.plots import figure

    return getattr(figure, name)
