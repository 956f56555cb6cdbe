"""The cosine between two tasks' gradients over all shared layers together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from gradprobe.plots import series, style
from gradprobe.plots.table import Table, stack
from gradprobe.runfile import Run, thin
from gradprobe.summary import conflict_rate, median

WIDE = 45
"""Names of so many letters do not fit beside each other."""

LIMITS = (0.1, 0.25, 0.5, 0.75, 1.0)


def lacks(run: Run) -> str | None:
    """Why there is nothing to draw; None where there is. Holds for every panel made of cosines."""
    held = style.holdings(run)
    if len(run.tasks) < 2:
        return f"no cosines in this run: a cosine needs two tasks, it has {len(run.tasks)} ({held})"
    if not len(run.layers):
        return f"no cosines in this run: {style.why_no_layers(run)} ({held})"
    if reason := style.no_rows(run):
        return reason
    if not np.isfinite(run["cosine"]).any():
        return (
            f"no row of this run holds a cosine: gradients are zero, missing or not finite in all of them "
            f"({held}){style.why_not_measured(run)}"
        )
    return None


def draw(run: Run, ax: Axes, pairs: Sequence[int] = (0,)) -> Table:
    """The cosines of some pairs of tasks over training steps: running median, spread, raw points.

    Args:
        run: The run.
        ax: Where to draw.
        pairs: Indices of at most three pairs.

    Returns:
        step, epoch, pair; cosine, and its running quartiles.
    """
    cosine, steps, tables = run["shared_cosine"], run["step"], []
    ax.axhline(0, color=style.GREY, linewidth=0.9)
    for place, pair in enumerate(pairs):
        spread = series.trace(ax, steps, cosine[:, pair], style.PAIR_COLOURS[place], style.pair_title(run, pair))
        tables.append(series.series_table(run, "pair", run.pairs[pair], "cosine", cosine[:, pair], spread))
    # From all pairs, so that the panels of one run have one scale.
    bound(ax, cosine)
    series.finish(ax, steps, cosine)
    ax.set_ylabel("cosine")
    style.titled(ax, _title(run, pairs), _note(run, pairs))
    if len(pairs) > 1:
        wide = sum(len(run.pairs[pair]) for pair in pairs) > WIDE
        ax.legend(loc="upper right", ncols=1 if wide else len(pairs), fontsize=7.5, handlelength=1.2, columnspacing=1)
    return stack(tables)


def bound(ax: Axes, cosine: NDArray[Any]) -> None:
    """One of a few scales around 0, so that runs can be compared by eye."""
    extreme = float(np.max(np.abs(cosine[np.isfinite(cosine)]), initial=0.0))
    limit = next((value for value in LIMITS if extreme <= value), 1.0) * 1.04
    ax.set_ylim(-limit, limit)


def _title(run: Run, pairs: Sequence[int]) -> str:
    if len(pairs) == 1:
        return f"Cosine over all shared layers, {style.pair_title(run, pairs[0])}"
    fewer = f", lowest {len(pairs)} of {len(run.pairs)} pairs" if len(pairs) < len(run.pairs) else ""
    return f"Cosine over all shared layers{fewer}"


def _note(run: Run, pairs: Sequence[int]) -> str:
    if len(pairs) > 1:
        return series.reading(run)
    values = run["shared_cosine"][:, pairs[0]]
    if not np.isfinite(values).any():
        return "no values"
    some = f" (of {thin.rows_in_words(run)})" if thin.every(run) > 1 else ""
    return (
        f"median {median(values):+.2f}; below 0 in {100 * conflict_rate(values):.0f} % of "
        f"{int(np.isfinite(values).sum())} measured steps{some}"
    )
