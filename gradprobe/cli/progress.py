"""What is shown while a training or a study runs: live in a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gradprobe import measures
from gradprobe.cli.console import sparkline, stderr
from gradprobe.rows import Header, Row
from gradprobe.study.runner import FAILED, RUNNING, SKIPPED, Entry
from gradprobe.trainers.problems import kind_of
from gradprobe.trainers.settings import Settings


class _OnScreen:
    """What is shown within a ``with``; in a terminal by ``screen``."""

    screen: AbstractContextManager[object] = nullcontext()

    def __enter__(self: _Shown) -> _Shown:
        self.screen.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.screen.__exit__(*error)


_Shown = TypeVar("_Shown", bound=_OnScreen)


class Display(_OnScreen):
    """The plain form: a line per epoch, and one every few seconds between. Also the base of the live form.

    It watches the training (:class:`gradprobe.trainers.loop.Watcher`) and takes rows
    (:class:`gradprobe.rows.Sink`).
    """

    line_seconds = 15.0

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        kind = kind_of(settings.data)
        self.tasks = kind.tasks
        self.shown = tuple(metric.name for metric in kind.metrics if metric.higher_is_better)
        self.messages = stderr()
        self.epochs, self.steps_per_epoch, self.first_step = settings.epochs, 0, 0
        self.losses: dict[str, float] = {}
        self.norms: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.cosines: dict[str, deque[float]] = {}
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self._lock = threading.Lock()  # rows arrive while the terminal is being drawn
        self._header: Header | None = None
        self._line_due = time.monotonic() + self.line_seconds
        self._begun = time.monotonic()

    # ---- from the command and the loop

    def begin(self, epochs: int, steps_per_epoch: int, first_step: int) -> None:
        """Training starts, at ``first_step`` if it is resumed."""
        self.epochs, self.steps_per_epoch, self.first_step = epochs, steps_per_epoch, first_step
        self._begun = time.monotonic()
        text = f"{self.settings.trainer}: {epochs} epochs of {steps_per_epoch} steps, measured every "
        self.say(text + ("step" if self.settings.every == 1 else f"{self.settings.every} steps"))

    def phase(self, what: str) -> None:
        """What goes on now."""

    def note(self, text: str) -> None:
        """Something the user should know."""
        self.say(f"note: {text}")

    def stepped(self, epoch: int, step: int, losses: Mapping[str, float]) -> None:
        self.losses = dict(losses)
        if time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + self.line_seconds
            self.line(epoch, step)

    def evaluated(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.metrics.append((epoch, dict(metrics)))
        self.epoch_line(epoch, metrics)

    def result(self, text: str) -> None:
        """Where the file is, and what to do next: the answer of the command, on stdout."""
        print(text)

    # ---- as a sink

    def start(self, header: Header) -> None:
        """The shared layers are known."""
        self._header = header
        shared = measures.by_several(header.reach).any(axis=1)
        self.say(f"{int(shared.sum())} shared layers, {int(header.layer_size[shared].sum()):,} parameters")

    def grow(self, header: Header) -> None:
        """More layers are shared, or it is known better who reaches them."""
        if self._header is not None and (more := len(header.layers) - len(self._header.layers)) > 0:
            first = ", ".join(header.layers[len(self._header.layers) :][:4])
            self.say(f"{more} more shared {'layer' if more == 1 else 'layers'}: {first}{', ...' if more > 4 else ''}")
        self._header = header

    def write(self, row: Row) -> None:
        """A measured row."""
        if self._header is None:
            return
        norms, cosines = row.shared(self._header.reach)
        with self._lock:
            self.norms = dict(zip(self._header.tasks, norms.tolist(), strict=True))
            self.weights = dict(zip(self._header.tasks, row.weight.tolist(), strict=True))
            for pair, value in zip(measures.pairs(self._header.tasks), cosines.tolist(), strict=True):
                self.cosines.setdefault("|".join(pair), deque(maxlen=24)).append(value)

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Metrics come by :meth:`evaluated`."""

    def annotate(self, values: Mapping[str, Any]) -> None:
        """Nothing to show."""

    def flush(self) -> bool:
        return True

    def close(self, end: str) -> None:
        """Nothing to show."""

    # ---- lines

    def say(self, text: str) -> None:
        self.messages.print(text)

    def line(self, epoch: int, step: int) -> None:
        """How far the training is, in one line."""
        total, done = self.epochs * self.steps_per_epoch, step + 1
        fresh = max(done - self.first_step, 1)
        left = (time.monotonic() - self._begun) / fresh * (total - done)
        parts = [f"epoch {epoch + 1}/{self.epochs} step {done}/{total}", f"{_minutes(left)} left"]
        parts += [f"{t}: loss {_number(self.losses.get(t))} weight {_number(self.weights.get(t))}" for t in self.tasks]
        parts += [f"cos({pair}) {_number(values[-1])}" for pair, values in self.cosines.items()]
        self.say("  ".join(parts))

    def epoch_line(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """The metrics of an epoch, in one line."""
        shown = "  ".join(f"{name} {_number(metrics[name])}" for name in self.shown if name in metrics)
        self.say(f"epoch {epoch + 1}/{self.epochs} on val: {shown}")


class LiveDisplay(Display):
    """The same in a terminal: a bar with time left, and tables that change in place."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeElapsedColumn(),
            TextColumn("gone,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.messages,
        )
        self._bar = self._progress.add_task("starting", total=None)
        self._epoch = 0
        self.screen = Live(
            get_renderable=self._render, console=self.messages, refresh_per_second=4, vertical_overflow="crop"
        )

    def begin(self, epochs: int, steps_per_epoch: int, first_step: int) -> None:
        """Start the bar."""
        super().begin(epochs, steps_per_epoch, first_step)
        self._epoch = first_step // steps_per_epoch
        self._progress.reset(self._bar, total=epochs * steps_per_epoch, completed=first_step)

    def phase(self, what: str) -> None:
        """Shown before the bar."""
        within = self.steps_per_epoch and self._epoch < self.epochs
        self._progress.update(
            self._bar, description=f"epoch {self._epoch + 1}/{self.epochs} {what}" if within else what
        )

    def stepped(self, epoch: int, step: int, losses: Mapping[str, float]) -> None:
        self.losses, self._epoch = dict(losses), epoch
        self._progress.update(self._bar, completed=step + 1, description=f"epoch {epoch + 1}/{self.epochs} training")

    def evaluated(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Add to the table of metrics."""
        super().evaluated(epoch, metrics)
        self._epoch = epoch + 1

    def epoch_line(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """The table shows it."""

    def _render(self) -> Group:
        return Group(self._progress, *([self._task_table()] if self.losses else []), *self._metric_tables())

    def _task_table(self) -> Table:
        caption = "norm and cosine: over the shared layers, each of a single minibatch, mostly noise"
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption=caption, caption_justify="left")
        table.add_column("task", no_wrap=True, min_width=4)
        for name in ("loss", "weight", "norm"):
            table.add_column(name, justify="right", no_wrap=True, min_width=6)
        table.add_column("cosine")
        with self._lock:
            lines = [f"{pair} {values[-1]:+.2f} {sparkline(values)}" for pair, values in self.cosines.items()]
        for index, task in enumerate(self.tasks):
            table.add_row(
                task,
                _number(self.losses.get(task)),
                _number(self.weights.get(task)),
                _number(self.norms.get(task)),
                lines[index] if index < len(lines) else "",
            )
        return table

    def _metric_tables(self) -> list[Table]:
        if not self.metrics:
            return []
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("epoch", justify="right")
        for name in self.shown:
            table.add_column(name, justify="right")
        for epoch, metrics in self.metrics[-6:]:
            table.add_row(str(epoch + 1), *(_number(metrics.get(name)) for name in self.shown))
        return [table]


def make_display(settings: Settings) -> Display:
    """The live form where stderr is a terminal that can show it, else plain lines."""
    console = stderr()
    return LiveDisplay(settings) if console.is_terminal and not console.is_dumb_terminal else Display(settings)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.3g}" if abs(value) < 0.1 or abs(value) >= 1000 else f"{value:.3f}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class NoDisplay(Display):
    """A display that shows nothing."""

    def say(self, text: str) -> None:
        """The first process says it."""

    def result(self, text: str) -> None:
        """Likewise."""

    def stepped(self, epoch: int, step: int, losses: Mapping[str, float]) -> None:
        """Likewise."""


