"""Which training steps there are, which of them are measured, and what measuring costs."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, Protocol, SupportsFloat

import torch
from torch.optim import Optimizer

from gradprobe.errors import ProbeError
from gradprobe.probes.optimizer_steps import OptimizerSteps, ParameterSample

__all__ = ["Stopwatch", "whole"]


def bare(optimizer: Any) -> Optimizer:
    """The optimizer inside a wrapper, such as accelerate's, which has none of an optimizer's hooks.

    Raises:
        ProbeError: It is no optimizer, nor is what it wraps.
    """
    for found in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(found, Optimizer) and hasattr(found, "_optimizer_step_post_hooks"):
            return found
    raise ProbeError(
        f"optimizer= is a {type(optimizer).__name__}, which is no torch.optim.Optimizer and wraps none as .optimizer; "
        "pass the optimizer itself, or leave it out and count steps by calls."
    )


class StepClock:
    """Training steps, not backwards: those that optimizers make, else so many calls.

    Args:
        schedule: Which steps are due.
        accumulate: Where no optimizer is heard: how many calls make one step.
        now: Seconds.

    Attributes:
        steps: Hears the optimizers; None: steps are counted by calls.
        unannounced: Notices steps that nobody announces; None: every call is a step.
        is_due: Whether the present step was due when it was first asked.
        in_step: Calls in the present step.
    """

    def __init__(self, schedule: _Schedule, accumulate: int = 1, now: Callable[[], float] = time.perf_counter) -> None:
        self.schedule, self.accumulate, self._now = schedule, whole("accumulate", accumulate), now
        self.steps: OptimizerSteps | None = None
        self.unannounced: UnannouncedSteps | None = None
        self.step = self.in_step = 0
        self.is_due = False
        self._calls = 0
        self._last_asked = -1

    @property
    def by_calls(self) -> bool:
        """Whether no optimizer is heard."""
        return self.steps is None

    @property
    def stepping(self) -> bool:
        """Whether the closure of an optimizer's step is running."""
        return self.steps is not None and self.steps.stepping

    @contextmanager
    def call(self) -> Iterator[tuple[bool, bool]]:
        """A call of the probe: within it, an optimizer's step is over when the call is.

        Yields:
            What :meth:`ask` says.
        """
        self.look()
        if self.steps is None:
            yield self.ask()
        else:
            with self.steps.calling():
                yield self.ask()

    def look(self) -> None:
        """Count a step that has ended and nobody has announced."""
        if self.unannounced is not None:
            self.unannounced.asked()

    def ask(self) -> tuple[bool, bool]:
        """Whether this is the first call in the present step, and whether the step is to be measured now.

        Asked once per call; only the first call of a step can be due.
        """
        first, due = self.peek()
        self._last_asked = self.step
        self.is_due = due if first else self.is_due
        return first, due

    def peek(self) -> tuple[bool, bool]:
        """What :meth:`ask` would say, without asking."""
        first = self.step != self._last_asked
        return first, first and self.schedule.due(self.step)

    @property
    def ending(self) -> bool:
        """Whether the step ends with the present call."""
        if self.steps is not None:
            return self.steps.within
        return (self._calls + 1) % self.accumulate == 0

    def called(self, *, several: bool = False) -> None:
        """One forward and backward is done.

        Args:
            several: Whether the step may have further calls, as far as is known.
        """
        if self.unannounced is not None:
            self.unannounced.called(several)
        self._calls += 1
        self.in_step += 1
        if self.steps is not None:
            self.steps.called()
        elif self._calls % self.accumulate == 0:
            self.stepped()

    def cut(self) -> None:
        """Steps are counted by calls, and the present one ended with fewer: the next call begins another."""
        self.again()
        self.stepped()

    def again(self) -> None:
        """Steps are counted by calls, and what the present one had is dropped: the next call is its first."""
        self._calls -= self._calls % self.accumulate

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "calls": self._calls, "last_asked": self._last_asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another clock stopped, ahead or behind."""
        self.step, self._calls, self._last_asked = state["step"], state["calls"], state["last_asked"]
        self.in_step, self.is_due = 0, False

    @property
    def first_open(self) -> int:
        """The first step of which nothing was asked yet: rows from there on are still to come."""
        return max(self.step, self._last_asked + 1)

    def close(self) -> None:
        """Take the hooks off the optimizers."""
        if self.steps is not None:
            self.steps.close()

    def stepped(self, steps: int = 1) -> None:
        """So many steps are over."""
        for _ in range(steps):
            self.step += 1
            self.schedule.passed(self._now())
        self.in_step = 0


class _Schedule(Protocol):
    """Says when to measure. Under data parallelism one process's decides for all."""

    def due(self, step: int) -> bool:
        """Whether ``step`` is to be measured; asked once per step."""

    def spent(self, seconds: float) -> None:
        """So long did a measurement take."""

    def passed(self, now: float) -> None:
        """A step is over; ``now`` in seconds of any clock."""


