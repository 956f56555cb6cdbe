"""The cosine between two tasks' gradients over all shared layers together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradprobe.plots import panels, series, style
from gradprobe.plots.figures import matrix
from gradprobe.plots.panels import PanelTable, stack
from gradprobe.plots.style import no_cosines as lacks
from gradprobe.runfile import Run, thin
from gradprobe.summary import conflict_rate, median

__all__ = ["draw", "lacks", "page"]

_WIDE = 45
"""Names of more letters in all do not fit into one line of the legend."""


def page(run: Run, figure: Figure) -> PanelTable:
    """See :mod:`gradprobe.plots.figures`. Of many tasks all pairs as a matrix, and the lowest of them over steps."""
    if series.many(run):
        left, right, room = matrix.matrix_axes(run, figure, 8)
        draw(run, right, style.lowest_pairs(run, len(style.PAIR_COLOURS)))
        return matrix.draw(run, left, room)
    table = panels.pair_panels(
        run, figure, "cosine over all shared layers", lambda run, ax, pair, _: draw(run, ax, [pair]), by_layer=False
    )
    figure.supxlabel(series.reading(run), fontsize=8, color=style.GREY)
    return table


def draw(run: Run, ax: Axes, pairs: Sequence[int] = (0,)) -> PanelTable:
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
        tables.append(
            series.series_table(steps, run["epoch"], {"pair": run.pairs[pair]}, "cosine", cosine[:, pair], spread)
        )
    # From all pairs, so that the panels of one run have one scale.
    series.bound(ax, cosine)
    series.finish(ax, steps, cosine)
    ax.set_ylabel("cosine")
    style.titled(ax, _title(run, pairs), _note(run, pairs))
    if len(pairs) > 1:
        wide = sum(len(run.pairs[pair]) for pair in pairs) > _WIDE
        ax.legend(loc="upper right", ncols=1 if wide else len(pairs), fontsize=7.5, handlelength=1.2, columnspacing=1)
    return stack(tables)


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
