"""What a file must be before a number is read from it: every run file is treated as a stranger's.

Nothing outside the file is touched (no links, no external or virtual storage), no code is loaded (no filters), nothing
is read that is larger than the file itself or of another type or shape than docs/run-file.md says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5o, h5s, h5t

from gradprobe.errors import RunFileError
from gradprobe.foreign import CONTROL
from gradprobe.rows import EARLIER_SOURCES
from gradprobe.rows.limits import (
    MAX_ALL_NAMES,
    MAX_ATTRIBUTES,
    MAX_BLIND,
    MAX_CHUNK,
    MAX_DEPTH,
    MAX_FILE,
    MAX_NAME,
    MAX_NAMES,
    MAX_OBJECTS,
    MAX_STRINGS,
    MAX_TEXT,
)
from gradprobe.runfile import schema
from gradprobe.runfile.files import SummedFile

__all__ = ["printable"]


_NUMBERS = (h5t.INTEGER, h5t.FLOAT)

_CONTROL = re.compile(f"[{CONTROL}]")


class RefusedError(RunFileError):
    """What is wrong with a file; becomes a RunFileError that names it."""


def attribute(owner: h5py.HLObject, name: str, kinds: type | tuple[type, ...] = object) -> Any:
    """One attribute, as a str, bool, int, float or a list of these, whatever HDF5 form it has.

    Raises:
        RefusedError: It is missing, of a foreign type, too large, or not of one of ``kinds``.
    """
    key = name.encode("utf-8", "surrogateescape")
    where = f"attribute {name!r} of {_name(owner)}"
    if not h5a.exists(owner.id, key):
        raise RefusedError(f"{where} is missing")
    found = h5a.open(owner.id, key)
    space, kind = found.get_space(), found.get_type()
    if space.get_simple_extent_type() == h5s.NULL or not space.get_simple_extent_npoints():
        value: Any = []
    else:
        _check_attribute(where, kind, space, found.get_storage_size(), _len_of(owner))
        value = _plain(where, owner.attrs[name])
    if not isinstance(value, kinds):
        raise RefusedError(f"{where} is of the wrong type: {type(value).__name__}")
    return value


def _len_of(owner: h5py.HLObject) -> int:
    """Bytes of the file that ``owner`` is in."""
    return int(h5py.h5i.get_file_id(owner.id).get_filesize())


def _check_attribute(where: str, kind: h5t.TypeID, space: h5s.SpaceID, stored: int, file_size: int) -> None:
    number = kind.get_class() in _NUMBERS or (kind.get_class() == h5t.ENUM and kind.get_super().get_size() == 1)
    if not number and kind.get_class() != h5t.STRING:
        raise RefusedError(f"{where} is of a foreign type (only numbers and text are allowed)")
    if space.get_simple_extent_ndims() > 1:
        raise RefusedError(f"{where} has {space.get_simple_extent_ndims()} dimensions")
    if stored > MAX_TEXT or kind.get_size() > MAX_TEXT:
        raise RefusedError(f"{where} is too large: {max(stored, kind.get_size()):,} bytes")
    count = space.get_simple_extent_npoints()
    variable = kind.get_class() == h5t.STRING and kind.is_variable_str()
    # Many references to one long string would be copied many times; HDF5 shows no length before it has done so.
    if variable and count > 1 and count * file_size > MAX_STRINGS:
        raise RefusedError(
            f"{where} holds {count:,} variable-length strings; in a large file a list must be of fixed length"
        )


def _plain(where: str, value: Any) -> Any:
    items = np.asarray(value).ravel().tolist() if isinstance(value, np.ndarray) else [value]
    plain = [_scalar(where, item) for item in items]
    return plain if isinstance(value, np.ndarray) else plain[0]


def _scalar(where: str, value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise RefusedError(f"{where} is not UTF-8") from None
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise RefusedError(f"{where} is too large: {len(value):,} characters")
        return printable(value)
    return value.item() if isinstance(value, np.generic) else value


def printable(text: str) -> str:
    """Text without control characters, which become U+FFFD; what else it may hold, the console and the page see to.

    >>> printable("a\\x1b[2Jb\\n")
    'a\ufffd[2Jb\\n'
    """
    return _CONTROL.sub("\ufffd", text.encode("utf-8", "replace").decode("utf-8"))


def _name(owner: h5py.HLObject) -> str:
    return printable(str(owner.name)) if owner.name is not None else "an object without a name"


_NAMES = (schema.LAYER, schema.TASK, schema.PAIR)
_STRING_REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])


def check_version(file: h5py.File) -> None:
    """Whether it is a run, and of a version that is known.

    Raises:
        RefusedError: It is not.
    """
    kind = attribute(file, "encoding-type") if "encoding-type" in file.attrs else None
    if kind != schema.ENCODING_TYPE:
        raise RefusedError(f"is an HDF5 file but not a gradprobe run (encoding-type is {kind!r})")
    version = attribute(file, "encoding-version", str)
    ours = schema.ENCODING_VERSION.split(".")[0]
    if version.split(".")[0] != ours:
        raise RefusedError(
            f"has format version {version}; this gradprobe reads version {ours}. Update it: pip install -U gradprobe"
        )


# ---- structure


def check(file: h5py.File, raw: SummedFile) -> None:
    """Check all that can be checked without reading a number.

    Args:
        file: Open, of a version that is known.
        raw: The bytes beneath it.

    Raises:
        RefusedError: What is wrong, where.
    """
    size = raw.length
    if size > MAX_FILE:
        raise RefusedError(f"has {size:,} bytes; at most {MAX_FILE:,} are read")
    found: _Found = {}
    for where, owner in _objects(file):
        found[where] = owner
        if h5a.get_num_attrs(owner.id) > MAX_ATTRIBUTES:
            raise RefusedError(f"{where} has {h5a.get_num_attrs(owner.id):,} attributes")
        if isinstance(owner, h5py.Dataset):
            _check_dataset(where, owner.id, size)
    _check_known(found, raw)


_Found = dict[str, h5py.Group | h5py.Dataset]
"""Every object by its path."""


def _objects(file: h5py.File) -> Iterator[tuple[str, h5py.Group | h5py.Dataset]]:
    """Every object once, the root first. Nothing is opened before its link is known to lead into the file."""
    seen: set[int] = set()
    waiting: list[tuple[str, h5py.Group, int]] = [("", file, 0)]
    yield "/", file
    while waiting:
        path, group, depth = waiting.pop()
        links = group.id.get_num_objs()
        if len(seen) + links > MAX_OBJECTS or depth > MAX_DEPTH:
            raise RefusedError(f"{path or '/'} holds too much, or lies too deep: {links:,} links at depth {depth}")
        for key in list(group.id):
            where = f"{path}/{printable(key.decode('utf-8', 'replace'))}"
            if group.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                raise RefusedError(f"{where} is a link to elsewhere (soft or external); a run file has none")
            address = h5g.get_objinfo(group.id, key)
            kind, number = address.type, address.objno[0] | address.objno[1] << 32
            if number in seen or kind not in (h5g.GROUP, h5g.DATASET):
                raise RefusedError(f"{where} is a second link to one object, or neither group nor dataset")
            seen.add(number)
            opened = h5o.open(group.id, key)
            if kind == h5g.DATASET:
                yield where, h5py.Dataset(opened)
            else:
                child = h5py.Group(opened)
                yield where, child
                waiting.append((where, child, depth + 1))


def _check_dataset(where: str, low: h5d.DatasetID, size: int) -> None:
    plist, kind = low.get_create_plist(), low.get_type()
    layout = plist.get_layout()
    if layout not in (h5d.CONTIGUOUS, h5d.CHUNKED, h5d.COMPACT):
        raise RefusedError(f"{where} is a virtual dataset: it takes its numbers from other files")
    if plist.get_external_count():
        raise RefusedError(f"{where} has external storage: it takes its numbers from other files")
    if plist.get_nfilters():
        raise RefusedError(f"{where} uses a filter (compression); a run file has none. Remove it: h5repack -f NONE")
    if kind.get_class() not in (*_NUMBERS, h5t.STRING):
        raise RefusedError(f"{where} is of a foreign type (only numbers and text are allowed)")
    space = low.get_space()
    if space.get_simple_extent_type() != h5s.SIMPLE:
        raise RefusedError(f"{where} has no axes; every dataset of a run has")
    variable = kind.get_class() == h5t.STRING and kind.is_variable_str()
    item = _STRING_REFERENCE.itemsize if variable else kind.get_size()
    needed = item * _product(space.get_simple_extent_dims())
    if layout == h5d.CHUNKED and needed:
        chunk = plist.get_chunk()
        if item * _product(chunk) > MAX_CHUNK:
            raise RefusedError(f"{where} has chunks of {item * _product(chunk):,} bytes")
        grid = [-(-n // c) * c for n, c in zip(space.get_simple_extent_dims(), chunk, strict=True)]
        needed = item * _product(grid)
    stored = low.get_storage_size() if needed else 0
    if stored != needed or stored > size:  # a chunk that is not there would read as zeros
        raise RefusedError(f"{where} claims {needed:,} bytes, but {stored:,} are stored in a file of {size:,}")


def _product(lengths: Sequence[int]) -> int:
    return math.prod(int(length) for length in lengths)


def check_memory(needed: int) -> None:
    """Whether so many bytes can be read at once; a sparse file is large at no cost.

    Raises:
        RefusedError: The machine has less.
    """
    if needed <= MAX_BLIND:
        return
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: numpy's own MemoryError has to do
        return
    if needed > free:
        raise RefusedError(
            f"{needed:,} bytes would be read at once, {free:,} of memory are free; read it with a stride"
        )


def _check_known(found: _Found, raw: SummedFile) -> None:
    lengths = {axis: _shape(found, axis, 1)[0] for axis in _NAMES}
    tasks = lengths[schema.TASK]
    if lengths[schema.PAIR] != tasks * (tasks - 1) // 2:
        raise RefusedError(f"has {lengths[schema.PAIR]} pairs for {tasks} tasks")
    for axis in _NAMES:
        _check_text(found, axis, raw)
    lengths[schema.OTHER_TASK] = tasks
    if f"/{schema.OTHER_TASK}" in found:
        _check_text(found, schema.OTHER_TASK, raw)
        if (count := _shape(found, schema.OTHER_TASK, 1)[0]) != tasks:
            raise RefusedError(f"has {count} other tasks for {tasks} tasks")
    for field in schema.HEADER_FIELDS:
        _check_field(found, field.name, field.dtype, tuple(lengths[axis] for axis in field.axes))
    for table in (*schema.TABLES, *schema.WHOLE):
        if f"/{table.group}" in found or not table.group:
            _check_table(found, raw, table, lengths)
    for name in ("epochs", "provenance"):
        if not isinstance(found.get(f"/{name}"), h5py.Group):
            raise RefusedError(f"has no group {name!r}")
    shape = _shape(found, f"epochs/{schema.EPOCH}", 1)
    for name in [where[1:] for where in found if where.startswith("/epochs/")]:
        _check_field(found, name, np.dtype("<i4" if name == f"epochs/{schema.EPOCH}" else "<f8"), shape)


def _check_table(found: _Found, raw: SummedFile, table: schema.Table, others: Mapping[str, int]) -> None:
    """What a table has of its fields; only its axes must be there, and all of one that is written at once."""
    lengths = {**others, **{axis: _shape(found, table.path(axis), 1)[0] for axis in table.own}}
    if schema.SOURCE in table.own and lengths[schema.SOURCE] != lengths[schema.TASK] + len(EARLIER_SOURCES):
        raise RefusedError(f"has {lengths[schema.SOURCE]} parts of updates for {lengths[schema.TASK]} tasks")
    for axis in table.names:
        _check_text(found, table.path(axis), raw)
    fields = (*table.fields, *((schema.FEATURE_SIZE,) if table is schema.FEATURES else ()))
    for field in fields:
        path = table.path(field.name)
        shape = tuple(lengths[axis] for axis in field.axes)
        if f"/{path}" not in found and table in schema.TABLES and field is not schema.FEATURE_SIZE:
            continue
        if field.dtype != schema.TEXT:
            _check_field(found, path, field.dtype, shape)
        elif _shape(found, path, 1) != shape:
            raise RefusedError(f"dataset {path!r} is not as long as its {field.axes[0]}s")
        elif field.name not in table.names:
            _check_text(found, path, raw)


def _shape(found: _Found, name: str, dimensions: int) -> tuple[int, ...]:
    dataset = found.get(f"/{name}")
    if not isinstance(dataset, h5py.Dataset):
        raise RefusedError(f"has no dataset {name!r}")
    shape: tuple[int, ...] = dataset.id.shape
    if len(shape) != dimensions:
        raise RefusedError(f"dataset {name!r} has {len(shape)} axes, not {dimensions}")
    return shape


def _check_field(found: _Found, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if (given := _shape(found, name, len(shape))) != shape:
        raise RefusedError(f"dataset {name!r} has shape {given}, not {shape}")
    kind = found[f"/{name}"].id.get_type()
    if not kind.equal(h5t.py_create(dtype)):
        raise RefusedError(f"dataset {name!r} holds {kind.dtype}, not {dtype}")


def _check_text(found: _Found, axis: str, raw: SummedFile) -> None:
    """Names are variable-length strings; how long they are is looked up in the bytes before HDF5 makes copies."""
    dataset, file = found[f"/{axis}"], found["/"]
    kind = dataset.id.get_type()
    if kind.get_class() != h5t.STRING or not kind.is_variable_str():
        raise RefusedError(f"dataset {axis!r} does not hold names (variable-length strings)")
    count = dataset.shape[0]
    if count > MAX_NAMES:
        raise RefusedError(f"dataset {axis!r} holds {count:,} names; at most {MAX_NAMES:,} are read")
    if not count:
        return
    sizes = h5py.h5i.get_file_id(file.id).get_create_plist().get_sizes()
    if dataset.id.get_create_plist().get_layout() != h5d.CONTIGUOUS or sizes != (8, 8):
        raise RefusedError(f"dataset {axis!r} is not stored as a run file stores names (contiguous)")
    raw.seek(dataset.id.get_offset())
    buffer = bytearray(count * _STRING_REFERENCE.itemsize)
    raw.readinto(buffer)
    lengths = np.frombuffer(buffer, _STRING_REFERENCE)["length"]
    if lengths.max() > MAX_NAME or lengths.sum(dtype=np.int64) > MAX_ALL_NAMES:
        raise RefusedError(f"dataset {axis!r} holds names of up to {lengths.max():,} bytes")
