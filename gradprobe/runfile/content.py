"""The content of a run in memory, and how it is put into and out of HDF5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gradprobe import __version__, measures
from gradprobe.rows import (
    EARLIER_SOURCES,
    MEASURED,
    UNKNOWN_GRADIENT,
    FeatureRow,
    Header,
    LedgerRow,
    ProbeLoaderRow,
    Row,
    UpdateRow,
)
from gradprobe.runfile import clusters, growth, schema

GramRow = Row | FeatureRow | ProbeLoaderRow

Columns = dict[str, NDArray[Any]]
"""One array per row field, all with the rows on the first axis."""


@dataclass
class State:
    """What changes while a run is written.

    Attributes:
        seen: (L, T) bool: which task has had a gradient other than 0 on which layer in the rows so far; None: no rows.
        by_effect: Whether the file's ``reach``, and its sums over shared layers, go by that. A copy of a file of an
            earlier version is told by its zeros when it is read, as the file itself.
    """

    end: str = ""
    merged_through: int = 0
    dropped: int = 0
    status_names: list[str] = field(default_factory=lambda: [MEASURED])
    seen: NDArray[np.bool_] | None = None
    by_effect: bool = True

    def see(self, norms: NDArray[np.float32]) -> None:
        """Rows with these norms (n, L, T) are in the file."""
        found: NDArray[np.bool_] = np.any(norms > 0, axis=0)
        before = found if self.seen is None else growth.widened(self.seen, len(found))
        self.seen = found | before

    def reach(self, header: Header) -> NDArray[np.bool_]:
        """(L, T): what the file's rows say; of a task without any gradient, what the header says."""
        known = np.asarray(header.reach, dtype=bool).reshape(len(header.layers), len(header.tasks))
        if self.seen is None or not self.by_effect:
            return known
        seen = growth.widened(self.seen, len(known))
        return np.where(seen.any(axis=0), seen, known)

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
    gram = _gramians(rows, len(header.layers), len(header.tasks))
    norms = np.asarray(measures.norm(gram), dtype=np.float32)
    shared_norm, shared_cosine = measures.over_layers(gram, _counts(rows, norms, state.seen))
    state.see(norms)
    values: dict[str, Any] = {
        "loss": [row.loss for row in rows],
        "weight": [row.weight for row in rows],
        "grad_norm": norms,
        "cosine": measures.pair_cosine(gram),
        "shared_grad_norm": shared_norm,
        "shared_cosine": shared_cosine,
        "status": [state.status_code(row.status) for row in rows],
    }
    if header.noise:
        values["gram_noise"] = growth.stacked([row.gram_noise for row in rows], gram.shape[1:])
    return _stored(schema.ROWS, rows, values, header)


def feature_columns(rows: Sequence[FeatureRow], header: Header) -> Columns:
    """The same for feature rows of a header that has features."""
    assert header.features is not None
    gram = _gramians(rows, len(header.features.features), len(header.tasks))
    values = {"grad_norm": measures.norm(gram), "cosine": measures.pair_cosine(gram)}
    return _stored(schema.FEATURES, rows, values, header)


def update_columns(rows: Sequence[UpdateRow], header: Header, state: State) -> Columns:
    """The same for rows on updates."""
    layers, tasks = len(header.layers), len(header.tasks)
    names = tasks + len(EARLIER_SOURCES)
    parts = growth.stacked([row.parts for row in rows], (layers, names, names))
    held = growth.stacked([state.reach(header)[: len(row.parts)] for row in rows], (layers, tasks), fill=False)
    measured = np.array([row.status == MEASURED for row in rows], dtype=bool)
    none = np.isnan(np.diagonal(parts, axis1=2, axis2=3)) & measured[:, None, None]  # (n, L, S): no such part there
    reach = held & ~none[..., :tasks]
    own = np.where(reach[..., :, None] & reach[..., None, :], parts[..., :tasks, :tasks], np.nan)
    shared = measures.by_several(reach)
    shared_norm, shared_cosine = measures.over_layers(own, shared)
    together: NDArray[np.bool_] = np.any(shared, axis=-1)
    values: dict[str, Any] = {
        "update_norm": measures.norm(own),
        "cosine": measures.pair_cosine(own),
        "shared_update_norm": shared_norm,
        "shared_cosine": shared_cosine,
        "share": measures.share(parts),
        "shared_share": measures.share(_together(parts, none, together)),
        "status": [state.status_code(row.status) for row in rows],
    }
    return _stored(schema.UPDATES, rows, values, header)


