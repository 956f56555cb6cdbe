"""The cosine between two tasks' gradients at the features where they part: a bound on what parameters get."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradprobe.display import short
from gradprobe.plots import panels, series, style
from gradprobe.plots.panels import PanelTable, stack
from gradprobe.runfile import Run
from gradprobe.summary import median

TITLE = "Cosine at the features where tasks part"

_LINES = 3
"""Of all features and pairs, those with the lowest medians are drawn; the table has all."""


def lacks(run: Run) -> str | None:
    """Why there is nothing to draw; None where there is."""
    if not run.feature_names:
        return (
            "no features in this run: it was recorded without level='features' or 'both', or its tasks part at none "
            f"({style.holdings(run)})"
        )
    if not np.isfinite(run["features/cosine"]).any():
        return (
            f"no cosine at a feature is known: gradients there are zero, missing or not finite ({style.holdings(run)})"
        )
    return None


def page(run: Run, figure: Figure) -> PanelTable:
    return panels.single_panel(run, figure, draw)


def draw(run: Run, ax: Axes) -> PanelTable:
    """The cosines over training steps: running median, spread, raw points.

    Returns:
        step, epoch, feature, pair; cosine, and its running quartiles.
    """
    cosine, steps, epochs = run["features/cosine"], run["features/step"], run["features/epoch"]
    ax.axhline(0, color=style.GREY, linewidth=0.9)
    shown, tables = lowest(run), []
    for feature, name in enumerate(run.feature_names):
        for pair, tasks in enumerate(run.pairs):
            values, label = cosine[:, feature, pair], f"{short([name], 24)[0]}: {style.pair_title(run, pair)}"
            if (feature, pair) in shown:
                colour = style.PAIR_COLOURS[shown.index((feature, pair))]
                spread = series.trace(ax, steps, values, colour, label)
            else:
                spread = series.running(values, series.window(len(values)))
            index = {"feature": name, "pair": tasks}
            tables.append(series.series_table(steps, epochs, index, "cosine", values, spread))
    series.bound(ax, cosine)
    series.finish(ax, steps, cosine)
    ax.set_ylabel("cosine")
    count = cosine.shape[1] * cosine.shape[2]
    fewer = f" (lowest {len(shown)} of {count})" if len(shown) < count else ""
    style.titled(ax, f"{TITLE}{fewer}", "a bound on the parameters' gradients, no measurement of them")
    ax.legend(loc="upper right", fontsize=7.5, handlelength=1.2)
    return stack(tables)


def lowest(run: Run) -> list[tuple[int, int]]:
    """The (feature, pair) with the lowest median cosines, at most :data:`_LINES`."""
    middle = median(run["features/cosine"])
    order = [divmod(int(i), middle.shape[1]) for i in np.argsort(middle, axis=None, kind="stable")]
    return [place for place in order if np.isfinite(middle[place])][:_LINES]
