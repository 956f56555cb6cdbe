"""Writes a run while training goes on, so that whatever was flushed survives a kill at any moment.

The main thread only queues rows; a thread (:mod:`gradprobe.runfile.flusher`) brings them to the disk
(:mod:`gradprobe.runfile.store`). What it cannot write it keeps, up to a bound, and tries again. In a forked child a
writer is dead: it takes rows and closes without touching anything.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.errors import RunFileError, tell
from gradprobe.rows import TABLE_NAMES, AnyRow, Header, TestClusters
from gradprobe.rows.layers import moved
from gradprobe.rows.limits import MAX_METRICS
from gradprobe.runfile import content, schema, storable
from gradprobe.runfile.flusher import Flusher
from gradprobe.runfile.lock import Lock, acquire
from gradprobe.runfile.pieces import part_paths
from gradprobe.runfile.store import Store
from gradprobe.whole_files import Disk, target, telling

_log = logging.getLogger("gradprobe")


class RunWriter:
    """A sink (see :class:`gradprobe.rows.ResumableSink`) that keeps a run in one HDF5 file. Safe in threads.

    Args:
        path: Where the file goes; ``PATH.parts/`` beside it holds what is not merged yet. Of a symbolic link, where it
            leads.
        overwrite: Replace a run that is there.
        resume: Go on with the run that is there, from where :meth:`rewind` says. No run there, and nothing to
            go back to: a new one.
        flush_seconds, flush_rows: A row is on the disk after so much time, or so many rows, at the latest.
        disk: Where the files go; tests give one that fails.

    Raises:
        RunFileError: The file exists, another process records into it, the folder cannot be written, or something else
            than a file is there.

    Attributes:
        path: Of the file; no link.
        trouble: What of the run could not be written when it was closed, and what to do; empty: nothing.
    """

    tables = TABLE_NAMES
    """It takes rows of all tables."""

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
        with telling(Path(path)):
            given = Path(path).absolute()  # a program may change its folder while it records
        with telling(given):
            self.path = target(given, overwrite=not resume, run=True)
        self._overwrite, self._resume, self._disk = overwrite, resume, disk or Disk()
        self._process = os.getpid()
        self._store = Store(self.path, self._disk, self.merge_at)
        self._flusher = Flusher(self._store, flush_seconds, flush_rows, self.keep_bytes, self.part_bytes)
        self._notes: dict[str, Any] = {}
        self._places: NDArray[np.intp] | None = None  # of the session's layers in the file; None: at its beginning
        self.trouble, self._interrupted = "", False
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
        header = replace(self._storable(header), provenance={**header.provenance, **self._notes})
        try:
            with telling(self.path):
                self._begin(header)
        except BaseException as error:
            self.trouble = str(error)
            self._give_up()
            raise
        self._flusher.start()

    @property
    def started(self) -> bool:
        """Whether this writer has begun to write: until then nothing that was there was touched."""
        return self._flusher.header is not None

    def write(self, row: AnyRow) -> None:
        """Queue one row of any table; returns at once. A table is in the file from its first row on."""
        if self._foreign():
            return
        with self._flusher.lock:
            if self._flusher.closing:
                return
            if not storable.is_step(row.step):  # without one it is no row
                if not self._flusher.stepless:
                    step = storable.shown(row.step)
                    _log.warning("%s: a row is dropped, as every other of the kind: its step is %s", self.path, step)
                self._flusher.stepless += 1
                return
            known = self._flusher.header
            if known is not None and not known.held.issuperset(row.brings):
                self._flusher.header = replace(known, held=known.held.union(row.brings))
            self._flusher.backlog.put(row if self._places is None else moved(row, self._places))
            if self._flusher.due:
                self._flusher.lock.notify_all()

    def grow(self, header: Header) -> None:
        """Layers have joined, or features were found; see :class:`gradprobe.rows.GrowingSink`.

        Rows before lack the layers: they get NaN there.

        Raises:
            RunFileError: The header has other tasks, or other features than the run that is gone on with has rows of.
        """
        if self._foreign():
            return
        header = self._storable(header)
        with self._flusher.lock:
            known = self._flusher.header
            if known is None:
                return
            if tuple(known.tasks) != tuple(header.tasks):
                raise RunFileError(
                    f"{self.path}: holds rows of tasks {list(known.tasks)}; layers of {list(header.tasks)} cannot join."
                )
            if known.features and header.features and known.feature_names != header.feature_names:
                raise RunFileError(
                    f"{self.path}: holds rows of the features {list(known.feature_names)}, but the run to go on "
                    f"with has {list(header.feature_names)}. Resume with the same model and the same features=."
                )
            grown, self._places = content.with_layers(known, header)
            self._flusher.header = replace(grown, features=known.features or header.features)
            self._flusher.changed = True

    def _storable(self, header: Header) -> Header:
        try:
            return storable.header(header)
        except ValueError as error:
            raise RunFileError(f"{self.path}: {error}") from error

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Queue metrics of one epoch; several calls for one epoch add up.

        A ``/`` in a name is stored as a dot: HDF5 would make a group of it.

        Raises:
            RunFileError: A metric is called ``epoch``, which is the name of the axis; or the epoch is no number.
        """
        if not isinstance(epoch, (int, np.integer)):
            raise RunFileError(f"{self.path}: epoch {epoch!r} of the metrics {list(values)} is not a whole number.")
        named, wrong = storable.metrics(values)
        odd = [name for name in named if not name.strip(".")]
        if odd:
            raise RunFileError(f"{self.path}: {odd[0]!r} cannot be the name of a metric; rename it.")
        if schema.EPOCH in named:
            raise RunFileError(f"{self.path}: a metric cannot be called 'epoch', as its axis is; rename it.")
        if not 0 <= epoch < 2**31:
            raise RunFileError(f"{self.path}: epoch {epoch} of the metrics {list(named)} is not below 2**31.")
        if self._foreign():
            return
        if wrong:
            _log.warning("%s: epoch %d: no number, stored as NaN: %s", self.path, epoch, storable.joined(wrong))
        with self._flusher.lock:
            known = {name for each in self._flusher.epochs.values() for name in each}
            if len(known.union(named)) > MAX_METRICS:
                raise RunFileError(
                    f"{self.path}: {len(known.union(named)):,} metrics per epoch; a run file holds {MAX_METRICS:,}."
                )
            self._flusher.epochs.setdefault(int(epoch), {}).update(named)
            self._flusher.changed = True

    def annotate(self, values: Mapping[str, Any]) -> None:
        """Add to the provenance of the run what became known only after its start."""
        if self._foreign():
            return
        with self._flusher.lock:
            self._notes.update(values)
            if self._flusher.header is not None:
                self._flusher.header = replace(
                    self._flusher.header, provenance={**self._flusher.header.provenance, **values}
                )
            self._flusher.changed = True

    def write_test(self, found: TestClusters | None) -> None:
        """Metrics of the test split by cluster of images; None: there are none. Call it after :meth:`start`.

        Raises:
            RunFileError: What is given for numbers is none, not as many as the names, or more than a file can hold.
        """
        if self._foreign():
            return
        try:
            found = found and storable.clusters(found)
        except ValueError as error:
            raise RunFileError(f"{self.path}: metrics of the test split: {error}") from error
        with self._flusher.lock:
            if self._flusher.header is not None:
                self._flusher.header = replace(self._flusher.header, test=found)
                self._flusher.changed = True

    def rewind(self, step: int, epoch: int) -> None:
        """The training goes on from ``step``: rows from there on, and metrics of epochs after ``epoch``, are cut.

        Before :meth:`start` it says where a run is gone on with; later, that the training has gone back.
        """
        if self._foreign():
            return
        with self._flusher.lock:
            self._flusher.rewound = (step, epoch)
            self._flusher.backlog.cut(step)
            self._flusher.epochs = {e: v for e, v in self._flusher.epochs.items() if e <= epoch}
        if self._flusher.running:
            self.flush()

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until all that was written is on the disk.

        Returns:
            False: it is not; the disk takes nothing at present, or not within ``timeout`` seconds.
        """
        return self._foreign() or self._flusher.flush(timeout)

    def close(self, end: str = "finished") -> None:
        """Flush, merge all into one file, and let go of it. A second call does nothing.

        Where it is called while an exception is under way, which it would hide, an error of its own is a warning.

        Raises:
            RunFileError: The disk did not take the last rows; says how many and where the rest is.
        """
        if self._foreign():
            return
        with self._flusher.lock:
            if self._flusher.closing and not self._interrupted:
                return
            self._flusher.closing, self._interrupted = True, False
            if self._flusher.header is None:
                self._adopt()
        under_way = sys.exc_info()[1] is not None
        try:
            self._complete(end)
        except RunFileError as error:
            self.trouble = str(error)
            if not under_way:
                raise
            tell(self.trouble)

    def _complete(self, end: str) -> None:
        try:
            self._flusher.stop()
            if self._flusher.header is not None:
                self._flusher.finish(end)
        except Exception as error:
            self._give_up()
            raise RunFileError(
                f"{self.path}: could not be completed ({error}); {len(self._flusher.backlog)} rows are lost. "
                f"What was flushed before can be read as it is: gradprobe summary {self.path}"
            ) from error
        except BaseException:  # an impatient Ctrl-C: the next call goes on, at the end of the program at the latest
            self._interrupted = True
            raise
        self._give_up()

    # ---- the beginning

    def _claim(self, may_exist: bool) -> Lock:
        """Make sure that the run is ours before anything is touched."""
        with telling(self.path):
            self._store.lock = lock = acquire(self.path, self._store.folder, self._disk)
        if self._exists() and not may_exist:
            self._store.release()
            lock.release()
            raise self._there()
        self._store.sweep()
        return lock

    def _there(self) -> RunFileError:
        return RunFileError(
            f"{self.path}: this run exists. Choose another file with --out, replace it with --overwrite, "
            "or go on with it with --resume."
        )

    def _exists(self) -> bool:
        return self.path.exists() or bool(part_paths(self.path))

    def _begin(self, header: Header) -> None:
        if self._resume and self._exists():
            if self._flusher.rewound is None:
                raise RunFileError(
                    f"{self.path}: to go on with this run, the probe must know from which step: call "
                    "probe.load_state_dict(state) before the first step, or replace the run with overwrite=True."
                )
            header, kept = self._store.resume(header, *self._flusher.rewound)
            self._flusher.epochs = {
                e: {**kept.get(e, {}), **self._flusher.epochs.get(e, {})} for e in {*kept, *self._flusher.epochs}
            }
        elif self._resume and self._flusher.rewound is not None and self._flusher.rewound[0] > 0:
            raise RunFileError(
                f"{self.path}: no such run to go on with; its rows before step {self._flusher.rewound[0]} are missing. "
                "Put the file back, or record anew without --resume."
            )
        elif self._exists() and not (self._overwrite or self._resume):  # it was made since this writer was
            raise self._there()
        else:
            self._store.begin(header)
        self._flusher.store_opened(header)

    def _adopt(self) -> None:
        """Closed before anything was measured in this session: the run that is there ends all the same."""
        if not (self._resume and self._flusher.rewound is not None and self._exists()):
            return
        nothing = Header((), (), np.zeros(0, np.int64), np.zeros((0, 0), bool), self._notes)
        try:
            self._begin(nothing)
        except (OSError, RunFileError) as error:
            _log.warning("%s: stays as it was (%s)", self.path, error)

    # ---- the end

    def _give_up(self) -> None:
        """Let go of the run, and of the folder if nothing is in it."""
        self._flusher.closing = True
        _open.discard(self)
        self._store.release()
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
            writer.close("failed: the program ended without closing it")
        except Exception as error:
            _log.warning("%s", error)
