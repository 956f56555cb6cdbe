"""What can be saved of a damaged run, into a new file that is whole."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gradprobe.errors import RunFileError, UsageError
from gradprobe.rows import FeatureHeader, Header, TestClusters
from gradprobe.runfile import audits, content, lock, schema
from gradprobe.runfile.files import write_whole
from gradprobe.runfile.integrity import BLOCK, DAMAGED, NOTE, CheckReport, open_readable
from gradprobe.runfile.pieces import Piece, parts_folder
from gradprobe.whole_files import Disk, target, telling

__all__ = ["repair"]


_Box = tuple[slice, ...]


class _Salvage:
    """What can be read of one file.

    Args:
        piece: Could be opened, so that where its datasets lie is known; its numbers may be damaged.
    """

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self._damage = piece.raw.damaged()

    def rows(self, name: str, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Rows ``start`` to ``stop`` of one dataset.

        Returns:
            Values, NaN (whole numbers: 0) where a byte of them is damaged; and which rows hold such a value.
        """
        dataset = self.piece[name]
        if not self._damage:
            with self.piece.reading():
                return dataset[start:stop], np.zeros(stop - start, dtype=bool)
        values = np.zeros((stop - start, *dataset.shape[1:]), dtype=dataset.dtype)
        bad = np.zeros(values.shape, dtype=bool)
        for offset, box in self._places(dataset, start, stop):
            given, damaged = self._read(offset, tuple(s.stop - s.start for s in box), dataset.dtype)
            inside = tuple(slice(0, min(s.stop, n) - s.start) for s, n in zip(box, dataset.shape, strict=True))
            first, last = max(box[0].start, start), min(box[0].stop, stop)
            inside = (slice(first - box[0].start, last - box[0].start), *inside[1:])
            clipped = tuple(slice(s.start, min(s.stop, n)) for s, n in zip(box, dataset.shape, strict=True))[1:]
            target = (slice(first - start, last - start), *clipped)
            values[target], bad[target] = given[inside], damaged[inside]
        values[bad] = np.nan if values.dtype.kind == "f" else 0
        return values, np.asarray(bad.any(axis=tuple(range(1, bad.ndim))))

    def _places(self, dataset: Any, start: int, stop: int) -> list[tuple[int, _Box]]:
        """Where in the file what boxes of the dataset lie; the last chunks reach beyond its end."""
        if 0 in dataset.shape or start >= stop:
            return []
        if dataset.chunks is None:
            row = dataset.nbytes // dataset.shape[0]
            rest = tuple(slice(0, n) for n in dataset.shape[1:])
            return [(dataset.id.get_offset() + start * row, (slice(start, stop), *rest))]
        steps, *others = dataset.chunks
        first = range(start // steps * steps, stop, steps)
        corners = itertools.product(first, *(range(0, n, c) for n, c in zip(dataset.shape[1:], others, strict=True)))
        with self.piece.reading():
            return [
                (
                    dataset.id.get_chunk_info_by_coord(corner).byte_offset,
                    tuple(slice(at, at + c) for at, c in zip(corner, dataset.chunks, strict=True)),
                )
                for corner in corners
            ]

    def _read(
        self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        size = int(np.prod(shape)) * dtype.itemsize
        raw = self.piece.raw.unverified(offset, size)
        wrong = np.zeros(size, dtype=bool)
        for start, stop in self._damage:
            wrong[max(start - offset, 0) : max(stop - offset, 0)] = True
        values = np.frombuffer(raw, dtype=dtype).reshape(shape)
        return values, np.asarray(wrong.reshape(*shape, dtype.itemsize).any(axis=-1))


REPAIRED = "damaged: some of its numbers could not be read"
_KILLED = "failed: the recording was killed before its end"

_NEEDED = ("step", "epoch", "time")  # a row without these is dropped; other numbers become NaN or 0


def repair(path: Path, out: Path) -> CheckReport:
    """Write a whole run file of all that can be read of a run.

    Args:
        path: The run; it is not changed.
        out: The new file; must not exist.

    Returns:
        What was lost, file by file, and how many rows there are. A row whose step cannot be read is left out; another
        number that cannot be read is NaN (whole numbers: 0), and the row's status says so.

    Raises:
        UsageError: ``out`` exists, or the run is being recorded.
        RunFileError: Nothing can be read, or ``out`` cannot be written.
    """
    if os.path.lexists(out) or os.path.lexists(parts_folder(out)):
        raise UsageError(f"{out} exists, or parts of it do; choose another place with --repair.")
    if lock.being_recorded(path):
        raise UsageError(f"{path} is being recorded; repair it when that has ended.")
    report = CheckReport()
    pieces = open_readable(path, report, lenient=True)
    try:
        if not pieces:
            reasons = "; ".join(f"{finding.file} {finding.what}" for finding in report.findings)
            raise RunFileError(f"{path}: nothing can be saved: {reasons}")
        _write(pieces, out, report)
    finally:
        for piece in pieces:
            piece.close()
    return report


def _write(pieces: list[Piece], out: Path, report: CheckReport) -> None:
    state = content.State(end=pieces[-1].end or _KILLED, dropped=pieces[-1].rows_dropped)
    state.status_names = list(pieces[-1].status_names)
    state.by_effect = all(piece.by_effect for piece in pieces)
    salvages = [_Salvage(piece) for piece in pieces]
    kept = {table.group: _kept_in_all(salvages, table, report) for table in schema.TABLES}
    for table in schema.TABLES:  # once for what is lost, which the file says before its rows
        for _ in _blocks(salvages, table, kept[table.group], state, report):
            pass
    header = _header(pieces, report)
    counts = {group: sum(int(rows.sum()) for rows in each) for group, each in kept.items()}
    report.rows = counts[schema.ROWS.group]
    report.files = [piece.path.name for piece in pieces]
    epochs, audit = _epochs(pieces, report), _audit(pieces[0], report)
    lost = [f"{finding.file} {finding.what}" for finding in report.findings if finding.kind == DAMAGED]
    header = Header(
        header.tasks,
        header.layers,
        header.layer_size,
        header.reach,
        {**header.provenance, "repair": {"of": pieces[0].path.name, "lost": lost}},
        _features(pieces, report),
        _clusters(pieces, report),
        frozenset(name for piece in pieces for name in piece.held),
    )
    with telling(out, "--repair"):
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = {
            table.group: content.Stretch(
                counts[table.group], _blocks(salvages, table, kept[table.group], state, CheckReport())
            )
            for table in schema.TABLES
        }

        def fill(file: h5py.File) -> None:
            content.fill(file, header, state, rows, epochs)
            if audit is not None:
                audits.put(file, audit)

        write_whole(target(out), fill, Disk())


def _kept_in_all(salvages: list[_Salvage], table: schema.Table, report: CheckReport) -> list[NDArray[np.bool_]]:
    """Which rows of each file are written."""
    kept = [_kept(salvage, table, report) for salvage in salvages]
    _drop_repeated(salvages, table, kept, report)
    return kept


def _kept(salvage: _Salvage, table: schema.Table, report: CheckReport) -> NDArray[np.bool_]:
    """Which rows have all that a row must have."""
    piece, rows = salvage.piece, salvage.piece.count(table)
    good = np.ones(rows, dtype=bool)
    for name in (name for name in _NEEDED if table.path(name) in piece):
        for start in range(0, rows, BLOCK):
            stop = min(start + BLOCK, rows)
            _, unread = salvage.rows(table.path(name), start, stop)
            good[start:stop] &= ~unread
    if not good.all():
        what = f"{int((~good).sum())} of {rows} rows{_of(table)} are lost: no step, epoch or time"
        report.add(piece.path, DAMAGED, what)
    return good


def _drop_repeated(
    salvages: list[_Salvage], table: schema.Table, kept: list[NDArray[np.bool_]], report: CheckReport
) -> None:
    """Leave out rows whose step is not above all before: a series must increase."""
    last = -1
    for salvage, rows in zip(salvages, kept, strict=True):
        if not rows.size:
            continue
        step, _ = salvage.rows(table.path(schema.STEP), 0, rows.size)
        places = np.flatnonzero(rows)
        before = np.maximum.accumulate(np.concatenate([[last], step[places]]))[:-1]
        repeated = places[step[places] <= before]
        if repeated.size:
            rows[repeated] = False
            what = f"{repeated.size} rows{_of(table)} are left out: their step does not increase"
            report.add(salvage.piece.path, DAMAGED, what)
        if places.size:
            last = max(last, int(step[places].max()))


def _of(table: schema.Table) -> str:
    return f" of {table.group}/" if table.group else ""


def _blocks(
    salvages: list[_Salvage],
    table: schema.Table,
    kept: list[NDArray[np.bool_]],
    state: content.State,
    report: CheckReport,
) -> Iterator[content.Columns]:
    held = frozenset(name for salvage in salvages for name in salvage.piece.held)
    fields = table.held(held)
    layers = max(len(salvage.piece.layers) for salvage in salvages)
    for salvage, rows in zip(salvages, kept, strict=True):
        for block in _blocks_of(salvage, table, fields, rows, state, report):
            yield {f.name: content.widened(f, block[f.name], layers) for f in fields}


def _blocks_of(
    salvage: _Salvage,
    table: schema.Table,
    fields: tuple[schema.Field, ...],
    kept: NDArray[np.bool_],
    state: content.State,
    report: CheckReport,
) -> Iterator[content.Columns]:
    piece = salvage.piece
    lost: dict[str, int] = {}
    for start in range(0, kept.size, BLOCK):
        stop = min(start + BLOCK, kept.size)
        rows = kept[start:stop]
        block, holes = {}, np.zeros(stop - start, dtype=bool)
        for field_ in fields:
            path = table.path(field_.name)
            if path in piece:
                values, unread = salvage.rows(path, start, stop)
            else:  # one that other files of the run have, or later versions
                values, unread = piece.column(table, field_, slice(start, stop)), np.zeros(stop - start, dtype=bool)
            block[field_.name] = values[rows]
            holes |= unread
            if (unread & rows).any():
                lost[path] = lost.get(path, 0) + int((unread & rows).sum())
        if "status" in block:
            block["status"] = _statuses(piece, block["status"], holes[rows], state)
        if rows.any():
            yield block
    for name, count in lost.items():
        report.add(piece.path, DAMAGED, f"{name} could not be read in {count} rows")


def _statuses(
    piece: Piece, stored: NDArray[np.uint8], holes: NDArray[np.bool_], state: content.State
) -> NDArray[np.uint8]:
    """The status of each row in the new file, which says of a row with holes that it has some."""
    status = np.array([state.status_code(name) for name in piece.status_names], dtype=np.uint8)
    marked = holes | (stored >= len(status))
    code = state.status_code(REPAIRED) if marked.any() else 0
    return np.where(marked, code, status[np.minimum(stored, len(status) - 1)]).astype(np.uint8)


def _header(pieces: list[Piece], report: CheckReport) -> Header:
    """Names and provenance; of several files the last that can be read says who reaches the layers."""
    provenance: dict[str, Any] = {}
    for piece in reversed(pieces):
        try:
            provenance = piece.provenance
            break
        except RunFileError:
            report.add(piece.path, DAMAGED, "its provenance cannot be read")
    for piece in pieces:
        if piece.unknown:
            report.add(piece.path, NOTE, f"what this version does not know is left out: {', '.join(piece.unknown)}")
    found: Header | None = None
    for piece in pieces:
        try:
            with piece.reading():
                size, reach = piece["layer_size"][()], piece["reach"][()].astype(bool)
        except RunFileError:
            report.add(piece.path, DAMAGED, "the sizes of its layers and who reaches them cannot be read")
            continue
        found = Header(piece.tasks, piece.layers, size, reach, provenance)
    if found is None:
        raise RunFileError(f"{pieces[0].path}: nothing can be saved: no file says which task reaches which layer.")
    last = Header(found.tasks, pieces[-1].layers, np.zeros(len(pieces[-1].layers), np.int64), _nobody(pieces[-1]))
    whole, _ = content.with_layers(last, found)
    return replace(found, layers=whole.layers, layer_size=whole.layer_size, reach=whole.reach)


def _nobody(piece: Piece) -> NDArray[np.bool_]:
    return np.zeros((len(piece.layers), len(piece.tasks)), dtype=bool)


def _features(pieces: list[Piece], report: CheckReport) -> FeatureHeader | None:
    """Names of the features, where they were measured."""
    for piece in pieces:
        if not piece.feature_names:
            continue
        try:
            with piece.reading():
                size = piece[schema.FEATURES.path(schema.FEATURE_SIZE.name)][()]
        except RunFileError:
            report.add(piece.path, DAMAGED, "the sizes of its features cannot be read")
            size = np.zeros(len(piece.feature_names), np.int64)
        return FeatureHeader(piece.tasks, piece.feature_names, size)
    return None


def _clusters(pieces: list[Piece], report: CheckReport) -> TestClusters | None:
    """Metrics of the test split by cluster, of the last file, where they can be read."""
    try:
        found = pieces[-1].whole(schema.TEST)
    except RunFileError:
        report.add(pieces[-1].path, DAMAGED, "its metrics of the test split by cluster cannot be read")
        return None
    return TestClusters(found["cluster"], found["size"], found["metric"], found["without"]) if found else None


def _audit(piece: Piece, report: CheckReport) -> audits.Stored | None:
    """The audit of a file, where it can be read."""
    try:
        return audits.load(piece)
    except RunFileError:
        report.add(piece.path, DAMAGED, "its audit cannot be read")
        return None


def _epochs(pieces: list[Piece], report: CheckReport) -> dict[int, dict[str, float]]:
    """Metrics by epoch, of the last file in which they can be read."""
    for piece in reversed(pieces):
        try:
            with piece.reading():
                group = piece["epochs"]
                table = {name: group[name][()] for name in group}
        except RunFileError:
            report.add(piece.path, DAMAGED, "its metrics per epoch cannot be read")
            continue
        numbers = table.pop(schema.EPOCH)
        return {int(e): {name: float(v[i]) for name, v in table.items()} for i, e in enumerate(numbers)}
    return {}
