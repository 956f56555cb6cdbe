"""One quantity over steps: raw points faint, the running median, the middle half as a band; many tasks in grey."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from gradprobe.display import logarithmic, short
from gradprobe.plots import style
from gradprobe.plots.panels import PanelTable, stack
from gradprobe.plots.style import legend_text, log_axis, task_colour
from gradprobe.runfile import Run, thin
from gradprobe.summary import many_tasks, median, quantiles

_POINTS = 4000
"""Raw points drawn at most; medians and tables use all rows that are looked at (:mod:`gradprobe.runfile.thin`)."""

_LIMITS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Of the axes of cosines, to each side of 0."""


def window(rows: int) -> int:
    """Rows in the running window: a thirtieth of the run, odd, from 5 to 101."""
    return int(np.clip(rows // 30, 2, 50)) * 2 + 1 if rows >= 60 else 5


def running(values: NDArray[Any], size: int) -> NDArray[np.float32]:
    """Running quartiles of one series.

    Args:
        values: (n,); NaN and infinity count as missing.
        size: Rows in the centred window, odd; at the ends the window is cut.

    Returns:
        (3, n): lower quartile, median, upper quartile; NaN where the value itself is missing, so that no line is
        drawn where nothing was measured.
    """
    padded = np.pad(values.astype(np.float64), size // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)
    spread = quantiles(windows, (0.25, 0.5, 0.75), axis=-1).astype(np.float32)
    return np.where(np.isfinite(values), spread, np.float32(np.nan))


def trace(ax: Axes, steps: NDArray[Any], values: NDArray[Any], colour: str, label: str) -> NDArray[np.float32]:
    """Draw one series with its running median and spread; returns what :func:`running` gives."""
    low, middle, high = spread = running(values, window(len(values)))
    every = max(1, len(values) // _POINTS)
    positive = ax.get_yscale() == "log"
    raw = _drawable(values, positive)
    ax.plot(
        steps[::every],
        raw[::every],
        linestyle="none",
        marker=".",
        markersize=3 if len(values) > 100 else 5,
        markeredgewidth=0,
        alpha=0.3 if len(values) > 30 else 0.8,
        color=colour,
        rasterized=len(values) > 2000,
        gid=f"raw {label}",
    )
    ax.fill_between(steps, _drawable(low, positive), _drawable(high, positive), color=colour, alpha=0.18, linewidth=0)
    ax.plot(steps, _drawable(middle, positive), color=colour, linewidth=1.6, label=legend_text(label))
    return spread


def every_task(run: Run, ax: Axes, values: NDArray[Any]) -> list[NDArray[np.float32]]:
    """:func:`trace` for every task in its colour, of many :func:`in_grey`: (n, T) values, T spreads."""
    if many(run):
        return in_grey(run, ax, values)
    return [
        trace(ax, run["step"], values[:, i], task_colour(run.tasks, task), task) for i, task in enumerate(run.tasks)
    ]


def _drawable(values: NDArray[Any], positive: bool) -> NDArray[Any]:
    keep = np.isfinite(values) & ((values > 0) | (not positive))
    return np.where(keep, values, np.nan)


def scale(ax: Axes, values: NDArray[Any]) -> None:
    """A logarithmic y axis where all values are positive and span decades, so that small series stay visible."""
    if logarithmic(values):
        ax.set_yscale("log")


def bound(ax: Axes, cosine: NDArray[Any]) -> None:
    """One of a few scales around 0, so that runs can be compared by eye."""
    extreme = float(np.max(np.abs(cosine[np.isfinite(cosine)]), initial=0.0))
    limit = next((value for value in _LIMITS if extreme <= value), 1.0) * 1.04
    ax.set_ylim(-limit, limit)


def finish(ax: Axes, steps: NDArray[Any], values: NDArray[Any]) -> None:
    """Axes that all panels over steps share."""
    ax.set_xlabel("training step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    first, last = int(steps[0]), int(steps[-1])
    if last > first:
        margin = 0.01 * (last - first)
        ax.set_xlim(first - margin, last + margin)
    if ax.get_yscale() == "log":
        log_axis(ax.yaxis, values[np.isfinite(values)])


def reading(run: Run) -> str:
    """How to read a panel drawn with :func:`trace`."""
    return f"dots: {thin.rows_in_words(run)}; line: median of {window(len(run))} of them; band: middle half"


def silent(names: tuple[str, ...], values: NDArray[Any]) -> str:
    """Which of the series have no value at all, for a panel's note; (n, S) values."""
    empty = [name for name, known in zip(names, np.isfinite(values).any(axis=0), strict=True) if not known]
    return f"no values: {', '.join(empty)}" if empty else ""


def per_task(run: Run, quantity: str, values: NDArray[Any], spreads: list[NDArray[np.float32]]) -> PanelTable:
    """The table of a panel with one series per task: (n, T) values, T spreads or none."""
    return stack(
        [
            series_table(
                run["step"], run["epoch"], {"task": task}, quantity, values[:, i], spreads[i] if spreads else None
            )
            for i, task in enumerate(run.tasks)
        ]
    )


def series_table(
    steps: NDArray[Any],
    epochs: NDArray[Any],
    names: Mapping[str, str],
    quantity: str,
    values: NDArray[Any],
    spread: NDArray[np.float32] | None,
) -> PanelTable:
    """One series as a table: the rows as recorded, and their running quartiles.

    Args:
        steps, epochs, values: (n,).
        names: What the series is of, such as ``{"task": "det"}``.
        quantity: Name of the column of values.
        spread: (3, n) from :func:`running`; None: no quartiles.
    """
    index = {name: np.full(len(values), value, object) for name, value in names.items()}
    columns = {quantity: values}
    if spread is not None:
        columns |= {"running_q25": spread[0], "running_median": spread[1], "running_q75": spread[2]}
    return PanelTable({"step": steps, "epoch": epochs, **index}, columns)


_NAMED = 2
"""So many tasks at either end are drawn in colour and named."""


def in_grey(run: Run, ax: Axes, values: NDArray[Any]) -> list[NDArray[np.float32]]:
    """Every task's running median in grey, the middle half of the tasks as a band, the outermost named.

    Args:
        run: The run.
        ax: Where to draw.
        values: (n, T).

    Returns:
        T times what :func:`gradprobe.plots.series.running` gives.
    """
    steps, positive = run["step"], ax.get_yscale() == "log"
    spreads = [running(values[:, i], window(len(values))) for i in range(len(run.tasks))]
    lines = np.stack([spread[1] for spread in spreads], axis=1)
    if positive:
        lines = np.where(lines > 0, lines, np.nan)
    ax.plot(steps, lines, color="#BBBBBB", linewidth=0.6, gid="every task")
    low, middle, high = quantiles(lines, (0.25, 0.5, 0.75), axis=1)
    ax.fill_between(steps, low, high, color=style.GREY, alpha=0.25, linewidth=0)
    ax.plot(steps, middle, color="black", linewidth=1.6, label="median of the tasks")
    for colour, task in zip(style.TASK_COLOURS, _outermost(values), strict=False):
        label = style.legend_text(short([run.tasks[task]], 20)[0])
        ax.plot(steps, lines[:, task], color=colour, linewidth=1.3, label=label)
    ax.legend(loc="best", fontsize=7, handlelength=1.2, ncols=2, columnspacing=1)
    return spreads


def _outermost(values: NDArray[Any]) -> list[int]:
    """The tasks with the highest and the lowest median over all rows, :data:`_NAMED` of each; (n, T)."""
    middle = median(values)
    if np.nanmax(middle, initial=-np.inf) <= np.nanmin(middle, initial=np.inf):
        return []  # all alike
    order = [int(i) for i in np.argsort(middle, kind="stable") if np.isfinite(middle[i])]
    return [*reversed(order[-_NAMED:]), *order[: max(0, min(_NAMED, len(order) - _NAMED))]]


def reading_of_tasks(run: Run) -> str:
    """How to read a panel drawn with :func:`every_task`."""
    if not many(run):
        return reading(run)
    return f"grey: each task, median of {window(len(run))} rows; black: median of {len(run.tasks)} tasks"


def many(run: Run) -> bool:
    """Whether a run's tasks are drawn so."""
    return many_tasks.many(run.tasks)
