"""What was evaluated once per epoch: scores on [0, 1], and everything else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from gradprobe.measures import Array
from gradprobe.metric import is_score
from gradprobe.plots import series, style
from gradprobe.plots.panels import PanelTable, stack
from gradprobe.runfile import Run

_ROOM = 12
"""Up to so many metrics are drawn and named each; of more, a quarter of that at either end are, the others grey."""

_MARKERS = "os^Dv<>p*"
_MARKER_TEXT = "●■▲◆▼◀▶⬟★"


def lacks(run: Run) -> str | None:
    """Why there is nothing to draw; None where there is."""
    scores, others = groups(run)
    if scores or others:
        return None
    kind = "finite epoch metric" if len(run.epochs) > 1 else "epoch metrics"
    return (
        f"no {kind} in this run ({style.holdings(run)}). Record with gradprobe record, which evaluates after each "
        "epoch, or call probe.log_metrics(epoch, ...)"
    )


def groups(run: Run) -> tuple[list[str], list[str]]:
    """Metrics with a finite value: those that stay within [0, 1] and are no losses, and the others."""
    scores: list[str] = []
    others: list[str] = []
    for name, values in run.epochs.items():
        known = values[np.isfinite(values)]
        if name == "epoch" or not known.size:
            continue
        (scores if is_score(name, known) else others).append(name)
    return scores, others


def page(run: Run, figure: Figure) -> PanelTable:
    style.head(figure, run, tasks=False)
    figure.set_size_inches(11, 6)
    count = 2 if all(groups(run)) else 1
    return draw(run, list(figure.subplots(1, count, squeeze=False).flat), gap=0.04)


def draw(run: Run, axes: Sequence[Axes], gap: float = 0.07) -> PanelTable:
    """All metrics over epochs, each named at the end of its line: scores apart from the rest.

    Args:
        run: The run.
        axes: One for each of :func:`groups` that is not empty.
        gap: Height of a line of text, as a part of the axes.

    Returns:
        epoch, metric; value.
    """
    scores, others = groups(run)
    named = [("Scores per epoch", scores), ("Other metrics per epoch", others)]
    if all(name.startswith("loss") for name in others):
        named[1] = ("Losses on the evaluation set per epoch", others)
    filled = [(title, names) for title, names in named if names]
    for ax, (title, names) in zip(axes, filled, strict=True):
        shown = _outermost(run, names)
        _panel(run, ax, names, shown, title, names is scores)
        _name_ends(run, ax, shown, gap)
    return _table(run, [*scores, *others])


def _outermost(run: Run, names: list[str]) -> list[str]:
    """All names, or of more than :data:`_ROOM` those whose last values are the highest and the lowest."""
    if len(names) <= _ROOM:
        return names
    order = sorted(names, key=lambda name: _last(run.epochs["epoch"], run.epochs[name])[1])
    kept = {*order[: _ROOM // 4], *order[-_ROOM // 4 :]}
    return [name for name in names if name in kept]


def _panel(run: Run, ax: Axes, names: list[str], shown: list[str], title: str, scores: bool) -> None:
    table = run.epochs
    epoch, values = table["epoch"], np.stack([table[name] for name in names])
    if not scores:
        series.scale(ax, values)
    for name, value in zip(names, values, strict=True):
        if name not in shown:
            ax.plot(epoch, np.where(np.isfinite(value), value, np.nan), color="#BBBBBB", linewidth=0.6, gid=name)
    for i, name in enumerate(shown):
        value = values[names.index(name)]
        ax.plot(
            epoch,
            np.where(np.isfinite(value), value, np.nan),
            color=style.metric_colour(run.tasks, name),
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=4.5,
            linewidth=1.3,
            label=style.legend_text(name),
            markevery=max(1, len(epoch) // 12),
        )
    if scores:
        ax.set_ylim(-0.02, 1.02)
    elif ax.get_yscale() == "log":
        style.log_axis(ax.yaxis, values.ravel())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set(xlabel="epoch", ylabel="score, 0 to 1" if scores else "value")
    absent = [name for name, v in table.items() if len(v) and not np.isfinite(v).any()]
    fewer = f"named: the {len(shown)} of {len(names)} that ended highest and lowest"
    note = f"no values: {', '.join(absent[:_ROOM])}" if absent else fewer * (len(shown) < len(names))
    style.titled(ax, title, note)


def _table(run: Run, names: list[str]) -> PanelTable:
    table = run.epochs
    epoch = table["epoch"]
    return stack(
        [
            PanelTable({"epoch": epoch, "metric": np.full(len(epoch), name, object)}, {"value": table[name]})
            for name in names
        ]
    )


def _name_ends(run: Run, ax: Axes, names: list[str], gap: float) -> None:
    """Names to the right of the axes, moved apart where they would overlap, tied to their line's end."""
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # from here on the axes must not move under the labels
    ends = [_last(run.epochs["epoch"], run.epochs[name]) for name in names]
    heights = ax.transAxes.inverted().transform(ax.transData.transform(ends))[:, 1]
    for i, height in enumerate(spread(heights, gap)):
        colour = style.metric_colour(run.tasks, names[i])
        ax.annotate(
            f"{_MARKER_TEXT[i % len(_MARKERS)]} {names[i]}",
            xy=ends[i],
            xytext=(1.06, float(height)),
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 0, "relpos": (0, 0.5), "shrinkB": 3},
            annotation_clip=False,
        )


def _last(epoch: NDArray[np.int32], values: Array) -> tuple[float, float]:
    known = np.flatnonzero(np.isfinite(values))[-1]
    return float(epoch[known]), float(values[known])


def spread(places: Array, gap: float) -> Array:
    """Places moved so that neighbours are at least ``gap`` apart: order kept, within [0, 1] if there is room.

    >>> spread(np.array([0.5, 0.5]), 0.2)
    array([0.4, 0.6])
    """
    order = np.argsort(places, kind="stable")
    clusters: list[tuple[float, int]] = []  # centre and size: touching labels move together
    for place in places[order]:
        clusters.append((float(place), 1))
        while len(clusters) > 1 and _touch(clusters[-2], clusters[-1], gap):
            (upper, m), (lower, n) = clusters.pop(), clusters.pop()
            clusters.append((_inside((lower * n + upper * m) / (n + m), n + m, gap), n + m))
    moved = [centre + gap * (k - (size - 1) / 2) for centre, size in clusters for k in range(size)]
    result = np.empty_like(np.asarray(places, dtype=np.float64))
    result[order] = moved
    return result


def _touch(lower: tuple[float, int], upper: tuple[float, int], gap: float) -> bool:
    return upper[0] - lower[0] < gap * (upper[1] + lower[1]) / 2


def _inside(centre: float, size: int, gap: float) -> float:
    half = gap * (size - 1) / 2
    return min(max(centre, half), 1 - half) if half <= 0.5 else 0.5
