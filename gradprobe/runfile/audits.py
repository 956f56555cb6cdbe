"""The rows of an audit as an HDF5 file of its own: the group ``audit/``, with a step axis and a door axis."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gradprobe import __version__
from gradprobe.errors import RunFileError
from gradprobe.runfile.files import Disk, write_whole

ENCODING_TYPE = "gradprobe-audit"
ENCODING_VERSION = "1.0"

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


def write(path: Path, audit: Mapping[str, Any]) -> Path:
    """Write one audit into a new file, whole or not at all.

    Args:
        path: Of the file; replaced if it exists.
        audit: As :func:`gradprobe.audit.report.plain` returns it; all of it is kept as JSON besides.

    Raises:
        RunFileError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, path.with_name(f".{path.name}.tmp"), lambda file: _fill(file, audit), Disk())
    except OSError as error:
        raise RunFileError(f"{path}: cannot be written ({error}). Choose another place with --out.") from error
    return path


def _fill(file: h5py.File, audit: Mapping[str, Any]) -> None:
    file.attrs["encoding-type"], file.attrs["encoding-version"] = ENCODING_TYPE, ENCODING_VERSION
    file.attrs["creator"], file.attrs["creator_version"] = "gradprobe", __version__
    group = file.create_group("audit")
    for name in ("task", "weight", "class", "sentence", "same_twice"):
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
