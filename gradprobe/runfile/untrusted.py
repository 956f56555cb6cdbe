"""What a file must be before a number is read from it: every run file is treated as a stranger's.

Nothing outside the file is touched (no links, no external or virtual storage), no code is loaded (no filters), nothing is
read that is larger than the file itself or of another type or shape than docs/run-file.md says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5o, h5s, h5t

from gradprobe.runfile import schema
from gradprobe.runfile.sums import SummedFile

MAX_OBJECTS = 10_000
MAX_DEPTH = 8
MAX_ATTRIBUTES = 10_000
MAX_NAMES = 100_000
MAX_TEXT = 1 << 20
MAX_CHUNK = 1 << 28
MAX_STRINGS = 1 << 28
MAX_FILE = 1 << 37  # 10 tasks on 100 layers in six million rows
MAX_BLIND = 1 << 28  # a read of more is held against the memory that is there

NUMBERS = (h5t.INTEGER, h5t.FLOAT)
_STRING_REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])


class Refused(Exception):
    """What is wrong with a file; becomes a RunFileError that names it."""


# ---- attributes


def attribute(owner: h5py.HLObject, name: str, kinds: type | tuple[type, ...] = object) -> Any:
    """One attribute, as a str, bool, int, float or a list of these, whatever HDF5 form it has.

    Raises:
        Refused: It is missing, of a foreign type, too large, or not of one of ``kinds``.
    """
    key = name.encode("utf-8", "surrogateescape")
    where = f"attribute {name!r} of {_name(owner)}"
    if not h5a.exists(owner.id, key):
        raise Refused(f"{where} is missing")
    found = h5a.open(owner.id, key)
    space, kind = found.get_space(), found.get_type()
    if space.get_simple_extent_type() == h5s.NULL or not space.get_simple_extent_npoints():
        value: Any = []
    else:
        _check_attribute(where, kind, space, found.get_storage_size(), len_of(owner))
        value = _plain(where, owner.attrs[name])
    if not isinstance(value, kinds):
        raise Refused(f"{where} is of the wrong type: {type(value).__name__}")
    return value


def len_of(owner: h5py.HLObject) -> int:
    """Bytes of the file that ``owner`` is in."""
    return int(h5py.h5i.get_file_id(owner.id).get_filesize())


def _check_attribute(where: str, kind: h5t.TypeID, space: h5s.SpaceID, stored: int, file_size: int) -> None:
    number = kind.get_class() in NUMBERS or (kind.get_class() == h5t.ENUM and kind.get_super().get_size() == 1)
    if not number and kind.get_class() != h5t.STRING:
        raise Refused(f"{where} is of a foreign type (only numbers and text are allowed)")
    if space.get_simple_extent_ndims() > 1:
        raise Refused(f"{where} has {space.get_simple_extent_ndims()} dimensions")
    if stored > MAX_TEXT or kind.get_size() > MAX_TEXT:
        raise Refused(f"{where} is too large: {max(stored, kind.get_size()):,} bytes")
    count = space.get_simple_extent_npoints()
    variable = kind.get_class() == h5t.STRING and kind.is_variable_str()
    # Many references to one long string would be copied many times; HDF5 shows no length before it has done so.
    if variable and count > 1 and count * file_size > MAX_STRINGS:
        raise Refused(
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
            raise Refused(f"{where} is not UTF-8") from None
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise Refused(f"{where} is too large: {len(value):,} characters")
        return printable(value)
    return value.item() if isinstance(value, np.generic) else value


def printable(text: str) -> str:
    """Text that a terminal can be given: control characters, which could steer it, become U+FFFD.

    >>> printable("a\\x1b[2Jb\\n")
    'a\ufffd[2Jb\\n'
    """
    return "".join(c if c in "\n\t" or c >= " " and not "\x7f" <= c <= "\x9f" else "\ufffd" for c in _utf8(text))


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def check_version(file: h5py.File) -> None:
    """Whether it is a run, and of a version that is known.

    Raises:
        Refused: It is not.
    """
    kind = attribute(file, "encoding-type") if "encoding-type" in file.attrs else None
    if kind != schema.ENCODING_TYPE:
        raise Refused(f"is an HDF5 file but not a gradprobe run (encoding-type is {kind!r})")
    version = attribute(file, "encoding-version", str)
    ours = schema.ENCODING_VERSION.split(".")[0]
    if version.split(".")[0] != ours:
        raise Refused(
            f"has format version {version}; this gradprobe reads version {ours}. Update it: pip install -U gradprobe"
        )


# ---- structure


def check(file: h5py.File, raw: SummedFile) -> None:
    """Check all that can be checked without reading a number.

    Args:
        file: Open, of a version that is known.
        raw: The bytes beneath it.

    Raises:
        Refused: What is wrong, where.
    """
    size = raw.length
    if size > MAX_FILE:
        raise Refused(f"has {size:,} bytes; at most {MAX_FILE:,} are read")
    for owner in _objects(file):
        if h5a.get_num_attrs(owner.id) > MAX_ATTRIBUTES:
            raise Refused(f"{_name(owner)} has {h5a.get_num_attrs(owner.id):,} attributes")
        if isinstance(owner, h5py.Dataset):
            _check_dataset(owner, size)
    _check_known(file, raw)


def _objects(file: h5py.File) -> Iterator[h5py.Group | h5py.Dataset]:
    """Every object once, the root first. Nothing is opened before its link is known to lead into the file."""
    seen: set[int] = set()
    waiting: list[tuple[h5py.Group, int]] = [(file, 0)]
    yield file
    while waiting:
        group, depth = waiting.pop()
        links = group.id.get_num_objs()
        if len(seen) + links > MAX_OBJECTS or depth > MAX_DEPTH:
            raise Refused(f"{_name(group)} holds too much, or lies too deep: {links:,} links at depth {depth}")
        for key in list(group.id):
            where = f"{_name(group).rstrip('/')}/{key.decode('utf-8', 'replace')}"
            if group.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                raise Refused(f"{where} is a link to elsewhere (soft or external); a run file has none")
            address = h5g.get_objinfo(group.id, key)
            kind, number = address.type, address.objno[0] | address.objno[1] << 32
            if number in seen or kind not in (h5g.GROUP, h5g.DATASET):
                raise Refused(f"{where} is a second link to one object, or neither group nor dataset")
            seen.add(number)
            opened = h5o.open(group.id, key)
            if kind == h5g.DATASET:
                yield h5py.Dataset(opened)
            else:
                child = h5py.Group(opened)
                yield child
                waiting.append((child, depth + 1))


def _check_dataset(dataset: h5py.Dataset, size: int) -> None:
    where, low = _name(dataset), dataset.id
    plist, kind = low.get_create_plist(), low.get_type()
    layout = plist.get_layout()
    if layout not in (h5d.CONTIGUOUS, h5d.CHUNKED, h5d.COMPACT):
        raise Refused(f"{where} is a virtual dataset: it takes its numbers from other files")
    if plist.get_external_count():
        raise Refused(f"{where} has external storage: it takes its numbers from other files")
    if plist.get_nfilters():
        raise Refused(f"{where} uses a filter (compression); a run file has none. Remove it: h5repack -f NONE")
    if kind.get_class() not in (*NUMBERS, h5t.STRING):
        raise Refused(f"{where} is of a foreign type (only numbers and text are allowed)")
    space = low.get_space()
    if space.get_simple_extent_type() != h5s.SIMPLE:
        raise Refused(f"{where} has no axes; every dataset of a run has")
    variable = kind.get_class() == h5t.STRING and kind.is_variable_str()
    item = _STRING_REFERENCE.itemsize if variable else kind.get_size()
    needed = item * _product(space.get_simple_extent_dims())
    if layout == h5d.CHUNKED and needed:
        chunk = plist.get_chunk()
        if item * _product(chunk) > MAX_CHUNK:
            raise Refused(f"{where} has chunks of {item * _product(chunk):,} bytes")
        grid = [-(-n // c) * c for n, c in zip(space.get_simple_extent_dims(), chunk, strict=True)]
        needed = item * _product(grid)
    stored = low.get_storage_size() if needed else 0
    if stored != needed or stored > size:  # a chunk that is not there would read as zeros
        raise Refused(f"{where} claims {needed:,} bytes, but {stored:,} are stored in a file of {size:,}")


def _product(lengths: Sequence[int]) -> int:
    return math.prod(int(length) for length in lengths)


def check_memory(needed: int) -> None:
    """Whether so many bytes can be read at once; a sparse file is large at no cost.

    Raises:
        Refused: The machine has less.
    """
    if needed <= MAX_BLIND:
        return
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: numpy's own MemoryError has to do
        return
    if needed > free:
        raise Refused(f"{needed:,} bytes would be read at once, {free:,} of memory are free; read it with a stride")


def _check_known(file: h5py.File, raw: SummedFile) -> None:
    lengths = {}
    for axis in (schema.STEP, schema.LAYER, schema.TASK, schema.PAIR):
        lengths[axis] = _dataset(file, axis, 1).shape[0]
    tasks = lengths[schema.TASK]
    if lengths[schema.PAIR] != tasks * (tasks - 1) // 2:
        raise Refused(f"has {lengths[schema.PAIR]} pairs for {tasks} tasks")
    for axis in (schema.LAYER, schema.TASK, schema.PAIR):
        _check_text(file, axis, raw)
    for field in (*schema.ROW_FIELDS, *schema.HEADER_FIELDS):
        _check_shape(file, field, tuple(lengths[axis] for axis in field.axes))
    for name in ("epochs", "provenance"):
        if not isinstance(file.get(name), h5py.Group):
            raise Refused(f"has no group {name!r}")
    epochs = file["epochs"]
    count = _dataset(epochs, schema.EPOCH, 1).shape[0]
    for name in epochs:
        _check_shape(epochs, schema.Field(name, (), np.dtype("<i4" if name == schema.EPOCH else "<f8"), ""), (count,))


def _dataset(group: h5py.Group, name: str, dimensions: int) -> h5py.Dataset:
    found = group.get(name)
    if not isinstance(found, h5py.Dataset):
        raise Refused(f"has no dataset {name!r}")
    if found.id.rank != dimensions:
        raise Refused(f"dataset {name!r} has {found.id.rank} axes, not {dimensions}")
    return found


def _check_shape(group: h5py.Group, field: schema.Field, shape: tuple[int, ...]) -> None:
    found = _dataset(group, field.name, len(shape))
    if found.shape != shape:
        raise Refused(f"dataset {field.name!r} has shape {found.shape}, not {shape}")
    if not found.id.get_type().equal(h5t.py_create(field.dtype)):
        raise Refused(f"dataset {field.name!r} holds {found.id.get_type().dtype}, not {field.dtype}")


def _check_text(file: h5py.File, axis: str, raw: SummedFile) -> None:
    """Names are variable-length strings; how long they are is looked up in the bytes before HDF5 makes copies."""
    dataset = file[axis]
    kind = dataset.id.get_type()
    if kind.get_class() != h5t.STRING or not kind.is_variable_str():
        raise Refused(f"dataset {axis!r} does not hold names (variable-length strings)")
    count = dataset.shape[0]
    if count > MAX_NAMES:
        raise Refused(f"dataset {axis!r} holds {count:,} names; at most {MAX_NAMES:,} are read")
    if not count:
        return
    if dataset.id.get_create_plist().get_layout() != h5d.CONTIGUOUS or file.id.get_create_plist().get_sizes() != (8, 8):
        raise Refused(f"dataset {axis!r} is not stored as a run file stores names (contiguous)")
    raw.seek(dataset.id.get_offset())
    buffer = bytearray(count * _STRING_REFERENCE.itemsize)
    raw.readinto(buffer)
    lengths = np.frombuffer(buffer, _STRING_REFERENCE)["length"]
    if lengths.max() > MAX_TEXT >> 4 or lengths.sum(dtype=np.int64) > MAX_TEXT << 4:
        raise Refused(f"dataset {axis!r} holds names of up to {lengths.max():,} bytes")


def _name(owner: h5py.HLObject) -> str:
    return printable(str(owner.name)) if owner.name is not None else "an object without a name"
