"""Counts training steps and says which of them are due."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from gradprobe.errors import ProbeError


class StepClock:
    """Training steps, not backwards: by the optimizer's own step hook, else by calls.

    Args:
        every: Steps 0, every, 2 every, ... are due.
        optimizer: Where given, a step is what its ``step()`` completes; gradient accumulation needs no telling.
        accumulate: Without an optimizer: how many calls make one step.
    """

    def __init__(self, every: int, optimizer: Optimizer | None = None, accumulate: int = 1) -> None:
        for name, value in (("every", every), ("accumulate", accumulate)):
            if value != int(value) or value < 1:
                raise ProbeError(f"{name}={value!r}: must be a whole number of at least 1.")
        self.every, self.accumulate = int(every), int(accumulate)
        self.step = 0
        self._calls = 0
        self._last_due = -1
        self._handle: Any = None
        if optimizer is not None:
            self._handle = optimizer.register_step_post_hook(self._stepped)

    def due(self) -> bool:
        """Whether the present step is to be measured; True once per step."""
        due = self.step % self.every == 0 and self.step != self._last_due
        if due:
            self._last_due = self.step
        return due

    def called(self) -> None:
        """One forward and backward is done."""
        self._calls += 1
        if self._handle is None and self._calls % self.accumulate == 0:
            self.step += 1

    def state_dict(self) -> dict[str, int]:
        """What :meth:`load_state_dict` needs to go on."""
        return {"step": self.step, "calls": self._calls, "last_due": self._last_due}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another clock stopped."""
        self.step, self._calls, self._last_due = state["step"], state["calls"], state["last_due"]

    def close(self) -> None:
        """Take the hook off the optimizer."""
        if self._handle is not None:
            self._handle.remove()

    def _stepped(self, *_: Any) -> None:
        self.step += 1
