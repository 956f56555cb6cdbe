"""Measures what measuring costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
