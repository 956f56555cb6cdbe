"""Figures of a run, each drawn from its file alone and with a tidy table of the numbers in it.

One panel per file: ``lacks(run)`` says why there is nothing to draw, ``draw(run, ax)`` draws and returns the table.
"""

from gradprobe.plots.figure import FORMATS, WHAT, make, render, write

__all__ = ["FORMATS", "WHAT", "make", "render", "write"]
