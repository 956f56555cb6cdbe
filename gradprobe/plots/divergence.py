"""How two trainings part over steps: with a task and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from gradprobe.plots import style
from gradprobe.plots.figure import write_drawn
from gradprobe.plots.panels import PanelTable

__all__ = ["write"]


_Curves = Mapping[str, Sequence[float]]
"""Name -> displacement after each step; 0: bitwise equal."""

_LABEL = "displacement of the other tasks' parameters, relative"


def make(curves: _Curves, title: str) -> tuple[Figure, PanelTable]:
    """One line per curve on a logarithmic axis.

    Steps at which the trainings are bitwise equal have no place on it: they lie on its lower edge, marked so.

    Args:
        curves: Such as ``{"as it is": ..., "clipping": ...}``, the latter with every other open door held shut.
        title: The finding in a sentence.
    """
    with style.styled():
        figure = Figure(figsize=(9, 5), layout="constrained")
        ax = figure.add_subplot()
        values = {name: np.asarray(curve, dtype=np.float64) for name, curve in curves.items()}
        positive = [v[(v > 0) & np.isfinite(v)] for v in values.values()]
        seen = np.concatenate([*positive, np.zeros(0)])
        floor = 0.1 * float(seen.min()) if seen.size else 1e-9
        for place, (name, curve) in enumerate(values.items()):
            steps = np.arange(1, len(curve) + 1)
            # The first ones are wider, so that they show beneath those with the same values.
            width = 1.6 + 2.4 * (1 - (place + 1) / len(values))
            marker = "." if len(curve) < 60 else ""
            ax.plot(steps, np.where(curve > 0, curve, floor), marker=marker, linewidth=width, label=name)
        ax.set_yscale("log")
        ax.set_ylim(bottom=floor)
        style.log_axis(ax.yaxis, np.append(seen, floor))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set_xlabel("steps")
        ax.set_ylabel(_LABEL)
        if any((v == 0).any() for v in values.values()):
            ax.annotate("lower edge: bitwise equal", (0.01, 0.01), xycoords="axes fraction", color=style.GREY)
        ax.legend()
        figure.suptitle(title, wrap=True)
        return figure, _table(values)


def _table(values: Mapping[str, NDArray[np.float64]]) -> PanelTable:
    return PanelTable(
        {
            "curve": np.array([name for name, v in values.items() for _ in v], dtype=object),
            "step": np.concatenate([np.arange(1, len(v) + 1) for v in values.values()]),
        },
        {"displacement": np.concatenate(list(values.values()))},
    )


def write(curves: _Curves, title: str, out: Path) -> list[Path]:
    """Draw into a file, and write its numbers as CSV.

    Raises:
        UsageError: The format is unknown.
        RunFileError: ``out`` cannot be written.
    """
    figure, table = make(curves, title)
    return write_drawn(figure, table, out)