def _together(parts: measures.Array, none: NDArray[np.bool_], layers: NDArray[np.bool_]) -> measures.Array:
    """Parts (n, L, S, S) over the chosen layers (n, L) of each row: (n, S, S).

    A source that has no part on some of them (n, L, S) adds nothing there; NaN where it has one on none of them, and
    where no layer is chosen.
    """
    some: NDArray[np.bool_] = np.any(~none & layers[..., None], axis=1)
    nothing = none & some[:, None]
    counted = np.where(nothing[..., :, None] | nothing[..., None, :], 0.0, parts)
    total = np.where(layers[..., None, None], counted, 0.0).sum(axis=1)
    return np.where(np.any(layers, axis=1)[:, None, None], total, np.nan)


def ledger_columns(rows: Sequence[LedgerRow], header: Header, state: State) -> Columns:
    """The same for rows of a loss ledger."""
    return _stored(schema.LEDGER, rows, {"status": [state.status_code(row.status) for row in rows]}, header)


def probe_loader_columns(rows: Sequence[ProbeLoaderRow], header: Header, state: State) -> Columns:
    """The same for rows of the probe loader."""
    gram = _gramians(rows, len(header.layers), len(header.tasks))
    values = {
        "grad_norm": measures.norm(gram),
        "cosine": measures.pair_cosine(gram),
        "status": [state.status_code(row.status) for row in rows],
    }
    return _stored(schema.PROBE_LOADER, rows, values, header)


def tables(header: Header) -> list[schema.Table]:
    """The tables of a file with this header."""
    there = {
        schema.FEATURES: header.features is not None,
        schema.UPDATES: header.updates,
        schema.LEDGER: header.ledger,
        schema.PROBE_LOADER: header.probe_loader,
    }
    return [schema.ROWS, *(table for table, held in there.items() if held)]


def _gramians(rows: Sequence[GramRow], places: int, tasks: int) -> measures.Array:
    return growth.stacked([row.gram for row in rows], (places, tasks, tasks))


