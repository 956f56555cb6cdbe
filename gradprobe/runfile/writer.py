"""Writes a run while training goes on, so that whatever was flushed survives a kill at any moment.

The main thread only queues rows. A writer thread turns each block of them into an immutable *part*, a whole run
file of its own in ``conflict.h5.parts/``. Parts are merged into ``conflict.h5`` when there are many, and at the
end, by writing a new file and renaming it over the old one. The merged file says through which part it goes
(``merged_through``), so a kill between the rename and the removal of the parts counts no row twice.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.errors import RunFileError
from gradprobe.rows import Header, Row
from gradprobe.runfile import content, schema
from gradprobe.runfile.files import Lock, sync_folder, write_whole
from gradprobe.runfile.reader import Run, part_paths

log = logging.getLogger("gradprobe")


class RunWriter:
    """A sink (see :class:`gradprobe.rows.Sink`) that keeps a run in one HDF5 file.

    Args:
        path: Where the file goes; ``PATH.parts/`` beside it holds what is not merged yet.
        overwrite: Replace a run that is there.
        resume_at: Go on with the run that is there, from this step: its rows from this step on are cut.
        resume_epoch: With it: epochs from this one on are cut too. None: they stay until they are written again.
        flush_seconds, flush_rows: A row is on the disk after so much time, or so many rows, at the latest.

    Raises:
        RunFileError: The file exists, another process records into it, or the folder cannot be written.
    """

    merge_at = 64
    """Parts are merged when there are so many, and hold a quarter of the merged rows: so that merging stays
    cheap against what was written."""

    keep_rows = 100_000
    """Rows kept in memory while the disk takes none; beyond that the oldest are dropped, and counted."""

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        resume_at: int | None = None,
        resume_epoch: int | None = None,
        flush_seconds: float = 5.0,
        flush_rows: int = 256,
    ) -> None:
        self.path = Path(path)
        if not self.path.name or self.path.is_dir():
            raise RunFileError(f"{self.path}: is a folder, or no name. Name a file, such as --out conflict.h5.")
        self._parts = self.path.with_name(self.path.name + schema.PARTS_SUFFIX)
        self._resume_at, self._resume_epoch = resume_at, resume_epoch
        self._process = os.getpid()
        self._flush_seconds, self._flush_rows = flush_seconds, flush_rows
        self._state = content.State()
        self._header: Header | None = None
        self._rows: list[Row] = []
        self._epochs: dict[int, dict[str, float]] = {}
        self._written_epochs = 0
        self._part_number = 0
        self._parts_rows = self._merged_rows = 0
        self._wake = threading.Condition()
        self._disk = threading.Lock()  # held by whoever flushes or merges
        self._closing = False
        self._warned = False
        self._thread: threading.Thread | None = None
        self._made_folder = not self._parts.exists()
        self._lock = self._claim(overwrite or resume_at is not None)
        self._replace = overwrite and resume_at is None

    def start(self, header: Header) -> None:
        """Write the header; the file exists, and can be opened, from here on.

        Raises:
            RunFileError: The disk takes nothing, or the run to go on with is of another model.
        """
        if self._header is not None:  # resumed before the probe knew the layers
            self._check_same(self._header, header)
            return
        self._header = header
        try:
            self._begin()
        except BaseException:
            self._closing = True
            self._lock.release()
            raise
        atexit.register(self.close, "failed: the program ended without closing it")
        self._thread = threading.Thread(target=self._run, name="gradprobe-writer", daemon=True)
        self._thread.start()

    def resume(self, provenance: Mapping[str, Any]) -> None:
        """Go on at once with the run that is there, under its own header; a later :meth:`start` must fit it.

        So that a resumed run which measures nothing more still ends as it did, with its last epochs.

        Args:
            provenance: Added to that of the run.
        """
        with Run(self.path) as old:
            stored = {**old.provenance, **provenance}
            header = Header(old.tasks, old.layers, old.layer_size, old.reach, stored)
        self.start(header)

    @property
    def started(self) -> bool:
        """Whether this writer has begun to write: until then nothing that was there was touched."""
        return self._header is not None

    def _begin(self) -> None:
        try:
            if self._replace:  # only now: until here the new run might have failed to begin
                self._remove_old()
            if self._resume_at is not None and self.path.exists():
                self._continue(self._resume_at)
            self._merge()
        except OSError as error:
            raise RunFileError(
                f"{self.path}: cannot be written here ({error}). Choose another place with --out."
            ) from error

    def write(self, row: Row) -> None:
        """Queue one row; returns at once."""
        with self._wake:
            self._rows.append(row)
            if len(self._rows) > self.keep_rows:
                del self._rows[0]
                self._state.dropped += 1
            if len(self._rows) >= self._flush_rows:
                self._wake.notify()

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Queue metrics of one epoch; several calls for one epoch add up.

        A ``/`` in a name is stored as a dot: HDF5 would make a group of it.

        Raises:
            RunFileError: A metric is called ``epoch``, which is the name of the axis; or the epoch is no number.
        """
        if not isinstance(epoch, (int, np.integer)):
            raise RunFileError(f"{self.path}: epoch {epoch!r} of the metrics {list(values)} is not a whole number.")
        named = {name.replace("/", "."): float(value) for name, value in values.items()}
        if schema.EPOCH in named:
            raise RunFileError(f"{self.path}: a metric cannot be called 'epoch', as its axis is; rename it.")
        with self._wake:
            self._epochs.setdefault(int(epoch), {}).update(named)
            self._written_epochs = -1

    def annotate(self, values: Mapping[str, Any]) -> None:
        """Add to the provenance of the run what became known only after its start."""
        with self._wake:
            if self._header is not None:
                self._header = replace(self._header, provenance={**self._header.provenance, **values})

    def flush(self) -> bool:
        """Bring all rows so far to the disk now; a disk that takes none is complained of, once, and tried again.

        Returns:
            Whether they are there.
        """
        return self._header is None or self._closing or self._try_flush()

    def close(self, end: str = "finished") -> None:
        """Flush, merge all into one file, and let go of it. A second call does nothing.

        Raises:
            RunFileError: The disk did not take the last rows; says how many and where the rest is.
        """
        if self._closing or os.getpid() != self._process:  # a forked child must not touch its parent's file
            return
        atexit.unregister(self.close)
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self._state.end = end
        try:
            if self._header is not None:
                self._flush()
                self._merge()
                self._remove_folder()
            elif self._made_folder:
                self._remove_folder()
        except Exception as error:
            raise RunFileError(
                f"{self.path}: could not be completed ({error}); {len(self._rows)} rows are lost. "
                f"What was flushed before can be read as it is: gradprobe summary {self.path}"
            ) from error
        finally:
            self._lock.release()

    def _remove_folder(self) -> None:
        """While the lock is held, and only without a part in it: parts are all that is left of a killed run."""
        if not part_paths(self.path):
            shutil.rmtree(self._parts, ignore_errors=True)

    def _claim(self, may_exist: bool) -> Lock:
        """Make sure that the run is ours before anything is touched."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._parts.mkdir(exist_ok=True)
            lock = Lock(self._parts / "lock", self.path)
        except OSError as error:
            raise RunFileError(
                f"{self.path}: cannot be written here ({error}). Choose another place with --out."
            ) from error
        if (self.path.exists() or part_paths(self.path)) and not may_exist:
            if self._made_folder:
                self._remove_folder()
            lock.release()
            raise RunFileError(
                f"{self.path}: this run exists. Choose another file with --out, replace it with --overwrite, "
                "or go on with it with --resume."
            )
        return lock

    def _remove_old(self) -> None:
        self.path.unlink(missing_ok=True)
        for part in part_paths(self.path):
            part.unlink(missing_ok=True)

    def _continue(self, step: int) -> None:
        """Cut the rows from ``step`` on, in one rename, and go on behind the rest."""
        assert self._header is not None
        with Run(self.path) as old:
            self._check_same(old, self._header)
            keep = int((old["step"] < step).sum())
            last = self._resume_epoch
            kept = {e: v for e, v in old.epochs_by_number().items() if last is None or e < last}
            self._epochs = {**kept, **self._epochs}
            self._part_number = self._state.merged_through = old.last_part
            self._state.status_names = list(old.status_names)
            self._state.dropped = old.rows_dropped
            self._write_merged(old, keep, self._state)

    def _check_same(self, old: Run | Header, new: Header) -> None:
        if list(old.layers) != list(new.layers) or list(old.tasks) != list(new.tasks):
            raise RunFileError(
                f"{self.path}: holds tasks {list(old.tasks)} on {len(old.layers)} layers, but the run to go on has "
                f"tasks {list(new.tasks)} on {len(new.layers)} layers. Resume with the same model."
            )

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._closing or len(self._rows) >= self._flush_rows, timeout=self._flush_seconds
                )
                if self._closing:
                    return
            if not self._try_flush():
                time.sleep(min(self._flush_seconds, 1.0))

    def _try_flush(self) -> bool:
        with self._disk:
            try:
                self._flush()
                if self._part_number - self._state.merged_through >= self.merge_at and (
                    self._parts_rows * 4 >= self._merged_rows
                ):
                    self._merge()
            except Exception as error:  # the thread must live: rows that were not written stay queued
                self._complain(error)
                return False
            if self._warned:
                log.warning("%s: recording again", self.path)
                self._warned = False
            return True

    def _complain(self, error: Exception) -> None:
        if not self._warned:
            log.warning(
                "%s: cannot be written now (%s); training goes on, rows are kept in memory and written when "
                "there is space again",
                self.path,
                error,
            )
        self._warned = True

    def _flush(self) -> None:
        """Turn what is queued into one part; what cannot be written stays queued."""
        header = self._header
        assert header is not None
        with self._wake:
            rows, epochs = list(self._rows), {e: dict(v) for e, v in self._epochs.items()}
            pending = self._written_epochs != len(epochs)
        if not rows and not pending:
            return
        block = content.columns(rows, header, self._state)
        number = self._part_number + 1
        write_whole(
            self._parts / f"{number:08d}.h5",
            lambda file: content.fill(file, header, self._state, len(rows), [block], epochs),
        )
        with self._wake:
            # Rows dropped meanwhile were the oldest, and are in the part just written: not lost after all.
            written = {id(row) for row in rows}
            left = [row for row in self._rows if id(row) not in written]
            self._state.dropped -= len(rows) + len(left) - len(self._rows)
            self._rows = left
            self._written_epochs = len(epochs) if epochs == self._epochs else -1
            self._part_number = number
            self._parts_rows += len(rows)

    def _merge(self) -> None:
        """Put all parts into the one file, then remove them."""
        old = Run(self.path) if self.path.exists() or part_paths(self.path) else None
        try:
            state = replace(self._state, merged_through=self._part_number)
            self._write_merged(old, len(old) if old is not None else 0, state)
            self._state.merged_through = self._part_number
        finally:
            if old is not None:
                old.close()
        for part in part_paths(self.path):
            part.unlink(missing_ok=True)
        sync_folder(self._parts)

    def _write_merged(self, old: Run | None, rows: int, state: content.State) -> None:
        header = self._header
        assert header is not None
        with self._wake:
            epochs = {e: dict(v) for e, v in self._epochs.items()}
        blocks = old.blocks(rows) if old is not None else []
        write_whole(self.path, lambda file: content.fill(file, header, state, rows, blocks, epochs))
        self._merged_rows, self._parts_rows = rows, 0
