"""Counts training steps and says which of them are due."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.optim import Optimizer

from gradprobe.errors import ProbeError
from gradprobe.probes.schedule import Schedule, whole
from gradprobe.probes.stepping import Steps


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
        is_due: Whether the present step was due when it was first asked.
        in_step: Calls in the present step.
    """

    def __init__(self, schedule: Schedule, accumulate: int = 1, now: Callable[[], float] = time.perf_counter) -> None:
        self.schedule, self.accumulate, self._now = schedule, whole("accumulate", accumulate), now
        self.steps: Steps | None = None
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

    @property
    def stepped_within(self) -> bool:
        """Whether an optimizer stepped within the present call, in its backward."""
        return self.steps is not None and self.steps.within

    def calling(self) -> AbstractContextManager[None]:
        """Around each call."""
        return self.steps.calling() if self.steps is not None else nullcontext()

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
    def completing(self) -> bool:
        """Whether the present call completes the step."""
        return self.by_calls and (self._calls + 1) % self.accumulate == 0

    def called(self) -> None:
        """One forward and backward is done."""
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