class _Every:
    """Steps 0, k, 2 k, ..."""

    def __init__(self, steps: int) -> None:
        self.steps = whole("every", steps)

    def due(self, step: int) -> bool:
        """Whether ``step`` is a multiple."""
        return step % self.steps == 0

    def spent(self, seconds: float) -> None:
        """Does not matter here."""

    def passed(self, now: float) -> None:
        """Does not matter here."""


class Budget:
    """As often as a share of the time allows.

    Every step earns its part of the share, every measurement costs what it took; the next is due when what was
    earned since the start covers all that was spent and the next one's likely cost. So the share is exceeded only at
    first, until the first measurements are earned, and is used up but for less than one measurement. The first is
    dearer than the others (the layers are found, caches are cold): the second waits until it is earned, and no more.

    Args:
        share: Of the whole time, in (0, 1): 0.05 means that of 100 s at most 5 are spent measuring.
    """

    _PAUSE = 10.0
    """A step that takes so many times the usual is a pause (an evaluation, a laptop that slept) and earns as one of
    usual length: else a burst of measurements would follow each epoch."""

    def __init__(self, share: float) -> None:
        if not 0 < _number(share) < 1:
            raise ProbeError(f"budget={share!r}: the share of the time for measuring, above 0 and below 1.")
        self.share = share
        self._rate = share / (1 - share)  # seconds of measuring per second of bare training
        self._balance = 0.0
        self._in_step = 0.0
        self._begun = False
        self._costs: deque[float] = deque(maxlen=5)
        self._steps: deque[float] = deque(maxlen=50)
        self._last: float | None = None

    def due(self, step: int) -> bool:
        """Whether what was earned covers a measurement."""
        return not self._begun or self._balance >= (median(self._costs) if self._costs else 0.0)

    def spent(self, seconds: float) -> None:
        """Pay for a measurement."""
        if self._begun:
            self._costs.append(seconds)
        self._begun = True
        self._balance -= seconds
        self._in_step += seconds

    def passed(self, now: float) -> None:
        """Earn for the training that the step consisted of, without the measuring in it."""
        if self._last is not None:
            bare = max(0.0, now - self._last - self._in_step)
            usual = median(self._steps) if self._steps else bare
            bare = usual if bare > self._PAUSE * usual else bare
            self._steps.append(bare)
            self._balance += self._rate * bare
        self._last, self._in_step = now, 0.0


class FirstProcessDecides:
    """A schedule by time, of which the first process's counts for all."""

    def __init__(self, own: _Schedule, first_says: Callable[[bool], bool]) -> None:
        self._own, self._first_says = own, first_says

    def due(self, step: int) -> bool:
        """Whether the first process's says so. Every process must ask."""
        return self._first_says(self._own.due(step))

    def spent(self, seconds: float) -> None:
        self._own.spent(seconds)

    def passed(self, now: float) -> None:
        self._own.passed(now)


class AlsoDue:
    """A schedule, and steps that somebody else wants besides."""

    def __init__(self, own: _Schedule, wants: Callable[[int], bool]) -> None:
        self._own, self._wants = own, wants

    def due(self, step: int) -> bool:
        """Whether either says so; both are asked."""
        due, wanted = self._own.due(step), self._wants(step)
        return due or wanted

    def spent(self, seconds: float) -> None:
        self._own.spent(seconds)

    def passed(self, now: float) -> None:
        self._own.passed(now)


def make_schedule(every: int | None, budget: float | None, *, default: int = 10) -> _Schedule:
    """The schedule that one of the two arguments asks for; every ``default``-th step where neither does.

    Raises:
        ProbeError: It is out of range.
    """
    return Budget(budget) if budget is not None else _Every(default if every is None else every)


