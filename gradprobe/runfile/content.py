"""The content of a run in memory, the sessions that it was recorded in, and how all is put into HDF5."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gradprobe import __version__
from gradprobe.rows import MEASURED, AnyRow, Header, Table
from gradprobe.rows.layers import begins_with
from gradprobe.rows.layers import widened as widened_array
from gradprobe.rows.limits import MAX_STATUS, MAX_STATUSES, MAX_TEXT
from gradprobe.rows.table import lengths, names_along
from gradprobe.runfile import schema, storable


def with_layers(known: Header, found: Header) -> tuple[Header, NDArray[np.intp] | None]:
    """The header of a file after its session has found more layers, which only ever join at the end.

    So the layers of each file of a run begin with those of the file before.

    Args:
        known: The file's so far. After a resume it may have layers that this session has not found yet.
        found: The session's.

    Returns:
        The file's, and where the session's layers are in it; None: at its beginning.
    """
    layers = [*known.layers, *(name for name in found.layers if name not in set(known.layers))]
    order = {name: place for place, name in enumerate(layers)}
    places = np.array([order[name] for name in found.layers], dtype=np.intp)
    size = np.zeros(len(layers), np.int64)
    size[: len(known.layers)] = known.layer_size
    size[places] = np.maximum(size[places], found.layer_size)  # a layer may get parameters, and loses none
    reach = widened_array(np.asarray(known.reach, dtype=bool), len(layers), fill=False)
    reach[places] = found.reach
    header = replace(known, layers=tuple(layers), layer_size=size, reach=reach)
    return header, None if begins_with(layers, found.layers) else places


Columns = dict[str, NDArray[Any]]
"""One array per row field, all with the rows on the first axis."""

UNSTORED = "unstored"
"""The part of the provenance that says, by dataset, which values could not be stored."""

_FIRST = " rows, first: "

_OURS = ("sessions", "repair")
"""Entries of the provenance that there is always room for, beside :data:`UNSTORED`."""


@dataclass
class State:
    """What changes while a run is written.

    Attributes:
        seen: (L, T) bool: which task has had a gradient other than 0 on which layer in the rows so far; None: no rows.
        by_effect: Whether the file's ``reach``, and its sums over shared layers, go by that. A copy of a file of an
            earlier version is told by its zeros when it is read, as the file itself.
        unstored: By dataset: how many rows have a value that could not be stored, and the first of them in words.
    """

    end: str = ""
    merged_through: int = 0
    dropped: int = 0
    status_names: list[str] = field(default_factory=lambda: [MEASURED])
    seen: NDArray[np.bool_] | None = None
    by_effect: bool = True
    unstored: dict[str, tuple[int, str]] = field(default_factory=dict)

    def see(self, norms: NDArray[np.float32]) -> None:
        """Rows with these norms (n, L, T) are in the file."""
        found: NDArray[np.bool_] = np.any(norms > 0, axis=0)
        before = found if self.seen is None else widened_array(self.seen, len(found))
        self.seen = found | before

    def reach(self, header: Header) -> NDArray[np.bool_]:
        """(L, T): what the file's rows say; of a task without any gradient, what the header says."""
        known = np.asarray(header.reach, dtype=bool).reshape(len(header.layers), len(header.tasks))
        if self.seen is None or not self.by_effect:
            return known
        seen = widened_array(self.seen, len(known))
        return np.where(seen.any(axis=0), seen, known)

    def status_code(self, reason: object) -> int:
        """The number under which ``reason`` is stored; the last one stands for all that come too late."""
        words = storable.text(reason if isinstance(reason, str) else f"unknown: {storable.shown(reason)}", MAX_STATUS)
        if words not in self.status_names:
            if len(self.status_names) >= MAX_STATUSES:
                words = "another reason (too many different ones to list)"
            if words not in self.status_names:
                self.status_names.append(words)
        return self.status_names.index(words)

    def lost(self, place: str, rows: Sequence[AnyRow], values: Mapping[int, object]) -> None:
        """Values of a dataset could not be stored: by row, what they were."""
        if not values:
            return
        often, first = self.unstored.get(place, (0, ""))
        row = min(values)
        words = f"{storable.shown(values[row])} at step {rows[row].step}"
        self.unstored[place] = (often + len(values), first or words)

    @property
    def described(self) -> dict[str, str]:
        """``unstored`` in words, as a provenance holds it."""
        return {f"{UNSTORED}.{place}": f"{often}{_FIRST}{first}" for place, (often, first) in self.unstored.items()}

    def remember(self, provenance: Mapping[str, Any]) -> None:
        """What the provenance of the run so far says was not stored."""
        for name, words in provenance.items():
            often, between, first = str(words).partition(_FIRST)
            if name.startswith(f"{UNSTORED}.") and between and often.isdecimal():
                self.unstored[name.removeprefix(f"{UNSTORED}.")] = (int(often), first)