def _counts(rows: Sequence[Row], norms: NDArray[np.float32], seen: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """(n, L, T): whose gradient counts where in sums over shared layers, as the rows say it, or else their norms.

    Args:
        rows: n of them.
        norms: (n, L, T).
        seen: (L, T) who was seen to reach what in rows before these.
    """
    unknown = [row.status in UNKNOWN_GRADIENT for row in rows]
    before = None if seen is None else growth.widened(seen, norms.shape[1])
    counts = measures.counted(norms, before, unknown)
    for place, row in enumerate(rows):
        if row.reach is not None:
            counts[place] = growth.widened(np.asarray(row.reach, dtype=bool), norms.shape[1])
    return counts


def _stored(
    table: schema.Table,
    rows: Sequence[GramRow] | Sequence[UpdateRow] | Sequence[LedgerRow],
    values: Mapping[str, Any],
    header: Header,
) -> Columns:
    """What is not among ``values`` is an attribute of each row."""

    def of(f: schema.Field, shape: tuple[int, ...]) -> Any:
        if f.name in values:
            return values[f.name]
        own = [getattr(row, f.name) for row in rows]
        return growth.stacked(own, shape[1:]) if schema.LAYER in f.axes else own

    shapes = {f: lengths(f, header, len(rows)) for f in fields(table, header)}
    return {f.name: np.asarray(of(f, shape), dtype=f.dtype).reshape(shape) for f, shape in shapes.items()}


def fields(table: schema.Table, header: Header) -> tuple[schema.Field, ...]:
    """What a table has in a file with this header."""
    return (*table.fields, *table.optional) if header.noise else table.fields


def sources(tasks: Sequence[str]) -> list[str]:
    """What an update comes from."""
    return [*tasks, *EARLIER_SOURCES]


def lengths(field_: schema.Field, header: Header, rows: int = 0) -> tuple[int, ...]:
    """The shape of a dataset with so many rows."""
    tasks = len(header.tasks)
    sizes = {
        schema.STEP: rows,
        schema.LAYER: len(header.layers),
        schema.TASK: tasks,
        schema.PAIR: tasks * (tasks - 1) // 2,
        schema.FEATURE: len(header.features.features) if header.features is not None else 0,
        schema.SOURCE: tasks + len(EARLIER_SOURCES),
        schema.OTHER_TASK: tasks,
    }
    return tuple(sizes[axis] for axis in field_.axes)


def widened(field_: schema.Field, values: NDArray[Any], layers: int) -> NDArray[Any]:
    """Rows of a file with fewer layers, as they go with those of one that has so many."""
    if schema.LAYER not in field_.axes or values.shape[axis := field_.axes.index(schema.LAYER)] == layers:
        return values
    return growth.widened(values, layers, axis, field_.missing)


def missing(field_: schema.Field, header: Header, rows: int) -> NDArray[Any]:
    """What stands for a field in rows of a file that lacks it; read-only, and of no size in memory."""
    return np.broadcast_to(np.asarray(field_.missing, dtype=field_.dtype), lengths(field_, header, rows))


Epochs = Mapping[int, Mapping[str, float]]
"""Metrics by epoch."""


@dataclass(frozen=True)
class Stretch:
    """Rows of one table on their way into a file.

    Attributes:
        count: How many.
        blocks: In order, piece by piece, so that a large run is never in memory as a whole.
    """

    count: int = 0
    blocks: Iterable[Columns] = ()


Content = Mapping[str, Stretch]
"""What goes into a file, by the group of the table; a table that is missing has no rows."""


def fill(file: h5py.File, header: Header, state: State, content: Content, epochs: Epochs) -> None:
    """Write a whole run file.

    Args:
        file: Open for writing, empty.
        header: Names and provenance; where it has features, the file has their table.
        state: How far the run is, and who has been seen to reach what.
        content: The rows.
        epochs: Metrics per epoch.
    """
    header = replace(header, reach=state.reach(header))
    _write_attributes(file, state)
    _write_names(file, header)
    if state.by_effect:
        file[schema.REACH].attrs[schema.BASIS] = schema.BY_EFFECT
    else:
        file[schema.REACH].attrs["long_name"] = schema.REACH_BY_GRAPH
    for table in tables(header):
        count = content.get(table.group, Stretch()).count
        for field_ in fields(table, header):
            _create(file, table.path(field_.name), field_, lengths(field_, header, count))
        _scale(file, table.path(schema.STEP))
    file["status"].attrs["status_names"] = attribute(state.status_names)
    for table in tables(header):
        for field_ in fields(table, header):
            _attach(file, table, field_)
    for field_ in schema.HEADER_FIELDS:
        _attach(file, schema.ROWS, field_)
    if header.features is not None:
        _attach(file, schema.FEATURES, schema.FEATURE_SIZE)
    _write_epochs(file, epochs)
    if header.test is not None:
        clusters.write(file, header.test)
    _write_provenance(file.create_group("provenance"), header.provenance)
    for table in tables(header):
        _write_rows(file, table, content.get(table.group, Stretch()).blocks, fields(table, header))


def _create(file: h5py.File, path: str, field_: schema.Field, shape: tuple[int, ...]) -> None:
    chunks = schema.chunk_shape(field_, shape)
    _describe(file.create_dataset(path, shape, field_.dtype, chunks=chunks, track_times=False), field_)


def _write_rows(
    file: h5py.File, table: schema.Table, blocks: Iterable[Columns], fields: Sequence[schema.Field]
) -> None:
    start = 0
    for block in whole_chunks(blocks):
        stop = start + len(block["step"])
        for field_ in fields:
            if block[field_.name].size:
                file[table.path(field_.name)][start:stop] = block[field_.name]
        start = stop


def whole_chunks(blocks: Iterable[Columns], size: int = schema.CHUNK_ROWS) -> Iterator[Columns]:
    """The same rows in pieces of exactly ``size`` (the last may have fewer): each fills its chunks.

    A chunk that is written in several goes is read and written again in each of them.
    """
    held: list[Columns] = []
    for block in blocks:
        held.append(block)
        while sum(len(b["step"]) for b in held) >= size:
            joined = {name: np.concatenate([b[name] for b in held]) for name in held[0]}
            yield {name: values[:size] for name, values in joined.items()}
            held = [{name: values[size:] for name, values in joined.items()}]
    if held and sum(len(b["step"]) for b in held):
        yield {name: np.concatenate([b[name] for b in held]) for name in held[0]}


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
    if header.features is not None:
        names[schema.FEATURES.path(schema.FEATURE)] = list(header.features.features)
    for table in tables(header):
        if table in (schema.UPDATES, schema.LEDGER):
            names[table.path(schema.SOURCE)] = sources(header.tasks)
    if header.noise or header.probe_loader:
        names[schema.OTHER_TASK] = list(header.tasks)
    for path, values in names.items():
        dataset = file.create_dataset(path, data=np.array(values, dtype=object), dtype=text, track_times=False)
        dataset.attrs["long_name"] = schema.MEANINGS[path.rpartition("/")[2]]
        _scale(file, path)
    columns_of = {"layer_size": header.layer_size, "reach": header.reach}
    for field_ in schema.HEADER_FIELDS:
        _write_table(file, field_.name, field_, columns_of[field_.name], header)
    if header.features is not None:
        path = schema.FEATURES.path(schema.FEATURE_SIZE.name)
        _write_table(file, path, schema.FEATURE_SIZE, header.features.feature_size, header)


def _write_table(file: h5py.File, path: str, field_: schema.Field, values: NDArray[Any], header: Header) -> None:
    data = np.asarray(values, dtype=field_.dtype).reshape(lengths(field_, header))
    _describe(file.create_dataset(path, data=data, track_times=False), field_)


def _describe(dataset: h5py.Dataset, field_: schema.Field) -> None:
    dataset.attrs["long_name"] = field_.meaning
    if field_.units:
        dataset.attrs["units"] = field_.units


def _scale(file: h5py.File, path: str) -> None:
    file[path].make_scale(path.rpartition("/")[2])


def _attach(file: h5py.File, table: schema.Table, field_: schema.Field) -> None:
    dataset = file[table.path(field_.name)]
    for index, axis in enumerate(field_.axes):
        if field_.name != axis:
            own = axis in (schema.STEP, schema.FEATURE, schema.SOURCE)
            dataset.dims[index].attach_scale(file[table.path(axis) if own else axis])
        dataset.dims[index].label = axis


def _write_epochs(file: h5py.File, epochs: Epochs) -> None:
    group = file.create_group("epochs")
    order = sorted(epochs)
    group.create_dataset("epoch", data=np.array(order, dtype="<i4"), track_times=False)
    group[schema.EPOCH].make_scale(schema.EPOCH)
    names = sorted({name for values in epochs.values() for name in values})
    for name in names:
        data = np.array([epochs[e].get(name, np.nan) for e in order], dtype="<f8")
        dataset = group.create_dataset(name, data=data, track_times=False)
        dataset.dims[0].attach_scale(group["epoch"])
        dataset.dims[0].label = schema.EPOCH


def _write_provenance(group: h5py.Group, provenance: Mapping[str, Any]) -> None:
    for name, value in flatten(provenance):
        group.attrs[name] = attribute(value)


def attribute(value: Any) -> Any:
    """A value as HDF5 is to keep it, so that every tool can read it.

    Lists of text have a fixed length, so that a reader knows their size beforehand; truth is 0 or 1 (h5py would make
    an enumeration of it, which netCDF does not show).

    >>> attribute(["record", "--epochs"]).dtype.itemsize
    8
    """
    if isinstance(value, (bool, np.bool_)):
        return np.uint8(value)
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(item, bool) for item in value):
        return np.array(value, dtype=np.uint8)
    if not all(isinstance(item, str) for item in value):
        return value
    raw = [item.encode("utf-8", "replace") for item in value]
    return np.array(raw, dtype=h5py.string_dtype("utf-8", max(1, *map(len, raw))))


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
