"""Which training steps are measured: every k-th, or as many as a share of the time allows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Protocol, SupportsFloat

from gradprobe.errors import ProbeError


class Schedule(Protocol):
    """Says when to measure. Under data parallelism one process's decides for all."""

    def due(self, step: int) -> bool:
        """Whether ``step`` is to be measured; asked once per step."""

    def spent(self, seconds: float) -> None:
        """So long did a measurement take."""

    def passed(self, now: float) -> None:
        """A step is over; ``now`` in seconds of any clock."""


class Every:
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

    def __init__(self, own: Schedule, first_says: Callable[[bool], bool]) -> None:
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

    def __init__(self, own: Schedule, wants: Callable[[int], bool]) -> None:
        self._own, self._wants = own, wants

    def due(self, step: int) -> bool:
        """Whether either says so; both are asked."""
        due, wanted = self._own.due(step), self._wants(step)
        return due or wanted

    def spent(self, seconds: float) -> None:
        self._own.spent(seconds)

    def passed(self, now: float) -> None:
        self._own.passed(now)


def make_schedule(every: int | None, budget: float | None, *, default: int = 10) -> Schedule:
    """The schedule that one of the two arguments asks for; every ``default``-th step where neither does.

    Raises:
        ProbeError: It is out of range.
    """
    return Budget(budget) if budget is not None else Every(default if every is None else every)


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
