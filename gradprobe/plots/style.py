"""How every figure looks: colours, fonts, titles, and what a panel says that has nothing to show."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter

from gradprobe.display import short
from gradprobe.metric import task_of
from gradprobe.runfile import Run, thin
from gradprobe.summary import many_tasks, measures_parameters, median, not_measured

# Okabe & Ito's colour-blind-safe palette; its yellow is darkened, as it is hard to see on white.
TASK_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A6A00", "#000000")
# From Tol's "muted": apart from all task colours.
PAIR_COLOURS = ("#332288", "#882255", "#999933")
GREY, PALE = "#666666", "#E6E6E6"
MAP = "RdBu"  # diverging, colour-blind-safe: red against each other, blue together
MISSING = "///"

_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ECECEC",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "text.parse_math": False,  # a task may be called "$x$"
    "svg.fonttype": "none",
    "svg.hashsalt": "gradprobe",
    "figure.dpi": 100.0,
}

_one_at_a_time = threading.Lock()


@contextmanager
def styled() -> Iterator[None]:
    """Our look, whatever the user's matplotlibrc says; everything is put back afterwards.

    matplotlib keeps its settings per process, hence the lock: figures in several threads wait for each other.
    """
    with _one_at_a_time, matplotlib.style.context(["default", _RC]):
        yield


def task_colour(tasks: Sequence[str], task: str) -> str:
    """The one colour that a task has in every figure of its run; beyond eight tasks they come round again."""
    return TASK_COLOURS[list(tasks).index(task) % len(TASK_COLOURS)]


def metric_colour(tasks: Sequence[str], metric: str) -> str:
    """The colour of the task that a metric belongs to; grey where that is not known."""
    owner = task_of(metric, tasks)
    return task_colour(tasks, owner) if owner else GREY


def lowest_pairs(run: Run, count: int) -> list[int]:
    """The pairs with the lowest median cosine over all shared layers, at most ``count``, lowest first."""
    order = np.argsort(median(run.cosine()), kind="stable")  # NaN goes last
    return [int(i) for i in order[:count]]


def pair_title(run: Run, pair: int) -> str:
    """A pair's two tasks as a title shows them."""
    return run.pairs[pair].replace("|", " | ")


def headline(run: Run) -> str:
    """What every figure says about the file it was drawn from."""
    drawn, run = thin.rows_in_words(run), thin.whole(run)
    rows = f"{len(run)} rows" if len(run) != 1 else "1 row"
    if len(run):
        steps = run["step"]
        rows += f", steps {steps[0]} to {steps[-1]}"
        bad = int(np.count_nonzero(run["status"]))
        rows += f", {bad} not measured" if bad else ""
    rows += f", drawn from {drawn}" if drawn != "rows" else ""
    trainer = run.provenance.get("trainer")
    parts = [run.path.name, f"trainer {trainer}" if trainer else "", rows, "" if run.complete else "unfinished"]
    return "  ·  ".join(part for part in parts if part)


def head(figure: Figure, run: Run, what: str = "", tasks: bool = True) -> None:
    """Title at the upper left, and the tasks with their colours at the upper right."""
    title = f"{headline(run)}  ·  {what}" if what else headline(run)
    figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold")
    if tasks and run.tasks and not many_tasks.many(run.tasks):  # many tasks are named in their panels
        handles = [Line2D([], [], color=task_colour(run.tasks, t), lw=3) for t in run.tasks]
        figure.legend(
            handles,
            [legend_text(t) for t in run.tasks],
            loc="outside upper right",
            ncols=min(len(handles), 8),
            handlelength=1.2,
            columnspacing=1.4,
        )


def legend_text(text: str) -> str:
    """matplotlib leaves out labels that begin with an underscore; a task may be called so."""
    return f" {text}" if text.startswith("_") else text


def titled(ax: Axes, title: str, note: str = "") -> None:
    """Title and, small below it, how to read the panel."""
    ax.set_title(f"{title}\n" if note else title, fontsize=10)
    if note:
        text = ax.text(0, 1, f" {note}", transform=ax.transAxes, fontsize=7.5, color=GREY, va="bottom", gid="note")
        text.set_in_layout(False)  # the title keeps the room for it; its width must not squeeze the axes


