"""A run on the disk while it is written: the main file, the parts beside it, and how rows get from these into that.

Every method leaves the folder readable if it is cut off anywhere. Rows go into an immutable *part*, a whole run
file of its own in ``conflict.h5.parts/``. Parts are put together when there are many (:func:`parts.due`), and
into ``conflict.h5`` when they hold as many rows as it does, by writing a new file and renaming it over the old
one. A file says through which part it goes, so a kill before the parts are removed counts no row twice.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gradprobe.errors import RunFileError
from gradprobe.rows import FeatureHeader, Header
from gradprobe.rows.layers import begins_with
from gradprobe.runfile import content, schema, storable
from gradprobe.runfile.files import write_whole
from gradprobe.runfile.lock import Lock
from gradprobe.runfile.pieces import PartSpan, part_name, part_paths, part_span, parts_due, parts_folder
from gradprobe.runfile.reader import Run
from gradprobe.whole_files import Disk, replacing

_log = logging.getLogger("gradprobe")

_TIDY_AGAIN = 60.0
"""Seconds until parts are put together again where the disk had no room for that."""


@dataclass(frozen=True)
class _Part:
    span: PartSpan
    rows: int  # of all tables together


class Store:
    """The files of one run, for one thread.

    Args:
        path: The main file.
        disk: Where everything goes.
        fan: Parts are put together when there are so many of a size.
    """

    def __init__(self, path: Path, disk: Disk, fan: int) -> None:
        self.path, self.folder, self._disk, self._fan = path, parts_folder(path), disk, fan
        self.lock: Lock | None = None
        self._held = -1  # a descriptor of the main file as we wrote it last, whatever becomes of its name
        self._lost = 0  # rows of parts that were removed by somebody else
        self.state = content.State()
        self.sessions: list[content.Session] = [content.new_session()]
        self._parts: list[_Part] = []
        self._number = self._merged_rows = 0
        self._tidy_at = 0.0

    # ---- the beginning

    def begin(self, header: Header) -> None:
        """The header of a new run. What lies there under the same name is no longer counted, then removed."""
        self._number = self.state.merged_through = max((last for _, last in self._spans()), default=0)
        self._write_main(header, {}, {}, self.state)
        self._remove_parts()

    def resume(self, header: Header, step: int, epoch: int) -> tuple[Header, dict[int, dict[str, float]]]:
        """Cut what was recorded from ``step`` on, in one rename, and go on behind the rest.

        Args:
            header: Of the session that begins. Without layers, where nothing was measured yet: those of the run.
            step: Rows from this one on are cut.
            epoch: Metrics of later epochs are cut.

        Returns:
            The header, and the metrics that were kept.
        """
        with Run(self.path) as old:
            header = _same_layers(self.path, header, old, any(old["step"] < step))
            if old.unknown:
                what = ", ".join(old.unknown)
                _log.warning("%s: what this version does not know is left out from here on: %s", self.path, what)
            header = replace(header, features=_kept_features(old, step), held=_held(old, step))
            kept = {e: v for e, v in old.epochs_by_number().items() if e <= epoch}
            self._number = self.state.merged_through = old.last_part
            self.state.status_names = list(old.status_names)
            self.state.dropped = old.rows_dropped
            self.state.remember(old.provenance)
            flat = storable.provenance(header.provenance)
            before = {k: v for k, v in old.provenance.items() if k != "sessions"}
            self.sessions = content.resumed_sessions(old.sessions, old.end, before, flat, step)
            files = [p for p in (self.path, *part_paths(self.path)) if p.exists()]
            files = [p for p in files if p == self.path or _above(p, _merged_through(self.path))]
            self._cut(header, kept, step, files, None if old.by_effect else old)
        return header, kept

    # ---- while it goes on

    def append(self, header: Header, epochs: content.Epochs, rows: Mapping[str, content.Columns]) -> None:
        """One more part, on the disk when this returns.

        Args:
            header, epochs: As they are now.
            rows: By the group of the table.

        Raises:
            OSError: It could not be written; nothing has changed.
        """
        number = self._number + 1
        stretches = {group: content.Stretch(len(block[schema.STEP]), [block]) for group, block in rows.items()}
        self._write(self.folder / part_name((number, number)), header, epochs, self.state, stretches)
        self._number = number
        self._parts.append(_Part((number, number), _count(stretches)))

    def tidy(self, header: Header, epochs: content.Epochs) -> None:
        """Put parts together if there are many; where there is no room for that, they stay as they are."""
        if time.monotonic() < self._tidy_at:
            return
        taken = parts_due([last - first + 1 for first, last in (p.span for p in self._parts)], self._fan)
        if not taken or self._miss():
            return
        try:
            if sum(p.rows for p in self._parts) >= self._merged_rows:
                self.merge(header, epochs)
            else:
                self._compact(header, epochs, taken)
        except OSError:
            self._tidy_at = time.monotonic() + _TIDY_AGAIN

    def merge(self, header: Header, epochs: content.Epochs) -> None:
        """Put all parts into the main file, then remove them."""
        files = self._files()
        self._check_room(files)
        state = replace(self.state, merged_through=self._number)
        self._write_main(header, epochs, _stored(files, header), state)
        self._remove_parts()

    def rewind(self, header: Header, epochs: content.Epochs, step: int) -> None:
        """Cut the rows from ``step`` on, in one rename; the training has gone back."""
        self._cut(header, epochs, step, self._files())

    def _cut(
        self, header: Header, epochs: content.Epochs, step: int, files: Sequence[Path], old: Run | None = None
    ) -> None:
        """Keep the rows before ``step``; those of a run of an earlier version as they are read now."""
        self.state.seen = None
        for norms in _norms(files, header, step):
            self.state.see(norms)
        state = replace(self.state, merged_through=self._number)
        rows = _stored(files, header, step) if old is None else _read(old, header, step)
        self._write_main(header, epochs, rows, state)
        self._remove_parts()

    def _compact(self, header: Header, epochs: content.Epochs, taken: int) -> None:
        """Put the last ``taken`` parts into one."""
        last = self._parts[-taken:]
        files = [self.folder / part_name(p.span) for p in last]
        self._check_room(files)
        one = _Part((last[0].span[0], last[-1].span[1]), sum(p.rows for p in last))
        self._write(self.folder / part_name(one.span), header, epochs, self.state, _stored(files, header))
        self._parts[-taken:] = [one]
        for file in files:
            self._disk.unlink(file)

    # ---- the end

    def finish(self, header: Header, epochs: content.Epochs) -> None:
        """All in one file, and nothing beside it; or, where there is no room for that, a note why not."""
        try:
            self.merge(header, epochs)
        except OSError as error:
            _log.warning(
                "%s: complete, but in pieces: its rows stay in %s/ beside it, as they could not be put together "
                "(%s). Every command reads it as it is; keep the folder with the file.",
                self.path,
                self.folder.name,
                error,
            )

    def sweep(self) -> None:
        """Remove what a killed writer left half made."""
        for stray in self.folder.glob(".*.tmp"):
            with suppress(IsADirectoryError, PermissionError):  # a folder is not of our making
                self._disk.unlink(stray)

    def release(self) -> None:
        """Nothing more comes. Remove the folder of parts, unless there are some."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        if self.lock is not None and self.lock.is_current() and not self._spans():
            with suppress(OSError):
                self.sweep()
                self._disk.unlink(self.folder / "lock")
                self._disk.rmdir(self.folder)

    # ---- beneath

    def _write_main(self, header: Header, epochs: content.Epochs, rows: content.Content, state: content.State) -> None:
        self._write(self.path, header, epochs, state, rows)
        self.state.merged_through, self._merged_rows, self._parts = self._number, _count(rows), []
        self._hold()

    def _own(self) -> None:
        """Make anew what somebody else removed or replaced while it was recorded: lock and folder, and the main file.

        Raises:
            RunFileError: Another process records into the run by now.
            OSError: It cannot be made.
        """
        if self.lock is not None and self.lock.renew():
            self._miss()
        if self._held < 0 or _is_at(self.path, self._held):
            return
        if os.path.lexists(self.path):
            names = (self.path.with_name(f"{self.path.name}.other-{n}") for n in itertools.count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            self.path.rename(aside)
            _log.warning("%s: was replaced while it was recorded; what was put there is %s now", self.path, aside.name)
        else:
            _log.warning("%s: was removed while it was recorded, and is written anew", self.path)
        with (
            replacing(self.path, self._disk, self.folder) as descriptor,
            open(descriptor, "wb", closefd=False) as new,
            open(self._held, "rb", closefd=False) as old,
        ):
            old.seek(0)
            shutil.copyfileobj(old, new)
        self._hold()

    def _hold(self) -> None:
        """Keep the main file open, so that its rows are there whatever becomes of its name."""
        old, self._held = self._held, -1
        if old >= 0:
            os.close(old)
        if os.name != "nt":  # an open file could not be replaced there
            with suppress(OSError):
                self._held = os.open(self.path, os.O_RDONLY)

    def _miss(self) -> bool:
        """Whether parts were removed by somebody else; their rows are counted as dropped, and it is said."""
        gone = [p for p in self._parts if not (self.folder / part_name(p.span)).exists()]
        if not gone:
            return False
        self._parts = [p for p in self._parts if p not in gone]
        rows = sum(p.rows for p in gone)
        self._lost += rows
        _log.warning(
            "%s: %d rows are lost: they were in %s/, from which somebody removed them while it was recorded. Recording "
            "goes on; leave that folder alone until the recording ends.",
            self.path,
            rows,
            self.folder.name,
        )
        return True

    def _write(
        self,
        path: Path,
        header: Header,
        epochs: content.Epochs,
        state: content.State,
        rows: content.Content,
    ) -> None:
        provenance = {**header.provenance, "sessions": content.dump_sessions(self._sessions(state.end))}
        described = replace(header, provenance=provenance)
        self._own()
        state = replace(state, dropped=state.dropped + self._lost)
        write_whole(path, lambda file: content.fill(file, described, state, rows, epochs), self._disk, self.folder)

    def _sessions(self, end: str) -> list[content.Session]:
        return [*self.sessions[:-1], {**self.sessions[-1], "end": end}]

    def _files(self) -> list[Path]:
        self._own()
        self._miss()
        main = [self.path] if self._merged_rows else []
        return [*main, *(self.folder / part_name(p.span) for p in self._parts)]

    def _spans(self) -> list[PartSpan]:
        return [s for s in map(part_span, self.folder.glob("*.h5")) if s is not None]

    def _remove_parts(self) -> None:
        # In order: a reader that listed some of them then misses the first, and looks again.
        for span in sorted(self._spans()):
            self._disk.unlink(self.folder / part_name(span))

    def _check_room(self, files: Sequence[Path]) -> None:
        """Do not fill the disk to find out that it is full."""
        needed, free = sum(f.stat().st_size for f in files), self._disk.free(self.folder)
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free")


def _stored(files: Sequence[Path], header: Header, before: int | None = None) -> dict[str, content.Stretch]:
    """The rows of our own files, to be read when they are written under this header.

    Args:
        files: In order.
        header: Says what the file that they go into has.
        before: Only rows of steps below this one.
    """
    found = {}
    for table in schema.TABLES:
        count = sum(_counts(files, table, before))
        found[table.group] = content.Stretch(count, blocks(files, table, header, before=before))
    return found


def blocks(
    files: Iterable[Path],
    table: schema.Table,
    header: Header,
    *,
    before: int | None = None,
    size: int = schema.CHUNK_ROWS,
) -> Iterator[content.Columns]:
    """The rows of one table of our own files, piece by piece; a field that a file lacks is filled in."""
    for path in files:
        with h5py.File(path, "r", locking=False) as file:
            group = file.get(table.group or "/")
            for start in range(0, len(group[schema.STEP]) if group is not None else 0, size):
                stop = min(start + size, len(group[schema.STEP]))
                piece = {
                    f.name: content.widened(f, group[f.name][start:stop], len(header.layers))
                    if f.name in group
                    else content.missing(f, header, stop - start)
                    for f in table.held(header)
                }
                keep = slice(None) if before is None else piece[schema.STEP] < before
                yield {name: values[keep] for name, values in piece.items()}


def _norms(files: Iterable[Path], header: Header, before: int) -> Iterator[np.ndarray]:
    """Norms (n, L, T) of the rows of steps below ``before``, piece by piece."""
    norm = schema.ROWS["grad_norm"]
    for path in files:
        with h5py.File(path, "r", locking=False) as file:
            keep = file[schema.STEP][()] < before
            for start in range(0, len(keep) if norm.name in file else 0, schema.CHUNK_ROWS):
                values = file[norm.name][start : start + schema.CHUNK_ROWS][keep[start : start + schema.CHUNK_ROWS]]
                yield content.widened(norm, values, len(header.layers))


def _read(run: Run, header: Header, before: int) -> dict[str, content.Stretch]:
    """The rows of a run, as :class:`Run` reads them, to be written under this header."""

    def kept(table: schema.Table) -> Iterator[content.Columns]:
        for block in run.blocks(run.count(table), schema.CHUNK_ROWS, table=table):
            keep = block[schema.STEP] < before
            yield {
                f.name: content.widened(f, block[f.name][keep], len(header.layers))
                if f.name in block
                else content.missing(f, header, int(keep.sum()))
                for f in table.held(header)
            }

    found = {}
    for table in schema.TABLES:
        if run.count(table):
            count = int((run[table.path(schema.STEP)] < before).sum())
            found[table.group] = content.Stretch(count, kept(table))
    return found


def _counts(files: Iterable[Path], table: schema.Table, before: int | None) -> Iterator[int]:
    """How many rows each file has."""
    for path in files:
        with h5py.File(path, "r", locking=False) as file:
            if (step := file.get(table.path(schema.STEP))) is not None:
                yield len(step) if before is None else int((step[()] < before).sum())


def _count(rows: content.Content) -> int:
    return sum(stretch.count for stretch in rows.values())


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a file that is open is the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _merged_through(path: Path) -> int:
    if not path.exists():
        return 0
    with h5py.File(path, "r", locking=False) as file:
        return int(file.attrs["merged_through"])


def _above(part: Path, merged_through: int) -> bool:
    span = part_span(part)
    return span is not None and span[0] > merged_through


def _same_layers(path: Path, header: Header, old: Run, any_kept: bool) -> Header:
    """The header to go on with.

    Raises:
        RunFileError: Rows are kept, and they are of other tasks or layers.
    """
    if not header.layers and list(header.tasks) in ([], list(old.tasks)):
        return Header(old.tasks, old.layers, old.layer_size, old.reach, {**_unnumbered(old), **header.provenance})
    shorter, longer = sorted((old.layers, tuple(header.layers)), key=len)
    same = begins_with(longer, shorter) and list(old.tasks) == list(header.tasks)
    if any_kept and not same:
        raise RunFileError(
            f"{path}: holds tasks {list(old.tasks)} on {len(old.layers)} layers, but the run to go on has "
            f"tasks {list(header.tasks)} on {len(header.layers)} layers. Resume with the same model."
        )
    if not same:
        return header
    known = Header(old.tasks, old.layers, old.layer_size, old.reach)
    both, _ = content.with_layers(known, header)
    return replace(header, layers=both.layers, layer_size=both.layer_size, reach=both.reach)


def _held(old: Run, step: int) -> frozenset[str]:
    """The tables and optional fields of a run, see :class:`gradprobe.rows.Header`: what has rows before a step."""
    tables = {t.name for t in schema.TABLES if t.group and _kept(old, t, step)}
    optional = {t.path(f.name) for t in schema.TABLES for f in t.fields if f.optional and t.path(f.name) in old}
    return frozenset(tables | optional)


def _kept(old: Run, table: schema.Table, step: int) -> bool:
    """Whether rows of a table are kept."""
    return bool(old.count(table)) and bool(any(old[table.path(schema.STEP)] < step))


def _kept_features(old: Run, step: int) -> FeatureHeader | None:
    """The features whose rows are kept; None where there are no such rows."""
    if not _kept(old, schema.FEATURES, step):
        return None
    return FeatureHeader(old.tasks, old.feature_names, old[schema.FEATURES.path(schema.FEATURE_SIZE.name)])


def _unnumbered(old: Run) -> Mapping[str, Any]:
    return {k: v for k, v in old.provenance.items() if k != "sessions"}
