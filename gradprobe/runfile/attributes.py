"""Attributes and text of a file that may come from anyone."""

from __future__ import annotations

import re
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5s, h5t

from gradprobe.errors import RunFileError
from gradprobe.foreign import CONTROL
from gradprobe.rows.limits import MAX_STRINGS, MAX_TEXT

NUMBERS = (h5t.INTEGER, h5t.FLOAT)

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
        _check_attribute(where, kind, space, found.get_storage_size(), len_of(owner))
        value = _plain(where, owner.attrs[name])
    if not isinstance(value, kinds):
        raise RefusedError(f"{where} is of the wrong type: {type(value).__name__}")
    return value


def len_of(owner: h5py.HLObject) -> int:
    """Bytes of the file that ``owner`` is in."""
    return int(h5py.h5i.get_file_id(owner.id).get_filesize())


def _check_attribute(where: str, kind: h5t.TypeID, space: h5s.SpaceID, stored: int, file_size: int) -> None:
    number = kind.get_class() in NUMBERS or (kind.get_class() == h5t.ENUM and kind.get_super().get_size() == 1)
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
