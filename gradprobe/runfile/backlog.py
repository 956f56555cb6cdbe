"""Rows that wait for the disk, within a bound."""

from __future__ import annotations

from collections import deque

import numpy as np

from gradprobe.rows import AnyRow

ROW_OVERHEAD = 1000
"""Bytes of a row beyond its arrays."""


def size(row: AnyRow) -> int:
    """About how many bytes of memory a row takes."""
    return ROW_OVERHEAD + sum(value.nbytes for value in vars(row).values() if isinstance(value, np.ndarray))


class Backlog:
    """A queue that never holds more than ``limit`` bytes: the oldest rows that wait are dropped, and counted.

    Rows that were taken to be written stay in the count until :meth:`done`, or come back. Not locked: the
    caller does that.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.dropped = 0
        self._waiting: deque[AnyRow] = deque()
        self._taken: list[AnyRow] = []
        self._bytes = 0
        self.taken_bytes = 0  # of the rows that were taken

    def __len__(self) -> int:
        """Rows that wait or were taken."""
        return len(self._waiting) + len(self._taken)

    @property
    def filling(self) -> bool:
        """Whether a quarter of the room is taken, so that it is time to write."""
        return 4 * self._bytes >= self.limit

    def put(self, row: AnyRow) -> None:
        """Add the newest row."""
        self._waiting.append(row)
        self._bytes += size(row)
        while self._bytes > self.limit and self._waiting:
            self._bytes -= size(self._waiting.popleft())
            self.dropped += 1

    def take(self, most: int) -> list[AnyRow]:
        """The oldest rows: up to ``most`` bytes of them, and at least one if there is one."""
        assert not self._taken
        total = 0
        while self._waiting and (not self._taken or total + size(self._waiting[0]) <= most):
            total += size(self._waiting[0])
            self._taken.append(self._waiting.popleft())
        self.taken_bytes = total
        return list(self._taken)

    def done(self) -> None:
        """What was taken is on the disk."""
        self._bytes -= self.taken_bytes
        self._taken, self.taken_bytes = [], 0

    def back(self, before: int | None = None) -> None:
        """What was taken could not be written; of it, rows from step ``before`` on are forgotten."""
        kept = [row for row in self._taken if before is None or row.step < before]
        self._bytes -= self.taken_bytes - sum(map(size, kept))
        self._waiting.extendleft(reversed(kept))
        self._taken, self.taken_bytes = [], 0

    def cut(self, step: int) -> None:
        """Forget waiting rows from ``step`` on."""
        kept = [row for row in self._waiting if row.step < step]
        self._bytes -= sum(map(size, self._waiting)) - sum(map(size, kept))
        self._waiting = deque(kept)
