"""The content of a run in memory, and how it is put into and out of HDF5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gradprobe import __version__, measures
from gradprobe.rows import MEASURED, FeatureHeader, Header, Row
from gradprobe.runfile import features, schema

Columns = dict[str, NDArray[Any]]
"""One array per row field, all with the rows on the first axis."""


@dataclass
class State:
    """What changes while a run is written."""

    end: str = ""
    merged_through: int = 0
    dropped: int = 0
    status_names: list[str] = field(default_factory=lambda: [MEASURED])

    def status_code(self, reason: str) -> int:
        """The number under which ``reason`` is stored; the last one stands for all that come too late."""
        if reason not in self.status_names:
            if len(self.status_names) >= 200:
                reason = "another reason (too many different ones to list)"
            if reason not in self.status_names:
                self.status_names.append(reason)
        return self.status_names.index(reason)


def columns(rows: Sequence[Row], header: Header, state: State) -> Columns:
    """Rows side by side, in the form in which they are stored."""
    tasks, layers = len(header.tasks), len(header.layers)
    gram = np.array([row.gram for row in rows], dtype=np.float64).reshape(len(rows), layers, tasks, tasks)
    shared_norm, shared_cosine = measures.over_layers(gram, header.reach)
    values: dict[str, Any] = {
        "loss": [row.loss for row in rows],
        "weight": [row.weight for row in rows],
        "grad_norm": measures.norm(gram),
        "cosine": measures.pair_cosine(gram),
        "shared_grad_norm": shared_norm,
        "shared_cosine": shared_cosine,
        "status": [state.status_code(row.status) for row in rows],
    }
    for name in ("step", "epoch", "time", "lr", "overhead", "batch_size"):
        values[name] = [getattr(row, name) for row in rows]
    return {
        f.name: np.asarray(values[f.name], dtype=f.dtype).reshape(len(rows), *_lengths(f, header)[1:])
        for f in schema.ROW_FIELDS
    }


def _lengths(field_: schema.Field, header: Header, rows: int = 0) -> tuple[int, ...]:
    tasks = len(header.tasks)
    sizes = {
        schema.STEP: rows,
        schema.LAYER: len(header.layers),
        schema.TASK: tasks,
        schema.PAIR: tasks * (tasks - 1) // 2,
    }
    return tuple(sizes[axis] for axis in field_.axes)


Epochs = Mapping[int, Mapping[str, float]]
"""Metrics by epoch."""


def fill(
    file: h5py.File,
    header: Header,
    state: State,
    rows: int,
    blocks: Iterable[Columns],
    epochs: Epochs,
    feature_header: FeatureHeader | None = None,
    feature_rows: Columns | None = None,
) -> None:
    """Write a whole run file.

    Args:
        file: Open for writing, empty.
        header: Names and provenance.
        state: How far the run is.
        rows: Total number of rows in ``blocks``.
        blocks: The rows in order, piece by piece, so that a large run is never in memory as a whole.
        epochs: Metrics per epoch.
        feature_header, feature_rows: What goes into `features/`, if anything does.
    """
    _write_attributes(file, state)
    _write_names(file, header)
    for field_ in schema.ROW_FIELDS:
        shape = _lengths(field_, header, rows)
        dataset = file.create_dataset(
            field_.name, shape, field_.dtype, chunks=schema.chunk_shape(field_, shape), track_times=False
        )
        _describe(dataset, field_)
    file["status"].attrs["status_names"] = state.status_names
    _scale(file, schema.STEP)
    for field_ in (*schema.ROW_FIELDS, *schema.HEADER_FIELDS):
        _attach(file, field_)
    features.write(file, feature_header, feature_rows)
    _write_epochs(file, epochs)
    _write_provenance(file.create_group("provenance"), header.provenance)
    start = 0
    for block in blocks:
        stop = start + len(block["step"])
        for field_ in schema.ROW_FIELDS:
            if block[field_.name].size:
                file[field_.name][start:stop] = block[field_.name]
        start = stop


def _write_attributes(file: h5py.File, state: State) -> None:
    file.attrs["encoding-type"] = schema.ENCODING_TYPE
    file.attrs["encoding-version"] = schema.ENCODING_VERSION
    file.attrs["Conventions"] = f"{schema.ENCODING_TYPE}-{schema.ENCODING_VERSION}"
    file.attrs["creator"] = "gradprobe"
    file.attrs["creator_version"] = __version__
    file.attrs["file_time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    file.attrs["end"] = state.end
    file.attrs["merged_through"] = np.int64(state.merged_through)
    file.attrs["rows_dropped"] = np.int64(state.dropped)


def _write_names(file: h5py.File, header: Header) -> None:
    # Variable-length UTF-8: fixed-length strings break selection by name in xarray.
    text = h5py.string_dtype("utf-8")
    names = {
        schema.LAYER: list(header.layers),
        schema.TASK: list(header.tasks),
        schema.PAIR: ["|".join(pair) for pair in measures.pairs(header.tasks)],
    }
    for axis, values in names.items():
        dataset = file.create_dataset(axis, data=np.array(values, dtype=object), dtype=text, track_times=False)
        dataset.attrs["long_name"] = schema.MEANINGS[axis]
        _scale(file, axis)
    tables = {"layer_size": header.layer_size, "reach": header.reach}
    for field_ in schema.HEADER_FIELDS:
        data = np.asarray(tables[field_.name], dtype=field_.dtype).reshape(_lengths(field_, header))
        _describe(file.create_dataset(field_.name, data=data, track_times=False), field_)


def _describe(dataset: h5py.Dataset, field_: schema.Field) -> None:
    dataset.attrs["long_name"] = field_.meaning
    if field_.units:
        dataset.attrs["units"] = field_.units


def _scale(group: h5py.Group, axis: str) -> None:
    group[axis].make_scale(axis)


def _attach(file: h5py.File, field_: schema.Field) -> None:
    for index, axis in enumerate(field_.axes):
        if field_.name != axis:
            file[field_.name].dims[index].attach_scale(file[axis])
        file[field_.name].dims[index].label = axis


def _write_epochs(file: h5py.File, epochs: Epochs) -> None:
    group = file.create_group("epochs")
    order = sorted(epochs)
    group.create_dataset("epoch", data=np.array(order, dtype="<i4"), track_times=False)
    _scale(group, schema.EPOCH)
    names = sorted({name for values in epochs.values() for name in values})
    for name in names:
        data = np.array([epochs[e].get(name, np.nan) for e in order], dtype="<f8")
        dataset = group.create_dataset(name, data=data, track_times=False)
        dataset.dims[0].attach_scale(group["epoch"])
        dataset.dims[0].label = schema.EPOCH


def _write_provenance(group: h5py.Group, provenance: Mapping[str, Any]) -> None:
    for name, value in flatten(provenance):
        group.attrs[name] = value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names, values as HDF5 attributes can hold them.

    >>> dict(flatten({"hyp": {"box": 0.05, "anchors": None}, "argv": ["record"]}))
    {'hyp.box': 0.05, 'hyp.anchors': '', 'argv': ['record']}
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is None:
            yield f"{prefix}{key}", ""
        elif isinstance(value, (list, tuple)):
            plain = list(value)
            numeric = bool(plain) and all(isinstance(v, (int, float)) for v in plain)
            yield f"{prefix}{key}", plain if numeric else [str(v) for v in plain]
        else:
            yield f"{prefix}{key}", value