def columns(table: Table, rows: Sequence[AnyRow], header: Header, state: State) -> Columns:
    """Rows of one table side by side, in the form in which they are stored.

    A value that cannot be stored costs that value: it is missing, and ``state.unstored`` says so.
    """
    batch = table.batch(rows, header, state.seen, state.reach(header), state.status_code)
    try:
        values = {f.name: _values(f, batch) for f in table.held(header)}
    except Exception:
        if len(rows) > 1:  # one of them is odd: each by itself
            each = [columns(table, [row], header, state) for row in rows]
            return {name: np.concatenate([one[name] for one in each]) for name in each[0]}
        values = {f.name: _values_or_none(f, batch) for f in table.held(header)}
    found: Columns = {}
    for f in table.held(header):
        found[f.name], lost = storable.column(f, values[f.name], lengths(f, header, len(rows)))
        state.lost(table.path(f.name), rows, lost)
    if table is schema.ROWS:
        state.see(found["grad_norm"])
    return found


def _values(field_: schema.Field, batch: Any) -> Any:
    if field_.of is not None:
        return field_.of(batch)
    if schema.LAYER in field_.axes:
        return batch.stacked(field_.name, *lengths(field_, batch.header)[2:])
    return [getattr(row, field_.name) for row in batch.rows]


def _values_or_none(field_: schema.Field, batch: Any) -> Any:
    try:
        return _values(field_, batch)
    except Exception as error:
        return [error]


def tables(header: Header) -> list[Table]:
    """The tables of a file with this header."""
    return [table for table in schema.TABLES if not table.group or table.name in header]


def widened(field_: schema.Field, values: NDArray[Any], layers: int) -> NDArray[Any]:
    """Rows of a file with fewer layers, as they go with those of one that has so many."""
    if schema.LAYER not in field_.axes or values.shape[axis := field_.axes.index(schema.LAYER)] == layers:
        return values
    return widened_array(values, layers, axis, field_.missing)


def missing(field_: schema.Field, run: Any, rows: int) -> NDArray[Any]:
    """What stands for a field in rows of a file that lacks it; read-only, and of no size in memory."""
    return np.broadcast_to(np.asarray(field_.missing, dtype=field_.dtype), lengths(field_, run, rows))


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
        header: Names and provenance, and which tables the file has.
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
        for field_ in table.held(header):
            _create(file, table.path(field_.name), field_, lengths(field_, header, count))
        _scale(file, table.path(table.axis))
    file["status"].attrs["status_names"] = storable.stored(state.status_names)
    for table in tables(header):
        for field_ in table.held(header):
            _attach(file, table, field_)
    for field_ in schema.HEADER_FIELDS:
        _attach(file, schema.ROWS, field_)
    if schema.FEATURES in tables(header):
        _attach(file, schema.FEATURES, schema.FEATURE_SIZE)
    _write_epochs(file, epochs)
    if header.test is not None:
        test = header.test
        values = {"cluster": test.clusters, "metric": test.metrics, "size": test.size, "without": test.without}
        write_table(file, schema.TEST, values)
    group = file.create_group("provenance")
    ours = {name: header.provenance[name] for name in _OURS if name in header.provenance}
    for name, value in storable.provenance(header.provenance, {**ours, **state.described}).items():
        group.attrs[name] = storable.stored(value)
    for table in tables(header):
        _write_rows(file, table, content.get(table.group, Stretch()).blocks, table.held(header))


def write_table(file: h5py.File, table: Table, values: Mapping[str, Any]) -> h5py.Group:
    """Write a table that is known as a whole; returns its group."""
    group = file.create_group(table.group)
    for field_ in table.fields:
        is_text = field_.dtype == schema.TEXT
        data = [storable.text(v) for v in values[field_.name]] if is_text else values[field_.name]
        dtype = h5py.string_dtype("utf-8") if is_text else field_.dtype
        array = np.array(data, dtype=object) if is_text else np.asarray(data, dtype=field_.dtype)
        _describe(group.create_dataset(field_.name, data=array, dtype=dtype, track_times=False), field_)
        if field_.name in table.own:
            group[field_.name].make_scale(field_.name)
    for field_ in table.fields:
        _attach(file, table, field_)
    return group


def _create(file: h5py.File, path: str, field_: schema.Field, shape: tuple[int, ...]) -> None:
    chunks = schema.chunk_shape(field_, shape)
    _describe(file.create_dataset(path, shape, field_.dtype, chunks=chunks, track_times=False), field_)


def _write_rows(file: h5py.File, table: Table, blocks: Iterable[Columns], fields: Sequence[schema.Field]) -> None:
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
    file.attrs["end"] = storable.text(state.end, MAX_STATUS)
    file.attrs["merged_through"] = np.int64(state.merged_through)
    file.attrs["rows_dropped"] = np.int64(state.dropped)


