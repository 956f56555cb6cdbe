"""An audit as a run file without rows: what was found is in the group ``audit/``, with a step axis and a door axis."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from gradprobe.rows import Header
from gradprobe.runfile import content, schema
from gradprobe.runfile.attributes import attribute, printable
from gradprobe.runfile.files import write_whole
from gradprobe.whole_files import Disk, target, telling

if TYPE_CHECKING:
    from gradprobe.runfile.pieces import Piece

GROUP = schema.AUDIT
ABOUT = ("task", "weight", "class", "sentence", "same_twice")
"""Attributes of the group."""

STEP_FIELDS = {
    "displacement": "distance of the other tasks' parameters from the training without the task, relative to how far "
    "they came; 0: bitwise equal; NaN: not finite",
    "ulp": "the largest difference of a parameter in units of rounding",
}
DOOR_TEXTS = {
    "door": "names of the doors",
    "state": "open, shut or not tested",
    "evidence": "where the difference shows first",
    "how_to_shut": "how to shut it for good",
}
DOOR_NUMBERS = {
    "contribution": "displacement with every other open door held shut; NaN: not measured, or not finite",
    "left_when_shut": "displacement that is left when this door alone is held shut",
}


def write(path: Path, audit: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> Path:
    """Write one audit into a new run file, whole or not at all.

    Args:
        path: Of the file; replaced if it exists.
        audit: As :func:`gradprobe.audit.report.plain` returns it; all of it is kept as JSON besides.
        provenance: Where it comes from.

    Raises:
        RunFileError: It cannot be written.
    """
    with telling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target(path), lambda file: _fill(file, audit, provenance or {}), Disk())
    return path


def _fill(file: h5py.File, audit: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    tasks = (*audit["others"], audit["task"])
    nothing = Header(tasks, (), np.zeros(0, np.int64), np.zeros((0, len(tasks)), bool), provenance)
    content.fill(file, nothing, content.State(end="finished"), {}, {})
    group = file.create_group(GROUP)
    for name in ABOUT:
        group.attrs[name] = audit[name]
    steps = np.arange(len(audit["displacement"]), dtype="<i8")
    _dataset(group, "step", steps, "training step, from 0; compared after the step's update", "step")
    for name, meaning in STEP_FIELDS.items():
        _dataset(group, name, _numbers(audit[name]), meaning, "step")
    doors = audit["doors"]
    for name, meaning in DOOR_TEXTS.items():
        _dataset(group, name, np.array([d[name] for d in doors], dtype=object), meaning, "door")
    for name, meaning in DOOR_NUMBERS.items():
        _dataset(group, name, _numbers([d[name] for d in doors]), meaning, "door")
    _dataset(group, "json", np.array([json.dumps(audit)], dtype=object), "all of it, as --json prints it", "")


def read(piece: Piece) -> dict[str, Any] | None:
    """What a file says of an audit, by the names in docs/run-file.md; None: it holds none.

    ``about`` maps the attributes; texts are tuples, numbers arrays.

    Raises:
        RunFileError: It is damaged, or not as docs/run-file.md says.
    """
    if f"{GROUP}/step" not in piece:
        return None
    with piece.reading():
        group = piece.file[GROUP]
        texts = {name: tuple(printable(str(v)) for v in group[name].asstr()[()]) for name in DOOR_TEXTS}
        numbers = {name: group[name][()] for name in ("step", *STEP_FIELDS, *DOOR_NUMBERS)}
        return {"about": {name: attribute(group, name) for name in ABOUT}, **texts, **numbers}


def _numbers(values: Sequence[float | None]) -> Any:
    return np.array([math.nan if v is None else v for v in values], dtype="<f8")


def _dataset(group: h5py.Group, name: str, values: Any, meaning: str, axis: str) -> None:
    dtype = h5py.string_dtype("utf-8") if values.dtype == object else values.dtype
    dataset = group.create_dataset(name, data=values, dtype=dtype, track_times=False)
    dataset.attrs["long_name"] = meaning
    if name == axis:
        dataset.make_scale(name)
    elif axis:
        dataset.dims[0].attach_scale(group[axis])
    if axis:
        dataset.dims[0].label = axis
