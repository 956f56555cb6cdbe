"""Writes a run while training goes on, so that whatever was flushed survives a kill at any moment.

The main thread only queues rows. A writer thread turns each block of them into an immutable *part*, a whole run
file of its own in ``conflict.h5.parts/``. Parts are merged into ``conflict.h5`` when there are many, and at the
end, by writing a new file and renaming it over the old one. The merged file says through which part it goes
(``merged_through``), so a kill between the rename and the removal of the parts counts no row twice.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradprobe.errors import RunFileError
from gradprobe.rows import FeatureHeader, FeatureRow, Header, Row
from gradprobe.runfile import content, features, schema
from gradprobe.runfile.files import Lock, sync_folder, write_whole
from gradprobe.runfile.reader import Run, part_paths

log = logging.getLogger("gradprobe")


class RunWriter:
    """A sink (see :class:`gradprobe.rows.Sink`) that keeps a run in one HDF5 file.

    Args:
        path: Where the file goes; ``PATH.parts/`` beside it holds what is not merged yet.
        overwrite: Replace a run that is there.
        resume_at: Go on with the run that is there, from this step: its rows from this step on are cut.
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
        flush_seconds: float = 5.0,
        flush_rows: int = 256,
    ) -> None:
        self.path = Path(path)
        self._parts = self.path.with_name(self.path.name + schema.PARTS_SUFFIX)
        self._resume_at = resume_at
        self._flush_seconds, self._flush_rows = flush_seconds, flush_rows
        self._state = content.State()
        self._header: Header | None = None
        self._rows: list[Row] = []
        self._features = features.Queue(self.keep_rows)
        self._epochs: dict[int, dict[str, float]] = {}
        self._written_epochs = 0
        self._part_number = 0
        self._parts_rows = self._merged_rows = 0
        self._wake = threading.Condition()
        self._disk = threading.Lock()  # held by whoever flushes or merges
        self._closing = False
        self._warned = False
        self._thread: threading.Thread | None = None
        self._lock = self._claim(overwrite or resume_at is not None)
        self._replace = overwrite and resume_at is None

    def start(self, header: Header) -> None:
        """Write the header; the file exists, and can be opened, from here on.

        Raises:
            RunFileError: The disk takes nothing, or the run to go on with is of another model.
        """
        self._header = header
        try:
            self._begin()
        except BaseException:
            self._closing = True
            self._lock.release()
            raise
        self._thread = threading.Thread(target=self._run, name="gradprobe-writer", daemon=True)
        self._thread.start()

    def _begin(self) -> None:
        if self._replace:  # only now: until here the new run might have failed to begin
            self._remove_old()
        try:
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

    def start_features(self, header: FeatureHeader) -> None:
        """Announce the features; see :class:`gradprobe.rows.FeatureSink`."""
        with self._wake:
            self._features.header = header

    def write_features(self, row: FeatureRow) -> None:
        """Queue one feature row; returns at once."""
        with self._wake:
            self._state.dropped += self._features.put(row)
            if len(self._features.rows) >= self._flush_rows:
                self._wake.notify()

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Queue metrics of one epoch; several calls for one epoch add up.

        A ``/`` in a name is stored as a dot: HDF5 would make a group of it.

        Raises:
            RunFileError: A metric is called ``epoch``, which is the name of the axis.
        """
        named = {name.replace("/", "."): float(value) for name, value in values.items()}
        if schema.EPOCH in named:
            raise RunFileError(f"{self.path}: a metric cannot be called 'epoch', as its axis is; rename it.")
        with self._wake:
            self._epochs.setdefault(epoch, {}).update(named)
            self._written_epochs = -1

    def annotate(self, values: Mapping[str, Any]) -> None:
        """Add to the provenance of the run what became known only after its start."""
        with self._wake:
            if self._header is not None:
                self._header = replace(self._header, provenance={**self._header.provenance, **values})

    def flush(self) -> None:
        """Bring all rows so far to the disk now; a disk that takes none is complained of, once, and tried again."""
        if self._header is not None and not self._closing:
            self._try_flush()

    def close(self, end: str = "finished") -> None:
        """Flush, merge all into one file, and let go of it. A second call does nothing.

        Raises:
            RunFileError: The disk did not take the last rows; says how many and where the rest is.
        """
        if self._closing:
            return
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
                shutil.rmtree(self._parts, ignore_errors=True)
        except OSError as error:
            raise RunFileError(
                f"{self.path}: could not be completed ({error}); {len(self._rows)} rows are lost, what was "
                f"flushed before is in {self._parts.name}/ beside it and can be read as it is."
            ) from error
        finally:
            self._lock.release()
            if self._header is None:
                shutil.rmtree(self._parts, ignore_errors=True)

    def _claim(self, may_exist: bool) -> Lock:
        """Make sure that the run is ours before anything is touched."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            existed = self._parts.exists()
            self._parts.mkdir(exist_ok=True)
            lock = Lock(self._parts / "lock", self.path)
        except OSError as error:
            raise RunFileError(
                f"{self.path}: cannot be written here ({error}). Choose another place with --out."
            ) from error
        if (self.path.exists() or part_paths(self.path)) and not may_exist:
            lock.release()
            if not existed:
                shutil.rmtree(self._parts, ignore_errors=True)
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
            self._check_same(old)
            keep = int((old["step"] < step).sum())
            epoch = int(old["epoch"][keep - 1]) if keep else -1
            self._epochs = {e: v for e, v in old.epochs_by_number().items() if e <= epoch}
            self._part_number = self._state.merged_through = old.last_part
            self._state.status_names = list(old.status_names)
            self._state.dropped = old.rows_dropped
            self._write_merged(old, keep, self._state, before=step)

    def _check_same(self, old: Run) -> None:
        assert self._header is not None
        if list(old.layers) != list(self._header.layers) or list(old.tasks) != list(self._header.tasks):
            raise RunFileError(
                f"{self.path}: holds tasks {list(old.tasks)} on {len(old.layers)} layers, but the run to go on has "
                f"tasks {list(self._header.tasks)} on {len(self._header.layers)} layers. Resume with the same model."
            )

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._closing or max(len(self._rows), len(self._features.rows)) >= self._flush_rows,
                    timeout=self._flush_seconds,
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
            except OSError as error:
                self._complain(error)
                return False
            if self._warned:
                log.warning("%s: recording again", self.path)
                self._warned = False
            return True

    def _complain(self, error: OSError) -> None:
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
            feature_rows = list(self._features.rows)
        if not rows and not pending and not feature_rows:
            return
        block = content.columns(rows, header, self._state)
        number = self._part_number + 1
        write_whole(
            self._parts / f"{number:08d}.h5",
            lambda file: content.fill(
                file, header, self._state, len(rows), [block], epochs, *self._features.part(feature_rows)
            ),
        )
        with self._wake:
            # Rows dropped meanwhile were the oldest, and are in the part just written: not lost after all.
            written = {id(row) for row in rows}
            left = [row for row in self._rows if id(row) not in written]
            self._state.dropped -= len(rows) + len(left) - len(self._rows)
            self._rows = left
            self._features.done(feature_rows)
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

    def _write_merged(self, old: Run | None, rows: int, state: content.State, before: int | None = None) -> None:
        header = self._header
        assert header is not None
        with self._wake:
            epochs = {e: dict(v) for e, v in self._epochs.items()}
        blocks = old.blocks(rows) if old is not None else []
        stored = self._features.merged(old.features if old is not None else {}, header.tasks, before)
        write_whole(self.path, lambda file: content.fill(file, header, state, rows, blocks, epochs, *stored))
        self._merged_rows, self._parts_rows = rows, 0
