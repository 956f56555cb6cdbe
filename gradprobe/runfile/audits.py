"""An audit as a run file without rows: what was found is in the group ``audit/``, with a step axis and a door axis."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gradprobe.errors import RunFileError
from gradprobe.rows import Header
from gradprobe.runfile import content, schema, storable
from gradprobe.runfile.files import write_whole
from gradprobe.runfile.pieces import Piece
from gradprobe.runfile.untrusted import attribute
from gradprobe.whole_files import Disk, target, telling

__all__ = ["place", "write"]


_ABOUT = ("task", "weight", "class", "sentence", "same_twice")
"""Attributes of the group."""


def write(path: Path, audit: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> Path:
    """Write one audit into a new run file, whole or not at all.

    Args:
        path: Of the file; an audit that is there is replaced.
        audit: As :func:`gradprobe.audit.whole_audit.audit_as_plain` returns it; all of it is kept as JSON besides.
        provenance: Where it comes from.

    Raises:
        RunFileError: It cannot be written.
    """
    with telling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place(path), lambda file: _fill(file, audit, provenance or {}), Disk())
    return path


def place(path: Path) -> Path:
    """Where an audit goes that is to be written at ``path``: an earlier audit is replaced, a run is not.

    Raises:
        OSError: See :func:`gradprobe.whole_files.target`.
    """
    return target(path, run=_is_audit(path))


def _is_audit(path: Path) -> bool:
    try:
        piece = Piece(path)
    except (OSError, RunFileError):
        return False
    with closing(piece):
        return not piece.rows and bool(piece.whole(schema.AUDIT))


def _fill(file: h5py.File, audit: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    tasks = (*audit["others"], audit["task"])
    nothing = Header(tasks, (), np.zeros(0, np.int64), np.zeros((0, len(tasks)), bool), provenance)
    content.fill(file, nothing, content.State(end="finished"), {}, {})
    steps = len(audit["displacement"])
    found: dict[str, Any] = {"step": np.arange(steps)}
    for field in schema.AUDIT.fields[1:]:
        values = audit[field.name] if schema.STEP in field.axes else [door[field.name] for door in audit["doors"]]
        found[field.name] = values if field.dtype == schema.TEXT else [math.nan if v is None else v for v in values]
    put(file, Stored(found, {name: audit[name] for name in _ABOUT}, json.dumps(audit)))


@dataclass(frozen=True)
class Stored:
    """An audit as a file holds it.

    Attributes:
        table: The fields of :data:`gradprobe.runfile.schema.AUDIT`.
        about: Those of :data:`_ABOUT`.
        json: All of it.
    """

    table: Mapping[str, Any]
    about: Mapping[str, Any]
    json: str


def put(file: h5py.File, audit: Stored) -> None:
    """Write the group into a file that is being made."""
    group = content.write_table(file, schema.AUDIT, audit.table)
    for name in _ABOUT:
        group.attrs[name] = storable.stored(storable.plain(audit.about[name]))
    whole = group.create_dataset("json", data=[audit.json], dtype=h5py.string_dtype("utf-8"), track_times=False)
    whole.attrs["long_name"] = "all of it, as --json prints it"


def load(piece: Piece) -> Stored | None:
    """The group as it was written; None: there is none.

    Raises:
        RunFileError: It is damaged, or not as docs/run-file.md says.
    """
    found = piece.whole(schema.AUDIT)
    if not found:
        return None
    with piece.reading():
        group = piece.file[schema.AUDIT.group]
        about = {name: attribute(group, name) for name in _ABOUT}
        return Stored(found, about, str(group["json"].asstr()[0]) if "json" in group else "")


def read(piece: Piece) -> dict[str, Any] | None:
    """What a file says of an audit, by the names in docs/run-file.md; None: it holds none.

    ``about`` maps the attributes; texts are tuples, numbers arrays.

    Raises:
        RunFileError: It is damaged, or not as docs/run-file.md says.
    """
    found = load(piece)
    if found is None:
        return None
    return {"about": found.about, **{name: tuple(v) if v.dtype == object else v for name, v in found.table.items()}}
