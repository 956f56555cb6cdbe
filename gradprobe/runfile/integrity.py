"""Whether a run is whole, by every sum, every shape and what its numbers must obey."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.errors import RunFileError
from gradprobe.rows.layers import begins_with
from gradprobe.runfile import lock, schema
from gradprobe.runfile.content import UNSTORED
from gradprobe.runfile.pieces import Piece, part_paths, parts_folder, require_span
from gradprobe.whole_files import there

__all__ = ["CheckReport", "check_run"]


DAMAGED, _INCOMPLETE, NOTE = "damaged", "incomplete", "note"

BLOCK = 4096
"""Rows that are looked at together."""


@dataclass(frozen=True)
class _CheckFinding:
    """One thing that was found.

    Attributes:
        file: The name of the file it is in.
        kind: ``damaged``; ``incomplete`` (no damage, but not all there or not to be verified); ``note``.
        what: In words.
    """

    file: str
    kind: str
    what: str


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        rows: Rows in the files that can be opened.
        files: Names of those that count.
    """

    findings: list[_CheckFinding] = field(default_factory=list)
    rows: int = 0
    files: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether the run ended and nothing of it is damaged, missing or unverified."""
        return all(finding.kind == NOTE for finding in self.findings)

    def add(self, path: Path, kind: str, what: str) -> None:
        """Note one finding."""
        self.findings.append(_CheckFinding(path.name, kind, what))


def check_run(path: Path) -> CheckReport:
    """Read all of a run and report what is wrong with it.

    Args:
        path: ``conflict.h5``; its parts are found beside it.

    Raises:
        RunFileError: There is no such run.
    """
    report = CheckReport()
    pieces = open_readable(path, report)
    try:
        last = dict.fromkeys((table.group for table in schema.TABLES), -1)
        for piece in pieces:
            report.files.append(piece.path.name)
            report.rows += piece.rows
            if not piece.raw.sealed:
                report.add(piece.path, _INCOMPLETE, "carries no sums: another program changed it after it was recorded")
            _check_sums(piece, report)
            _check_values(piece, report, last)
        if pieces:
            _check_end(path, pieces[-1], report)
    finally:
        for piece in pieces:
            piece.close()
    return report


def open_readable(path: Path, report: CheckReport, *, lenient: bool = False) -> list[Piece]:
    """The files of a run that can be opened, in order; the others are reported.

    Raises:
        RunFileError: There is no such run.
    """
    for _ in range(20):
        trial = CheckReport()
        pieces: list[Piece] = []
        try:
            _open_readable(path, trial, pieces, lenient)
        except FileNotFoundError:  # a part was merged away meanwhile: look again
            for piece in pieces:
                piece.close()
            continue
        report.findings += trial.findings
        return pieces
    raise RunFileError(f"{path}: its parts change faster than they can be opened. Try again.")


def _open_readable(path: Path, report: CheckReport, pieces: list[Piece], lenient: bool) -> None:
    found = part_paths(path)
    if not there(path) and not found:
        raise RunFileError(f"{path}: no such file.")
    merged, expected = 0, 0
    if not there(path):
        report.add(path, DAMAGED, "is not there; only its parts are")
    elif (main := _open_one(path, report, lenient, part=False)) is not None:
        pieces.append(main)
        merged = expected = main.merged_through
    for part in found:
        number, last = require_span(part)
        if last <= merged:
            report.add(part, NOTE, "is in the main file already; a kill came before it was removed")
            continue
        if expected and number > expected + 1:
            report.add(part, DAMAGED, f"follows part {expected:08d}: {number - expected - 1} parts between are missing")
        expected = last
        piece = _open_one(part, report, lenient, part=True)
        if piece is None:
            continue
        if pieces and not _of_one_run(pieces, piece):
            report.add(part, DAMAGED, "is a part of another run: it has other tasks, layers or features")
            piece.close()
        else:
            pieces.append(piece)


def _of_one_run(pieces: list[Piece], piece: Piece) -> bool:
    known = {other.feature_names for other in (*pieces, piece) if other.feature_names}
    same = piece.tasks == pieces[0].tasks and begins_with(piece.layers, pieces[-1].layers)
    return same and len(known) <= 1


def _open_one(path: Path, report: CheckReport, lenient: bool, *, part: bool) -> Piece | None:
    try:
        return Piece(path, part=part)
    except RunFileError as error:
        if lenient:
            try:
                return Piece(path, part=part, lenient=True)
            except RunFileError:
                pass
        report.add(path, DAMAGED, str(error).removeprefix(f"{path}: "))
        return None


def _check_sums(piece: Piece, report: CheckReport) -> None:
    damage = piece.raw.damaged()
    if damage:
        size = sum(stop - start for start, stop in damage)
        where = ", ".join(f"{start:,} to {stop:,}" for start, stop in damage[:3]) + (", ..." if damage[3:] else "")
        report.add(piece.path, DAMAGED, f"{size:,} bytes do not match their sums: {where}")


def _check_end(path: Path, last: Piece, report: CheckReport) -> None:
    held = lock.being_recorded(path)
    if held:
        report.add(path, _INCOMPLETE, "is being recorded")
    elif not last.end:
        report.add(path, _INCOMPLETE, "its recording was killed, or goes on: it does not say how it ended")
    elif last.span[1]:
        report.add(path, NOTE, f"is in pieces, of which none is missing: keep {parts_folder(path).name}/ with the file")
    if last.rows_dropped:
        why = "the disk took them too late or not at all, somebody removed them, or they had no step"
        report.add(path, NOTE, f"{last.rows_dropped} rows were dropped: {why}")
    for name, words in last.provenance.items():
        if name.startswith(f"{UNSTORED}."):
            report.add(path, NOTE, f"{name.removeprefix(f'{UNSTORED}.')}: could not be stored in {words}")


# ---- numbers


def _check_values(piece: Piece, report: CheckReport, last: dict[str, int]) -> None:
    """Report numbers that cannot be.

    Args:
        piece: Where to look.
        report: Gets the findings.
        last: The last step of each table so far, by group; brought up to date.
    """
    for table in schema.TABLES:
        lacks = [table.path(f.name) for f in table.held(piece) if not _there(piece, table, f)]
        if lacks and piece.count(table):
            report.add(piece.path, NOTE, f"has no {', '.join(lacks)}: read as missing")
        wrong: dict[str, tuple[int, int]] = {}  # what: how often, first row
        for start, field_, values in _readable(piece, table, report):
            path = table.path(field_.name)
            if field_.name == schema.STEP:
                steps = np.concatenate([[last[table.group]], values])
                _count(wrong, f"{path} does not increase", steps[1:] <= steps[:-1], start)
                last[table.group] = int(values[-1])
            if field_.name == "status":
                _count(wrong, f"{path} has no name in status_names", values >= len(piece.status_names), start)
            where = field_.impossible(values)
            _count(
                wrong, f"{path} {field_.impossible_is}", np.asarray(where.any(axis=tuple(range(1, where.ndim)))), start
            )
        for what, (often, first) in wrong.items():
            report.add(piece.path, DAMAGED, f"{what} in {often} rows, first in row {first}")
    _check_epochs(piece, report)
    _check_whole_tables(piece, report)


def _there(piece: Piece, table: schema.Table, field_: schema.Field) -> bool:
    return table.path(field_.name) in piece


def _readable(
    piece: Piece, table: schema.Table, report: CheckReport
) -> Iterator[tuple[int, schema.Field, NDArray[Any]]]:
    rows = piece.count(table)
    for field_ in (f for f in table.fields if _there(piece, table, f)):
        lost = 0
        for start in range(0, rows, BLOCK):
            stop = min(start + BLOCK, rows)
            try:
                with piece.reading():
                    values = piece[table.path(field_.name)][start:stop]
            except RunFileError:
                lost += stop - start
                continue
            yield start, field_, values
        if lost:
            report.add(piece.path, DAMAGED, f"{table.path(field_.name)} cannot be read in a stretch of {lost} rows")


def _count(wrong: dict[str, tuple[int, int]], what: str, where: NDArray[np.bool_], start: int) -> None:
    if where.any():
        often, first = wrong.get(what, (0, math.inf))
        wrong[what] = often + int(where.sum()), int(min(first, start + int(np.argmax(where))))


def _check_whole_tables(piece: Piece, report: CheckReport) -> None:
    """Tables that were written at once."""
    for table in schema.WHOLE:
        try:
            found = piece.whole(table)
        except RunFileError as error:
            report.add(piece.path, DAMAGED, str(error).removeprefix(f"{piece.path}: "))
            continue
        for field_ in table.fields if found else ():
            if field_.impossible(found[field_.name]).any():
                report.add(piece.path, DAMAGED, f"{table.path(field_.name)} {field_.impossible_is}")


def _check_epochs(piece: Piece, report: CheckReport) -> None:
    try:
        with piece.reading():
            epochs = {name: piece["epochs"][name][()] for name in piece["epochs"]}
            reach, size = piece["reach"][()], piece["layer_size"][()]
    except RunFileError as error:
        report.add(piece.path, DAMAGED, str(error).removeprefix(f"{piece.path}: "))
        return
    if np.any(np.diff(epochs[schema.EPOCH]) <= 0):
        report.add(piece.path, DAMAGED, "epochs/epoch does not increase")
    if np.any(reach > 1):
        report.add(piece.path, DAMAGED, "reach holds other values than 0 and 1")
    if np.any(size < 0):
        report.add(piece.path, DAMAGED, "layer_size is negative")
