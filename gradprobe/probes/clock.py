"""Counts training steps and says which of them are due."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from gradprobe.errors import ProbeError
from gradprobe.probes.schedule import Schedule, whole


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
    """Training steps, not backwards: by the optimizer's own step hook, else by calls.

    Args:
        schedule: Which steps are due.
        optimizer: See :meth:`follow`; gradient accumulation then needs no telling.
        accumulate: Without an optimizer: how many calls make one step.
        now: Seconds.
    """

    def __init__(
        self,
        schedule: Schedule,
        optimizer: Optimizer | None = None,
        accumulate: int = 1,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.schedule, self.accumulate, self._now = schedule, whole("accumulate", accumulate), now
        self.step = 0
        self._calls = 0
        self._last_asked = -1
        self._handle: Any = None
        self._others: list[Any] = []
        if optimizer is not None:
            self.follow(optimizer)

    def follow(self, optimizer: Optimizer) -> None:
        """From now on a step is what this optimizer's ``step()`` completes."""
        self._handle = optimizer.register_step_post_hook(self._stepped)

    def around(self, optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]) -> None:
        """Have ``before`` and ``after`` called around each step of the optimizer, until the clock is closed.

        Whatever :meth:`follow` was called for counts the step before ``after`` is called.
        """
        self._others += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def ask(self) -> tuple[bool, bool]:
        """Whether this is the first call in the present step, and whether the step is to be measured now.

        Asked once per call; only the first call of a step can be due.
        """
        answer = self.peek()
        self._last_asked = self.step
        return answer

    def peek(self) -> tuple[bool, bool]:
        """What :meth:`ask` would say, without asking."""
        first = self.step != self._last_asked
        return first, first and self.schedule.due(self.step)

    @property
    def completing(self) -> bool:
        """Whether the present call completes the step."""
        return self._handle is None and (self._calls + 1) % self.accumulate == 0

    def called(self) -> None:
        """One forward and backward is done."""
        self._calls += 1
        if self._handle is None and self._calls % self.accumulate == 0:
            self._stepped()

    def state_dict(self) -> dict[str, int]:
        """What :meth:`load_state_dict` needs to go on."""
        return {"step": self.step, "calls": self._calls, "last_asked": self._last_asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another clock stopped, ahead or behind."""
        self.step, self._calls, self._last_asked = state["step"], state["calls"], state["last_asked"]

    @property
    def first_open(self) -> int:
        """The first step of which nothing was asked yet: rows from there on are still to come."""
        return max(self.step, self._last_asked + 1)

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in (self._handle, *self._others):
            if handle is not None:
                handle.remove()

    def _stepped(self, *_: Any) -> None:
        self.step += 1
        self.schedule.passed(self._now())
