"""What is shown while a study runs: a bar in a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from gradprobe.cli.console import stderr
from gradprobe.study.runner import FAILED, RUNNING, SKIPPED, Entry


class Lines:
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
        """Time left, as far as that can be told."""
        return "" if self._left is None else f"{clock(self._left)} left"

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put away."""


class Bar(Lines):
    """The same in a terminal, with a bar over all runs."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self._progress = Progress(
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

    def __enter__(self) -> Bar:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)


def make_watcher(total: int) -> Lines:
    """The bar where stderr is a terminal that can show it, else plain lines."""
    console = stderr()
    return Bar(total) if console.is_terminal and not console.is_dumb_terminal else Lines(total)


def clock(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