def whole(name: str, value: object, least: int = 1) -> int:
    """``value`` as a whole number of at least ``least``.

    Raises:
        ProbeError: It is none; says whose it is.
    """
    number = _number(value)
    if not number.is_integer() or number < least:
        raise ProbeError(f"{name}={value!r}: must be a whole number of at least {least}.")
    return int(number)


def _number(value: object) -> float:
    """NaN where it is none."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):  # an array or a tensor of several
        return math.nan


class Stopwatch:
    """Adds up the seconds of the stretches in which it runs.

    A GPU does its work later than it is told to. So there marks are put into its queue at both ends of a stretch, and
    read when the seconds are asked for: then the last mark is waited for, which costs nothing where the row's numbers
    have been brought over before.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._marks: list[tuple[Any, Any]] = []

    @property
    def seconds(self) -> float:
        """So far."""
        if self._marks:
            self._marks[-1][1].synchronize()
            self._seconds += sum(max(0.0, start.elapsed_time(end)) for start, end in self._marks) / 1000
            self._marks = []
        return self._seconds

    def add(self, seconds: float) -> None:
        """Count what something else has measured."""
        self._seconds += seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done within."""
        if self._device.type == "cpu":
            started = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - started
            return
        start = self._mark()
        try:
            yield
        finally:
            self._marks.append((start, self._mark()))

    def _mark(self) -> Any:
        kind = self._device.type
        if kind == "cuda":
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self._device))
        elif kind == "mps":
            mark = torch.mps.event.Event(enable_timing=True)
            mark.record()
        else:
            mark = torch.Event(self._device, enable_timing=True)
            mark.record()
        return mark


BY_HAND = (
    "the shared parameters change from call to call though no optimizer steps (they are updated by hand, or by a "
    "method that is no step()): each change counts as a step from here on. Leave optimizer= out, with accumulate= "
    "where several calls make a step, to count by calls"
)
_WAITING = (
    "{calls:,} calls of the probe, and no optimizer has stepped on the shared parameters: rows are only measured at "
    "the next step. Pass the optimizer that trains them, or leave optimizer= out and count steps by calls"
)
_STAGES = 3
"""Most changes within a step that are taken for a habit of its optimizer's, as the perturbation of SAM is."""
_PATIENCE = 1024
"""After so many calls without a step something is said."""
_FIRST_LOOK = 16
"""From so many calls of a step on its numbers are looked at now and then, though it is not measured."""


class UnannouncedSteps:
    """Notices steps that nobody announces: the parameters moved between two calls of what should be one step.

    Args:
        clock: Counts the steps.
        points: Of the shared parameters.
        finish: Hands on the row of the calls so far.
        warn: Told what the user should know.
    """

    def __init__(
        self, clock: StepClock, points: ParameterSample, finish: Callable[[], None], warn: Callable[[str], None]
    ) -> None:
        self._clock, self._points, self._finish, self._warn = clock, points, finish, warn
        self._changes = 0  # since an optimizer stepped
        self._usual = 1  # changes within one step
        self._by_hand = False

    def asked(self) -> None:
        """Before each call, and before it is said whether one would measure.

        A step that ended unnoticed is counted, and no row goes on at other parameters.
        """
        clock = self._clock
        if not clock.in_step or not self._points.moved():
            return
        self._points.again()
        self._finish()
        if clock.by_calls:
            clock.cut()
        elif not clock.stepping:
            self._unannounced()

    def called(self, several: bool) -> None:
        """After each call, before it is counted.

        Args:
            several: Whether the step may have further calls, as far as is known.
        """
        calls = self._clock.in_step + 1
        measured = self._clock.is_due and (several or calls > 1)
        now_and_then = calls >= _FIRST_LOOK and not calls & (calls - 1)
        closely = measured or now_and_then or (self._by_hand and self._points.silent)
        self._points.keep(closely=closely, numbers=self._clock.by_calls)
        if calls == _PATIENCE and not self._clock.by_calls:
            self._warn(_WAITING.format(calls=calls))

    def stepped(self) -> None:
        """An optimizer stepped."""
        self._usual = min(max(self._usual, self._changes), _STAGES)
        self._changes, self._by_hand = 0, False

    def _unannounced(self) -> None:
        """Once within a step may be an optimizer's perturbation; once more without a step is a training by hand."""
        self._changes += 1
        if self._by_hand:
            self._clock.stepped()
        elif self._changes > self._usual:
            self._by_hand = True
            self._warn(BY_HAND)
            self._clock.stepped(self._changes)
