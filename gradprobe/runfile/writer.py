"""Writes a run while training goes on, so that whatever was flushed survives a kill at any moment.

The main thread only queues rows (:mod:`gradprobe.runfile.backlog`); a writer thread brings them to the disk
(:mod:`gradprobe.runfile.store`). What it cannot write it keeps, up to a bound, and tries again. In a forked child
a writer is dead: it takes rows and closes without touching anything.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.errors import GradprobeError, RunFileError
from gradprobe.rows import Header, Row
from gradprobe.runfile import content, parts, schema
from gradprobe.runfile.backlog import Backlog
from gradprobe.runfile.files import Disk, Lock
from gradprobe.runfile.store import Store

log = logging.getLogger("gradprobe")


class RunWriter:
    """A sink (see :class:`gradprobe.rows.ResumableSink`) that keeps a run in one HDF5 file. Safe in threads.

    Args:
        path: Where the file goes; ``PATH.parts/`` beside it holds what is not merged yet.
        overwrite: Replace a run that is there.
        resume: Go on with the run that is there, from where :meth:`rewind` says. No run there, and nothing to
            go back to: a new one.
        flush_seconds, flush_rows: A row is on the disk after so much time, or so many rows, at the latest.
        disk: Where the files go; tests give one that fails.

    Raises:
        RunFileError: The file exists, another process records into it, or the folder cannot be written.
    """

    keep_bytes = 256 << 20
    """Memory for rows while the disk takes none; beyond that the oldest are dropped, and counted."""

    part_bytes = 16 << 20
    """Memory of the rows that go into one part at most."""

    merge_at = 32
    """Parts are put together when there are so many of a size."""

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        flush_seconds: float = 5.0,
        flush_rows: int = 256,
        disk: Disk | None = None,
    ) -> None:
        if overwrite and resume:
            raise RunFileError(f"{path}: overwrite=True and resume=True contradict each other; leave one of them out.")
        self.path = Path(path)
        self._resume, self._disk = resume, disk or Disk()
        self._flush_seconds, self._flush_rows = flush_seconds, flush_rows
        self._process = os.getpid()
        self._store = Store(self.path, self._disk, self.merge_at)
        self._backlog = Backlog(self.keep_bytes)
        self._header: Header | None = None
        self._notes: dict[str, Any] = {}
        self._epochs: dict[int, dict[str, float]] = {}
        self._dropped_before = 0
        self._changed = False  # metrics or notes that no file holds yet
        self._rewind: tuple[int, int] | None = None
        self._asked = self._answered = self._refused = 0  # flushes, by number
        self._wake = threading.Condition()
        self._closing = self._warned = False
        self._thread: threading.Thread | None = None
        self._lock = self._claim(overwrite or resume)
        _open.add(self)

    # ---- as a sink

    def start(self, header: Header) -> None:
        """Write the header; the file exists, and can be opened, from here on.

        Raises:
            RunFileError: The disk takes nothing; or the run to go on with is of another model, is not there, or
                was not told from where it goes on.
        """
        if self._foreign():
            return
        header = replace(header, provenance={**header.provenance, **self._notes})
        try:
            self._begin(header)
        except OSError as error:
            self._give_up()
            raise RunFileError(
                f"{self.path}: cannot be written here ({error}). Choose another place with --out."
            ) from error
        except BaseException:
            self._give_up()
            raise
        self._thread = threading.Thread(target=self._run, name="gradprobe-writer", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        """Queue one row; returns at once."""
        if self._foreign():
            return
        with self._wake:
            if self._closing:
                return
            self._backlog.put(row)
            if len(self._backlog) == self._flush_rows:
                self._wake.notify_all()

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Queue metrics of one epoch; several calls for one epoch add up.

        A ``/`` in a name is stored as a dot: HDF5 would make a group of it.

        Raises:
            RunFileError: A metric is called ``epoch``, which is the name of the axis.
        """
        named = {name.replace("/", "."): float(value) for name, value in values.items()}
        if schema.EPOCH in named:
            raise RunFileError(f"{self.path}: a metric cannot be called 'epoch', as its axis is; rename it.")
        if self._foreign():
            return
        with self._wake:
            self._epochs.setdefault(epoch, {}).update(named)
            self._changed = True

    def annotate(self, values: Mapping[str, Any]) -> None:
        """Add to the provenance of the run what became known only after its start."""
        if self._foreign():
            return
        with self._wake:
            self._notes.update(values)
            if self._header is not None:
                self._header = replace(self._header, provenance={**self._header.provenance, **values})
            self._changed = True

    def rewind(self, step: int, epoch: int) -> None:
        """The training goes on from ``step``: rows from there on, and metrics of epochs after ``epoch``, are cut.

        Before :meth:`start` it says where a run is gone on with; later, that the training has gone back.
        """
        if self._foreign():
            return
        with self._wake:
            self._rewind = (step, epoch)
            self._backlog.cut(step)
            self._epochs = {e: v for e, v in self._epochs.items() if e <= epoch}
        if self._thread is not None:
            self.flush()

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until all that was written is on the disk.

        Returns:
            False: it is not; the disk takes nothing at present, or not within ``timeout`` seconds.
        """
        if self._foreign() or self._thread is None:
            return True
        with self._wake:
            self._asked += 1
            ticket = self._asked
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._closing or ticket <= max(self._answered, self._refused), timeout=timeout)
            return self._answered >= ticket

    def close(self, end: str = "finished") -> None:
        """Flush, merge all into one file, and let go of it. A second call does nothing.

        Raises:
            RunFileError: The disk did not take the last rows; says how many and where the rest is.
        """
        if self._foreign():
            return
        with self._wake:
            if self._closing:
                return
            if self._header is None:
                self._adopt()
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        try:
            if self._header is not None:
                self._finish(end)
        except OSError as error:
            raise RunFileError(
                f"{self.path}: could not be completed ({error}); {len(self._backlog)} rows are lost, what was "
                f"flushed before is in {self._store.folder.name}/ beside it and can be read as it is."
            ) from error
        finally:
            self._give_up()

    # ---- the beginning

    def _claim(self, may_exist: bool) -> Lock:
        """Make sure that the run is ours before anything is touched."""
        try:
            lock = self._locked()
        except OSError as error:
            raise RunFileError(
                f"{self.path}: cannot be written here ({error}). Choose another place with --out."
            ) from error
        if self._exists() and not may_exist:
            self._store.remove_folder()
            lock.release()
            raise RunFileError(
                f"{self.path}: this run exists. Choose another file with --out, replace it with --overwrite, "
                "or go on with it with --resume."
            )
        self._store.sweep()
        return lock

    def _locked(self) -> Lock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(100):
            try:
                self._disk.mkdir(self._store.folder)
                lock = Lock(self._store.folder / "lock", self.path, self._disk)
            except FileNotFoundError:  # its last holder is just removing the folder
                if attempt == 99:
                    raise
                time.sleep(0.01)
                continue
            if lock.is_current():
                return lock
            lock.release()
        raise OSError("the lock file is removed again and again")

    def _exists(self) -> bool:
        return self.path.exists() or bool(parts.paths(self.path))

    def _begin(self, header: Header) -> None:
        if self._resume and self._exists():
            if self._rewind is None:
                raise RunFileError(
                    f"{self.path}: to go on with this run, the probe must know from which step: call "
                    "probe.load_state_dict(state) before the first step, or replace the run with overwrite=True."
                )
            header, kept = self._store.go_on(header, *self._rewind)
            self._epochs = {e: {**kept.get(e, {}), **self._epochs.get(e, {})} for e in {*kept, *self._epochs}}
        elif self._resume and self._rewind is not None and self._rewind[0] > 0:
            raise RunFileError(
                f"{self.path}: no such run to go on with; its rows before step {self._rewind[0]} are missing. "
                "Put the file back, or record anew without --resume."
            )
        else:
            self._store.begin(header)
        self._rewind = None
        self._dropped_before = self._store.state.dropped
        self._header = header

    def _adopt(self) -> None:
        """Closed before anything was measured in this session: the run that is there ends all the same."""
        if not (self._resume and self._rewind is not None and self._exists()):
            return
        nothing = Header((), (), np.zeros(0, np.int64), np.zeros((0, 0), bool), self._notes)
        try:
            self._begin(nothing)
        except OSError as error:
            log.warning("%s: stays as it was (%s)", self.path, error)

    # ---- the writer thread

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work, timeout=self._flush_seconds)
                if self._closing:
                    return
            if not self._try_write():
                with self._wake:
                    self._wake.wait_for(lambda: self._closing, timeout=min(self._flush_seconds, 1.0))

    def _has_work(self) -> bool:
        asked = self._asked > max(self._answered, self._refused)
        return self._closing or asked or len(self._backlog) >= self._flush_rows

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
            log.warning("%s: recording again", self.path)
            self._warned = False
        self._answer(answered=ticket)
        with self._wake:
            header, epochs = self._described()
        try:
            self._store.tidy(header, epochs)
        except Exception as error:
            self._complain(error)
            return False
        return True

    def _answer(self, *, answered: int = 0, refused: int = 0) -> None:
        with self._wake:
            self._answered, self._refused = max(self._answered, answered), max(self._refused, refused)
            self._wake.notify_all()

    def _complain(self, error: Exception) -> None:
        if not self._warned:
            log.warning(
                "%s: cannot be written now (%s); training goes on, rows are kept in memory and written when "
                "there is space again",
                self.path,
                error,
            )
        self._warned = True

    def _write_queued(self, end: str = "") -> None:
        """Turn what is queued into parts; the last one holds ``end``."""
        with self._wake:
            left, rewind = len(self._backlog), self._rewind
        if rewind is not None:
            self._store.rewind(*self._described(), rewind[0])
            with self._wake:
                self._rewind = None if self._rewind == rewind else self._rewind
        while left > 0 or self._changed or end:
            written = self._write_part(end)
            left -= written
            if not written or (end and left <= 0):
                return

    def _write_part(self, end: str) -> int:
        """One part from the oldest rows; returns how many."""
        state = self._store.state
        with self._wake:
            rows = self._backlog.take(self.part_bytes)
            header, epochs = self._described()
            changed, self._changed = self._changed, False
            state.dropped = self._dropped_before + self._backlog.dropped
            state.end = end if len(rows) == len(self._backlog) else ""
        if not rows and not changed and not end:
            return 0
        try:
            self._store.append(header, epochs, content.columns(rows, header, state))
        except BaseException:
            with self._wake:
                self._backlog.back(None if self._rewind is None else self._rewind[0])
                self._changed = self._changed or changed
            raise
        with self._wake:
            self._backlog.done()
        return len(rows)

    def _described(self) -> tuple[Header, dict[int, dict[str, float]]]:
        assert self._header is not None
        return self._header, {e: dict(v) for e, v in self._epochs.items()}

    # ---- the end

    def _finish(self, end: str) -> None:
        """The last part says how the run ended, so that nothing after it needs to succeed."""
        self._write_queued(end)
        with self._wake:
            header, epochs = self._described()
        self._store.finish(header, epochs)

    def _give_up(self) -> None:
        """Let go of the run, and of the folder if nothing is in it."""
        self._closing = True
        _open.discard(self)
        self._store.remove_folder()
        self._lock.release()

    def _foreign(self) -> bool:
        """Whether this is the copy that a forked child inherited."""
        return os.getpid() != self._process


_open: weakref.WeakSet[RunWriter] = weakref.WeakSet()


@atexit.register
def _close_what_is_open() -> None:
    """A program that ends without ``close`` still gets a complete file."""
    for writer in list(_open):
        try:
            writer.close("left open: the program ended without closing the run")
        except GradprobeError as error:
            log.warning("%s", error)
