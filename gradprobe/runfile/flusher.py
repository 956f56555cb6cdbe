"""The writer thread: brings queued rows to the store, keeps what it cannot write within a bound, and tries again."""

from __future__ import annotations

import logging
import threading
from collections import deque

import numpy as np

from gradprobe.rows import AnyRow, Header
from gradprobe.runfile import content
from gradprobe.runfile.store import Store

_ROW_OVERHEAD = 1000
"""Bytes of a row beyond its arrays."""


def size(row: AnyRow) -> int:
    """About how many bytes of memory a row takes."""
    return _ROW_OVERHEAD + sum(value.nbytes for value in vars(row).values() if isinstance(value, np.ndarray))


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


_log = logging.getLogger("gradprobe")


class Flusher:
    """Rows, metrics and notes on their way to the disk. What is public here belongs to ``lock``.

    Args:
        store: Used by the thread alone while it runs.
        seconds, rows: A row is written after so much time, or so many rows, at the latest.
        keep_bytes: Memory for rows that wait.
        part_bytes: Memory of the rows that go into one part at most.
    """

    def __init__(self, store: Store, seconds: float, rows: int, keep_bytes: int, part_bytes: int) -> None:
        self.seconds, self.rows = seconds, rows
        self.lock = threading.Condition()
        self.backlog = Backlog(keep_bytes)
        self.header: Header | None = None
        self.epochs: dict[int, dict[str, float]] = {}
        self.stepless = 0  # rows that are dropped for that
        self.changed = False  # metrics or notes that no file holds yet
        self.rewound: tuple[int, int] | None = None
        self.closing = False
        self._store, self._part_bytes = store, part_bytes
        self._dropped_before = 0
        self._asked = self._answered = self._refused = 0  # flushes, by number
        self._warned = self._told_of_drops = False
        self._tried = (0, 0)  # rows of the last part that was begun, and their bytes
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether the thread was started."""
        return self._thread is not None

    def store_opened(self, header: Header) -> None:
        """The store has begun, or gone on."""
        self.header, self.rewound = header, None
        self._dropped_before = self._store.state.dropped

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="gradprobe-writer", daemon=True)
        self._thread.start()

    def flush(self, timeout: float) -> bool:
        """Have all that is queued written; False: it could not be, or not in so many seconds."""
        if not self.running:
            return True
        with self.lock:
            self._asked += 1
            ticket = self._asked
            self.lock.notify_all()
            self.lock.wait_for(lambda: self.closing or ticket <= max(self._answered, self._refused), timeout=timeout)
            return self._answered >= ticket

    def stop(self) -> None:
        """End the thread, with rows still queued; ``closing`` is set."""
        with self.lock:
            self.lock.notify_all()
        if self._thread is not None:
            self._thread.join()

    def finish(self, end: str) -> None:
        """The last part says how the run ended, so that nothing after it needs to succeed."""
        self._write_queued(end)
        with self.lock:
            header, epochs = self._described()
        self._store.finish(header, epochs)

    def _run(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(self._has_work, timeout=self.seconds)
                if self.closing:
                    return
            if not self._try_write():
                with self.lock:
                    self.lock.wait_for(lambda: self.closing, timeout=min(self.seconds, 1.0))

    def _has_work(self) -> bool:
        asked = self._asked > max(self._answered, self._refused)
        return self.closing or asked or self.due

    @property
    def due(self) -> bool:
        """Whether enough waits to be written at once."""
        return len(self.backlog) >= self.rows or self.backlog.filling

    def _try_write(self) -> bool:
        """Write what is queued; a failure is told once, and leaves it queued."""
        ticket = self._asked
        try:
            self._write_queued()
        except Exception as error:  # whatever it is, training goes on and rows are kept
            self._complain(error)
            self._answer(refused=ticket)
            return False
        if self._warned:
            _log.warning("%s: recording again", self._store.path)
            self._warned = False
        self._answer(answered=ticket)
        with self.lock:
            header, epochs = self._described()
        try:
            self._store.tidy(header, epochs)
        except Exception as error:
            self._complain(error)
            return False
        return True

    def _answer(self, *, answered: int = 0, refused: int = 0) -> None:
        with self.lock:
            self._answered, self._refused = max(self._answered, answered), max(self._refused, refused)
            self.lock.notify_all()

    def _complain(self, error: Exception) -> None:
        if not self._warned:
            what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            again = "there is space again" if isinstance(error, OSError) else "that is over (the disk is not to blame)"
            _log.warning(
                "%s: cannot be written now (%s); training goes on, rows are kept in memory and written when %s",
                self._store.path,
                what,
                again,
            )
        self._warned = True

    def _write_queued(self, end: str = "") -> None:
        """Turn what is queued into parts; the last one holds ``end``."""
        with self.lock:
            left, rewind = len(self.backlog), self.rewound
        if rewind is not None:
            self._store.rewind(*self._described(), rewind[0])
            with self.lock:
                self.rewound = None if self.rewound == rewind else self.rewound
        while left > 0 or self.changed or end:
            written = self._write_part(end)
            left -= written
            if not written or (end and left <= 0):
                return

    def _write_part(self, end: str) -> int:
        """One part from the oldest rows, of fewer where the disk has no room for as many; returns how many."""
        most = self._part_bytes
        while True:
            try:
                return self._write_rows(end, most)
            except OSError:
                if self._tried[0] < 2:
                    raise
                most = self._tried[1] // 2

    def _write_rows(self, end: str, most: int) -> int:
        """One part from the oldest rows, up to so many bytes of them; returns how many."""
        state = self._store.state
        with self.lock:
            rows = self.backlog.take(most)
            self._tried = len(rows), self.backlog.taken_bytes
            header, epochs = self._described()
            changed, self.changed = self.changed, False
            state.dropped = self._dropped_before + self.backlog.dropped + self.stepless
            state.end = end if len(rows) == len(self.backlog) else ""
            unstored = dict(state.unstored)
        if not rows and not changed and not end:
            return 0
        try:
            self._store.append(header, epochs, _side_by_side(rows, header, state))
        except BaseException:
            with self.lock:
                state.unstored = unstored  # the rows come again
                self.backlog.back(None if self.rewound is None else self.rewound[0])
                self.changed = self.changed or changed
            raise
        with self.lock:
            self.backlog.done()
        self._tell(unstored)
        return len(rows)

    def _tell(self, before: dict[str, tuple[int, str]]) -> None:
        """Say of values that could not be stored, and of rows that were dropped, when it happens first."""
        for place, (_, first) in self._store.state.unstored.items():
            if place not in before:
                _log.warning(
                    "%s: %s: a value that cannot be stored is left out, and said to be missing: %s",
                    self._store.path,
                    place,
                    first,
                )
        if self.backlog.dropped and not self._told_of_drops:
            self._told_of_drops = True
            _log.warning(
                "%s: %d rows were dropped so far: they came faster than they could be written, and more of them than "
                "the %d MB of memory for rows that wait. Measure fewer steps (every=), or fewer layers.",
                self._store.path,
                self.backlog.dropped,
                self.backlog.limit >> 20,
            )

    def _described(self) -> tuple[Header, dict[int, dict[str, float]]]:
        assert self.header is not None
        return self.header, {e: dict(v) for e, v in self.epochs.items()}


def _side_by_side(rows: list[AnyRow], header: Header, state: content.State) -> dict[str, content.Columns]:
    """Rows of all tables as they are stored, by the group of their table."""
    return {
        table.group: content.columns(table, [row for row in rows if row.table is table], header, state)
        for table in content.tables(header)
    }
