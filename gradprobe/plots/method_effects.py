"""What other methods would have changed at the recorded steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradprobe.plots import style
from gradprobe.plots.panels import PanelTable
from gradprobe.runfile import Run
from gradprobe.verdict.replayed import Replayed

__all__ = ["draw"]


def draw(run: Run, replayed: Sequence[Replayed]) -> tuple[Figure, PanelTable]:
    """Left each task's progress under each method (median and middle half), right how often a step would harm it.

    Returns:
        The figure, and step, method, task; weight, progress.
    """
    with style.styled():
        figure = Figure(figsize=(11, 1.6 + 0.5 * len(replayed)), layout="constrained")
        style.head(figure, run, "replay")
        left, right = figure.subplots(1, 2, sharey=True)
        for t, task in enumerate(run.tasks):
            _task(left, right, replayed, t, style.task_colour(run.tasks, task), len(run.tasks))
        left.set_xscale("symlog", linthresh=2)  # a small task's progress can be many times its own, the other's is 1
        left.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        left.axvline(0, color=style.GREY, linewidth=0.8)
        left.axvline(1, color=style.GREY, linewidth=0.8, linestyle=":")
        left.set_yticks(range(len(replayed)), [one.method for one in replayed])
        left.invert_yaxis()
        left.set_xlabel("first-order progress; 1 (dotted): as if the other tasks were absent")
        right.set_xlabel("share of steps that would harm the task")
        right.set_xlim(-0.02, 1.02)
        style.titled(left, "Progress", "median and middle half of the steps; logarithmic beyond -2 and 2")
        style.titled(right, "Harm", "progress below 0, to first order on the same minibatch")
    return figure, _numbers(run, replayed)


def _task(left: Axes, right: Axes, replayed: Sequence[Replayed], t: int, colour: str, tasks: int) -> None:
    for place, one in enumerate(replayed):
        values = one.progress[:, t][np.isfinite(one.progress[:, t])]
        if not len(values):
            continue
        y = place + 0.5 * ((t + 0.5) / tasks - 0.5)
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        left.plot([low, high], [y, y], color=colour, linewidth=2)
        left.plot([middle], [y], "o", color=colour, markersize=4)
        right.plot([one.harmed[t]], [y], "o", color=colour, markersize=5)


def _numbers(run: Run, replayed: Sequence[Replayed]) -> PanelTable:
    rows, tasks = len(run), len(run.tasks)
    count = len(replayed)
    index = {
        "step": np.tile(np.repeat(run["step"], tasks), count),
        "method": np.repeat([one.method for one in replayed], rows * tasks),
        "task": np.tile(np.array(run.tasks, dtype=object), rows * count),
    }
    values = {
        "weight": np.concatenate([one.weight.ravel() for one in replayed]),
        "progress": np.concatenate([one.progress.ravel() for one in replayed]),
    }
    return PanelTable(index, values)
