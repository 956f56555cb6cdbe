"""The group `features/` of a run: task gradients where the tasks part, on a step axis of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.rows import FeatureHeader, FeatureRow
from gradprobe.runfile import schema

Columns = dict[str, NDArray[Any]]
"""One array per feature field, all with the rows on the first axis."""

GROUP = "features"


def columns(rows: Sequence[FeatureRow], header: FeatureHeader) -> Columns:
    """Rows side by side, in the form in which they are stored."""
    tasks, count = len(header.tasks), len(header.features)
    gram = np.array([row.gram for row in rows], dtype=np.float64).reshape(len(rows), count, tasks, tasks)
    values: dict[str, Any] = {"grad_norm": measures.norm(gram), "cosine": measures.pair_cosine(gram)}
    for name in ("step", "epoch", "time", "overhead"):
        values[name] = [getattr(row, name) for row in rows]
    return {f.name: np.asarray(values[f.name], dtype=f.dtype) for f in schema.FEATURE_FIELDS}


def write(file: h5py.File, header: FeatureHeader | None, rows: Columns | None) -> None:
    """Write the group into a file that has the axes ``task`` and ``pair``; nothing where features were not measured."""
    if header is None or rows is None:
        return
    group = file.create_group(GROUP)
    names = np.array(list(header.features), dtype=object)
    group.create_dataset(schema.FEATURE, data=names, dtype=h5py.string_dtype("utf-8"), track_times=False)
    group.create_dataset("feature_size", data=np.asarray(header.feature_size, dtype="<i8"), track_times=False)
    for field in schema.FEATURE_FIELDS:
        data = rows[field.name]
        chunks = schema.chunk_shape(field, data.shape)
        group.create_dataset(field.name, data=data, chunks=chunks, track_times=False)
    for axis in (schema.STEP, schema.FEATURE):
        group[axis].make_scale(axis)
    for field in (*schema.FEATURE_FIELDS, schema.FEATURE_SIZE):
        _label(file, group[field.name], field)


def read(files: Sequence[h5py.File]) -> Columns:
    """All rows of a run, with the names of the features and their sizes; empty where it has none."""
    groups = [file[GROUP] for file in files if GROUP in file]
    if not groups:
        return {}
    result: Columns = {f.name: np.concatenate([group[f.name][()] for group in groups]) for f in schema.FEATURE_FIELDS}
    result[schema.FEATURE] = np.array([str(name) for name in groups[0][schema.FEATURE].asstr()[()]])
    result["feature_size"] = groups[0]["feature_size"][()]
    return result


class Queue:
    """Feature rows on their way to the disk. Its methods are called with the writer's lock held.

    Args:
        keep: Rows kept while the disk takes none; beyond that the oldest are dropped.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self.header: FeatureHeader | None = None
        self.rows: list[FeatureRow] = []

    def put(self, row: FeatureRow) -> int:
        """Queue one row; returns how many were dropped for it."""
        self.rows.append(row)
        dropped = max(0, len(self.rows) - self._keep)
        del self.rows[:dropped]
        return dropped

    def done(self, rows: Sequence[FeatureRow]) -> None:
        """These rows are on the disk."""
        written = {id(row) for row in rows}
        self.rows = [row for row in self.rows if id(row) not in written]

    def part(self, rows: Sequence[FeatureRow]) -> tuple[FeatureHeader | None, Columns | None]:
        """What a part holds."""
        return self.header, columns(rows, self.header) if self.header is not None and rows else None

    def merged(
        self, stored: Columns, tasks: Sequence[str], before: int | None
    ) -> tuple[FeatureHeader | None, Columns | None]:
        """What a merged file holds: all that is stored, or only steps below ``before``."""
        if not stored:
            return self.header, columns([], self.header) if self.header is not None else None
        keep = slice(None) if before is None else stored["step"] < before
        header = FeatureHeader(tuple(tasks), tuple(stored[schema.FEATURE]), stored["feature_size"])
        return header, {f.name: stored[f.name][keep] for f in schema.FEATURE_FIELDS}


def _label(file: h5py.File, dataset: h5py.Dataset, field: schema.Field) -> None:
    dataset.attrs["long_name"] = field.meaning
    if field.units:
        dataset.attrs["units"] = field.units
    for index, axis in enumerate(field.axes):
        if field.name != axis:
            home = file if axis in (schema.TASK, schema.PAIR) else dataset.parent
            dataset.dims[index].attach_scale(home[axis])
        dataset.dims[index].label = axis
