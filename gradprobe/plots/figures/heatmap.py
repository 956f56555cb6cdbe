"""The cosine between two tasks' gradients by layer and time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from gradprobe.plots import panels, style
from gradprobe.plots.panels import PanelTable
from gradprobe.plots.style import MAP, MISSING, add_colorbar
from gradprobe.plots.style import no_cosines as lacks
from gradprobe.runfile import Run, thin
from gradprobe.summary import median

__all__ = ["COLUMNS", "bins", "draw", "lacks", "page"]

COLUMNS = 200
"""Cells in time at most; a longer run is put together in bins of equally many rows (the last may have fewer)."""

_ZERO = "xxxx"


def page(run: Run, figure: Figure) -> PanelTable:
    one = len(run.pairs) == 1
    table = panels.pair_panels(
        run, figure, "cosine by layer", lambda run, ax, pair, room: draw(run, ax, pair, room, colorbar=one)
    )
    if not one:
        add_colorbar(figure.axes)
    return table


def bins(rows: int) -> NDArray[np.intp]:
    """The first row of every bin, and ``rows`` at the end: (bins + 1,)."""
    return np.append(np.arange(0, rows, max(1, -(-rows // COLUMNS))), rows)


def draw(run: Run, ax: Axes, pair: int = 0, room: int = 66, colorbar: bool = True) -> PanelTable:
    """One pair's cosine per layer over training steps, the median of each bin of rows, on [-1, 1].

    Args:
        run: The run.
        ax: Where to draw.
        pair: Index of the pair.
        room: How many layer names fit.
        colorbar: Whether to take space from ``ax`` for the scale.

    Returns:
        step (first of the bin), pair, layer; cosine (median), rows (of the bin), measured (rows with a cosine),
        zero (rows where a gradient is exactly zero).
    """
    edges = bins(len(run))
    cosine, measured, zero = _cells(run, pair, edges)
    steps = _step_edges(run["step"], edges)
    ax.pcolormesh(steps, np.arange(len(run.layers) + 1) - 0.5, cosine.T, cmap=MAP, vmin=-1, vmax=1, rasterized=True)
    empty, nothing = ~np.isfinite(cosine), zero > 0
    handles = [
        _hatched(ax, steps, (empty & ~nothing).T, MISSING, "missing or not finite"),
        _hatched(ax, steps, (empty & nothing).T, _ZERO, "a gradient is exactly zero"),
    ]
    style.name_layers(ax, style.layer_names(run), room)
    ax.set(xlabel="training step", xlim=(steps[0], steps[-1]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(False)
    per_cell = int(edges[1])
    of = f"{per_cell} of {thin.rows_in_words(run)}" if thin.every(run) > 1 else f"{per_cell} rows"
    note = "one row per cell" if per_cell == 1 else f"median of {of} per cell"
    style.titled(ax, f"Cosine by layer, {style.pair_title(run, pair)}", note)
    shown = [handle for handle in handles if handle]
    if shown:
        ax.legend(handles=shown, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=7.5)
    if colorbar:
        add_colorbar([ax])
    return _table(run, pair, edges, cosine, measured, zero)


def _cells(
    run: Run, pair: int, edges: NDArray[np.intp]
) -> tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.intp]]:
    """Per bin and layer, (B, L) each: the median cosine, the rows that have one, the rows with a zero gradient."""
    first, second = np.triu_indices(len(run.tasks), k=1)
    cosine = run["cosine"][:, :, pair]
    norm = run["grad_norm"][:, :, [first[pair], second[pair]]]
    zero = (norm == 0).any(axis=-1)
    parts = [slice(a, b) for a, b in pairwise(edges)]
    return (
        np.stack([median(cosine[part]) for part in parts]).astype(np.float32),
        np.stack([np.isfinite(cosine[part]).sum(axis=0) for part in parts]),
        np.stack([zero[part].sum(axis=0) for part in parts]),
    )


def _step_edges(steps: NDArray[Any], edges: NDArray[np.intp]) -> NDArray[np.float64]:
    """A cell goes from its first step to that of the next; the last is as wide as a row usually is."""
    usual = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    return np.append(steps[edges[:-1]].astype(np.float64), float(steps[-1]) + max(usual, 1.0))


def _hatched(ax: Axes, steps: NDArray[np.float64], cells: NDArray[np.bool_], hatch: str, why: str) -> Patch | None:
    """Hatch the (L, B) cells that are true, runs of them in one piece; returns the handle for a legend."""
    look: dict[str, Any] = {"facecolor": "white", "edgecolor": "#AAAAAA", "hatch": hatch, "linewidth": 0}
    for layer, row in enumerate(cells):
        turns = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
        spans = [(steps[a], steps[b] - steps[a]) for a, b in turns.reshape(-1, 2)]
        if spans:
            ax.broken_barh(spans, (layer - 0.5, 1), gid=why, **look)
    return Patch(label=why, **look) if cells.any() else None


def _table(
    run: Run,
    pair: int,
    edges: NDArray[np.intp],
    cosine: NDArray[np.float32],
    measured: NDArray[np.intp],
    zero: NDArray[np.intp],
) -> PanelTable:
    count, layers = cosine.shape
    index = {
        "step": np.repeat(run["step"][edges[:-1]], layers),
        "epoch": np.repeat(run["epoch"][edges[:-1]], layers),
        "pair": np.full(count * layers, run.pairs[pair], dtype=object),
        "layer": np.tile(np.array(run.layers, dtype=object), count),
    }
    rows = np.repeat(np.diff(edges), layers)
    return PanelTable(
        index,
        {"cosine": cosine.ravel(), "rows": rows, "measured": measured.ravel(), "zero": zero.ravel()},
    )
