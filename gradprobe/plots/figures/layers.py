"""The stochastic conflict rate of every layer, with the range that coin tosses would give."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy.special import bdtrik

from gradprobe.measures import Array
from gradprobe.plots import panels, style
from gradprobe.plots.panels import PanelTable
from gradprobe.plots.style import no_cosines as lacks
from gradprobe.runfile import Run
from gradprobe.summary import conflict_rate

__all__ = ["chance", "draw", "lacks", "page"]

_LEVEL = 0.95


def page(run: Run, figure: Figure) -> PanelTable:
    return panels.pair_panels(run, figure, "stochastic conflict rate by layer", draw)


def chance(steps: ArrayLike) -> tuple[Array, Array]:
    """Where the share of conflicting steps falls if every step is an independent coin toss.

    Args:
        steps: (L,) numbers of measured steps.

    Returns:
        Lower and upper end, (L,) each, in [0, 1], of the central binomial interval at :data:`_LEVEL`; NaN where
        no step was measured. One layer in twenty falls outside by chance alone.

    >>> chance([100])
    (array([0.4]), array([0.6]))
    """
    count = np.asarray(steps, dtype=np.float64)
    known = np.maximum(count, 1)
    low = np.maximum(np.ceil(bdtrik((1 - _LEVEL) / 2, known, 0.5)), 0) / known
    low = np.where(count > 0, low, np.nan)
    return low, 1 - low


def draw(run: Run, ax: Axes, pair: int = 0, room: int = 66, named: bool = True) -> PanelTable:
    """One pair's stochastic conflict rate per layer, with the spread that pure chance would give.

    Args:
        run: The run.
        ax: Where to draw.
        pair: Index of the pair.
        room: How many layer names fit.
        named: Whether to name layers; not where they stand at a panel beside this one.

    Returns:
        layer, pair; stochastic_conflict_rate, steps (measured), chance_low, chance_high.
    """
    cosine = run["cosine"][:, :, pair]
    rate, steps = conflict_rate(cosine), np.isfinite(cosine).sum(axis=0)
    low, high = chance(steps)
    places = np.arange(len(run.layers))
    _band(ax, low, high)
    ax.axvline(0.5, color=style.GREY, linewidth=0.9)
    outside = (rate < low) | (rate > high)
    for mask, face in ((outside, style.PAIR_COLOURS[0]), (~outside, "white")):
        ax.plot(
            rate[mask],
            places[mask],
            linestyle="none",
            marker="o",
            markeredgewidth=1.0 if len(places) < 100 else 0.5,
            markersize=max(1.5, min(4.5, 400 / len(places))),
            clip_on=False,
            in_layout=False,  # an empty line that is not clipped would count as one at the figure's corner
            markerfacecolor=face,
            markeredgecolor=style.PAIR_COLOURS[0],
            gid="outside chance" if face != "white" else "within chance",
        )
    for layer in places[steps == 0]:
        ax.broken_barh([(0, 1)], (layer - 0.5, 1), hatch="///", facecolor="white", edgecolor="#AAAAAA", lw=0)
    style.name_layers(ax, style.layer_names(run), room)
    if not named:
        ax.set_ylabel("")
        ax.tick_params(labelleft=False, left=False)
    ax.set(xlim=(0, 1), xlabel="share of steps with cosine below 0")
    least, most = steps[steps > 0].min(initial=steps.max()), steps.max()
    count = f"{least} to {most}" if least < most else f"{most}"
    style.titled(
        ax,
        f"Stochastic conflict rate, {style.pair_title(run, pair)}",
        f"grey: {100 * _LEVEL:.0f} % range of a fair coin, n = {count} steps",
    )
    return PanelTable(
        {"layer": np.array(run.layers, dtype=object), "pair": np.full(len(places), run.pairs[pair], object)},
        {"stochastic_conflict_rate": rate, "steps": steps, "chance_low": low, "chance_high": high},
    )


def _band(ax: Axes, low: Array, high: Array) -> None:
    """One band that steps from layer to layer, as they may have different numbers of steps."""
    edges = np.arange(len(low) + 1) - 0.5
    heights = np.repeat(edges, 2)[1:-1]
    ax.fill_betweenx(heights, np.repeat(low, 2), np.repeat(high, 2), color=style.PALE, lw=0, gid="chance")