class StudyLines(_OnScreen):
    """The plain form: a line where a run begins or ends. Also the base of the other form.

    Args:
        total: Runs of the study.
    """

    def __init__(self, total: int) -> None:
        self.total, self.ended_runs = total, 0
        self.console = stderr()
        self._began = time.monotonic()
        self._left: float | None = None

    def say(self, text: str) -> None:
        self.console.print(text)

    def began(self, entry: Entry) -> None:
        self.say(f"started {entry.run.name}")

    def ended(self, entry: Entry) -> None:
        """A run is done, was there already, or failed."""
        self.ended_runs += 1
        took = "" if entry.state == SKIPPED else f" after {clock(entry.seconds)}"
        why = f": {entry.reason}" if entry.state == FAILED else ""
        left = f", {clock(self._left)} left" if self._left is not None and self.ended_runs < self.total else ""
        self.say(f"{entry.run.name}: {entry.state}{took}{why}  ({self.ended_runs} of {self.total}{left})")

    def waits(self, entry: Entry) -> None:
        """Others record a run, and are let go on."""
        who = ", ".join(map(str, entry.recorders))
        self.say(f"{entry.run.name}: is being recorded already (process {who}); waiting for that")

    def going_on(self, entries: Sequence[Entry], done: float) -> None:
        """How far all of it is."""
        there = sum(entry.state == SKIPPED for entry in entries)
        fresh = done - there
        elapsed = time.monotonic() - self._began
        self._left = elapsed / fresh * (self.total - done) if fresh > 0 else None

    @property
    def left(self) -> str:
        """Time left; empty: not known."""
        return "" if self._left is None else f"{clock(self._left)} left"


class _StudyBar(StudyLines):
    """The same in a terminal, with a bar over all runs."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.screen = self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.1f}/{task.total} runs, {task.fields[left]}"),
            console=self.console,
        )
        self._bar = self._progress.add_task("", total=total, left="")

    def began(self, entry: Entry) -> None:
        """The bar names it."""

    def going_on(self, entries: Sequence[Entry], done: float) -> None:
        super().going_on(entries, done)
        names = ", ".join(entry.run.name for entry in entries if entry.state == RUNNING)
        self._progress.update(self._bar, completed=done, description=names, left=self.left)


def make_study_display(total: int) -> StudyLines:
    """The bar where stderr is a terminal that can show it, else plain lines."""
    console = stderr()
    return _StudyBar(total) if console.is_terminal and not console.is_dumb_terminal else StudyLines(total)


def clock(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