def unavailable(ax: Axes, title: str, reason: str) -> None:
    """A panel without data says so, and why."""
    titled(ax, title)
    ax.grid(False)
    ax.set(xticks=[], yticks=[], facecolor="#F7F7F7")
    for spine in ax.spines.values():
        spine.set_visible(False)
    text = textwrap.fill(reason[:1].upper() + reason[1:], 48)
    ax.text(
        0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=9, color=GREY, gid="unavailable"
    ).set_in_layout(False)


def holdings(run: Run) -> str:
    """What a run holds, for a message about what it does not."""
    fields = ("loss", "weight", "grad_norm", "cosine")
    names = [name for name in fields if np.isfinite(run[name]).any()]
    epochs = run.epochs
    held = f"it holds {len(thin.whole(run))} rows" + (f" of {', '.join(names)}" if names else "")
    return f"{held}, and {len(epochs) - 1} metrics of {len(epochs['epoch'])} epochs"


def no_rows(run: Run) -> str | None:
    """The reason why nothing can be drawn over steps, if the run has no rows."""
    if len(run):
        return None
    why = "it was closed before the first measured step"
    if not run.complete:
        why = "it is still being written, or was killed, and none has reached the disk"
    return f"no rows in this run: {why} ({holdings(run)})"


def no_cosines(run: Run) -> str | None:
    """The reason why nothing made of cosines can be drawn; None where it can."""
    held = holdings(run)
    if len(run.tasks) < 2:
        return f"no cosines in this run: a cosine needs two tasks, it has {len(run.tasks)} ({held})"
    if not len(run.layers):
        return f"no cosines in this run: {why_no_layers(run)} ({held})"
    if reason := no_rows(run):
        return reason
    if not np.isfinite(run["cosine"]).any():
        return (
            f"no row of this run holds a cosine: gradients are zero, missing or not finite in all of them "
            f"({held}){why_not_measured(run)}"
        )
    return None


def why_no_layers(run: Run) -> str:
    """Why a run has no layers, for a message."""
    if measures_parameters(run):
        return "the tasks share no layer"
    return "it was recorded with level='features', which measures no parameters"


def why_not_measured(run: Run) -> str:
    """The reasons that the rows themselves give, for a message; empty where there are none."""
    reasons = [f"{why} ({count} rows)" for why, count in not_measured(run).items()]
    return f". The rows say: {'; '.join(reasons)}" if reasons else ""


def log_axis(axis: Any, values: Iterable[float]) -> None:
    """Plain numbers on a logarithmic axis, enough of them even where the range is small."""
    known = np.array([v for v in values if np.isfinite(v) and v > 0])
    span = known.max() / known.min() if known.size else 1.0
    if span < 10:
        axis.set_major_locator(AutoLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def layer_names(run: Run) -> list[str]:
    """Names of the layers as figures show them: those that are shared by the graph alone are in brackets."""
    left_out = set(run.graph_only)
    return [f"({name})" if name in left_out else name for name in run.layers]


def add_colorbar(axes: Sequence[Axes]) -> None:
    """One scale, from -1 to 1, for several axes."""
    colours = ScalarMappable(Normalize(-1, 1), MAP)
    bar = axes[0].figure.colorbar(colours, ax=list(axes), pad=0.01, aspect=40, fraction=0.04)
    bar.set_label("cosine: red against each other, blue together", fontsize=8)


def name_layers(ax: Axes, names: Sequence[str], room: int) -> None:
    """Layers downwards in execution order, as many of them named as there is room for."""
    every = max(1, -(-len(names) // max(room, 1)))
    places, labels = range(0, len(names), every), short(names)
    ax.set_yticks(list(places), [labels[i] for i in places], fontsize=7 if every == 1 else 7.5)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ordinal = {1: "", 2: ", every 2nd named", 3: ", every 3rd named"}.get(every, f", every {every}th named")
    ax.set_ylabel(f"shared layers in execution order{ordinal}")
    ax.grid(False, axis="y")