def _write_names(file: h5py.File, header: Header) -> None:
    # Variable-length UTF-8: fixed-length strings break selection by name in xarray.
    text = h5py.string_dtype("utf-8")
    held = tables(header)
    axes = [schema.LAYER, schema.TASK, schema.PAIR, *(table.path(axis) for table in held for axis in table.names)]
    if any(schema.OTHER_TASK in f.axes for table in held for f in table.held(header)):
        axes.append(schema.OTHER_TASK)
    for path in axes:
        axis = path.rpartition("/")[2]
        data = np.array(names_along(axis, header), dtype=object)
        file.create_dataset(path, data=data, dtype=text, track_times=False)
        file[path].attrs["long_name"] = schema.MEANINGS[axis]
        _scale(file, path)
    columns_of = {"layer_size": header.layer_size, "reach": header.reach}
    for field_ in schema.HEADER_FIELDS:
        _write_dataset(file, field_.name, field_, columns_of[field_.name], header)
    if header.features is not None and schema.FEATURES in held:
        path = schema.FEATURES.path(schema.FEATURE_SIZE.name)
        _write_dataset(file, path, schema.FEATURE_SIZE, header.features.feature_size, header)


def _write_dataset(file: h5py.File, path: str, field_: schema.Field, values: NDArray[Any], header: Header) -> None:
    data = np.asarray(values, dtype=field_.dtype).reshape(lengths(field_, header))
    _describe(file.create_dataset(path, data=data, track_times=False), field_)


def _describe(dataset: h5py.Dataset, field_: schema.Field) -> None:
    dataset.attrs["long_name"] = field_.meaning
    if field_.units:
        dataset.attrs["units"] = field_.units


def _scale(file: h5py.File, path: str) -> None:
    file[path].make_scale(path.rpartition("/")[2])


def _attach(file: h5py.File, table: Table, field_: schema.Field) -> None:
    dataset = file[table.path(field_.name)]
    for index, axis in enumerate(field_.axes):
        if field_.name != axis:
            dataset.dims[index].attach_scale(file[table.place(axis)])
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


# ---- sessions: the first, and one for every time the run was gone on with
# Stored in the provenance as one JSON text per session. What the newest session was started with is the provenance
# itself; an earlier session keeps only those entries that the next one replaced.

_MOST_SESSIONS = 100
"""Sessions that are kept; of more, the first and the newest."""

Session = dict[str, Any]
"""``first_step``; ``started`` (UTC); ``end`` as of the file, empty: killed, or still going on; ``replaced``."""


def new_session(first_step: int = 0) -> Session:
    """A session that begins now."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"first_step": first_step, "started": now, "end": "", "replaced": {}}


def resumed_sessions(
    earlier: Sequence[Session], end: str, old: Mapping[str, Any], new: Mapping[str, Any], step: int
) -> list[Session]:
    """The sessions of a run that is gone on with.

    Args:
        earlier: Those up to now.
        end: How the last of them ended.
        old: Its provenance, flat.
        new: The provenance of the session that begins.
        step: The first step of the new session.

    >>> [s["replaced"] for s in resumed_sessions([new_session()], "", {"a": 1, "b": 2}, {"a": 1, "b": 3}, 10)]
    [{'b': 2}, {}]
    """
    before = [dict(s) for s in earlier] or [new_session() | {"started": ""}]
    gone = {k: v for k, v in old.items() if k not in new or _as_lists(new[k]) != _as_lists(v)}
    before[-1] = {**before[-1], "end": end, "replaced": gone}
    kept = before if len(before) < _MOST_SESSIONS else [before[0], *before[2 - _MOST_SESSIONS :]]
    return [*kept, new_session(step)]


def dump_sessions(sessions: Sequence[Session]) -> list[str]:
    """As they are stored. Of what was replaced, texts are cut where a file has no room for all of it."""
    found: list[str] = []
    for room in (None, 1000, 50, 0):
        found = [json.dumps(_session_cut(s, room), default=str, ensure_ascii=False) for s in sessions]
        if max((len(text.encode("utf-8", "replace")) for text in found), default=0) * len(found) <= MAX_TEXT:
            break
    return found


def _session_cut(session: Session, room: int | None) -> Session:
    """With entries of up to so many characters; None: all; 0: without any."""
    if room is None:
        return session
    long = {k: f"{v!s:.{room}} ... (cut)" if len(str(v)) > room else v for k, v in session["replaced"].items()}
    return {**session, "replaced": long if room else {}}


def load_sessions(texts: Any) -> list[Session]:
    """As :func:`dump_sessions` made them.

    Raises:
        ValueError: They are not: the file may be a stranger's.
    """
    if not isinstance(texts, list):
        raise ValueError(f"sessions are {texts!r}, not a list of JSON texts")
    return [_session(text) for text in texts]


def _session(text: Any) -> Session:
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"a session is no JSON text ({error})") from None
    kinds = {"first_step": int, "started": str, "end": str, "replaced": dict}
    if not isinstance(found, dict) or any(not isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"a session lacks one of {', '.join(kinds)}, or has it of another type")
    return found


def _as_lists(value: Any) -> Any:
    return [_as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
