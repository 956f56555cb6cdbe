"""Notices steps that nobody announces: the parameters moved between two calls of what should be one step."""

from __future__ import annotations

from collections.abc import Callable

from gradprobe.probes.clock import StepClock
from gradprobe.probes.points import Points

BY_HAND = (
    "the shared parameters change from call to call though no optimizer steps (they are updated by hand, or by a "
    "method that is no step()): each change counts as a step from here on. Leave optimizer= out, with accumulate= "
    "where several calls make a step, to count by calls"
)
_WAITING = (
    "{calls:,} calls of the probe, and no optimizer has stepped on the shared parameters: rows are only measured at "
    "the next step. Pass the optimizer that trains them, or leave optimizer= out and count steps by calls"
)
STAGES = 3
"""Most changes within a step that are taken for a habit of its optimizer's, as the perturbation of SAM is."""

PATIENCE = 1024
"""After so many calls without a step something is said."""

_FIRST_LOOK = 16
"""From so many calls of a step on its numbers are looked at now and then, though it is not measured."""


class Moves:
    """See the module.

    Args:
        clock: Counts the steps.
        points: Of the shared parameters.
        finish: Hands on the row of the calls so far.
        warn: Told what the user should know.
    """

    def __init__(
        self, clock: StepClock, points: Points, finish: Callable[[], None], warn: Callable[[str], None]
    ) -> None:
        self._clock, self._points, self._finish, self._warn = clock, points, finish, warn
        self._needless = clock.by_calls and clock.accumulate == 1  # every call is a step
        self._changes = 0  # since an optimizer stepped
        self._usual = 1  # changes within one step
        self._by_hand = False

    def asked(self) -> None:
        """Before each call, and before it is said whether one would measure.

        A step that ended unnoticed is counted, and no row goes on at other parameters.
        """
        clock = self._clock
        if self._needless or not clock.in_step or not self._points.moved():
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
        if self._needless:
            return
        calls = self._clock.in_step + 1
        measured = self._clock.is_due and (several or calls > 1)
        now_and_then = calls >= _FIRST_LOOK and not calls & (calls - 1)
        closely = measured or now_and_then or (self._by_hand and self._points.silent)
        self._points.keep(closely=closely, numbers=self._clock.by_calls)
        if calls == PATIENCE and not self._clock.by_calls:
            self._warn(_WAITING.format(calls=calls))

    def stepped(self) -> None:
        """An optimizer stepped."""
        self._usual = min(max(self._usual, self._changes), STAGES)
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
