"""Any value, as a run file can hold it: nothing that a training hands over may keep the rest of it from the disk."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gradprobe.rows import FeatureHeader, Field, Header, TestClusters
from gradprobe.rows.limits import MAX_ALL_NAMES, MAX_ATTRIBUTES, MAX_NAME, MAX_NAMES, MAX_TEXT
from gradprobe.rows.table import PAIR, names_along
from gradprobe.runfile.schema import TEST
from gradprobe.runfile.untrusted import printable

__all__ = ["provenance"]


_MORE = "entries_left_out"
"""The entry of a provenance that says how many others a file has no room for."""


# ---- text

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def text(value: object, most: int = MAX_TEXT) -> str:
    """Text, without what HDF5 and UTF-8 do not have, and with a mark where it is cut.

    Args:
        value: What is no text gives what ``str`` makes of it.
        most: Bytes that it may have.

    >>> text("a\\0b\\ud800"), text("abc" * 20, 30)
    ('a\ufffdb\ufffd', 'abca... (cut: it had 60 bytes)')
    """
    whole = _UNSTORABLE.sub("\ufffd", _words(value))
    raw = whole.encode()
    if len(raw) <= most:
        return whole
    mark = f"... (cut: it had {len(raw):,} bytes)"
    return raw[: max(most - len(mark), 0)].decode("utf-8", "ignore") + mark


def shown(value: object) -> str:
    """A value in a message: its ``repr``, where it has one."""
    try:
        return text(repr(value), 100)
    except Exception:
        return type(value).__name__


def _words(value: object) -> str:
    try:
        return value if isinstance(value, str) else str(value)
    except Exception as error:  # a str() of somebody's own
        return f"{type(value).__name__} without text ({type(error).__name__})"


def _names(given: Sequence[object], paired: bool = False) -> tuple[str, ...]:
    """Names along an axis, as a reader takes them: printable, not empty, not too long, none twice.

    Args:
        given: What they are called.
        paired: Each stands also in the names of pairs with all others, which are as short as that.

    >>> _names(["a", "a\\x1b", "", "a\ufffd"])
    ('a', 'a\ufffd', '(no name)', 'a\ufffd (2)')
    """
    count = max(len(given), 1)
    most = min(MAX_NAME // 2, MAX_ALL_NAMES // count**2) if paired else min(MAX_NAME, MAX_ALL_NAMES // count)
    found: dict[str, None] = {}
    for name in given:
        found[_once(printable(text(name, most - 16)) or "(no name)", found)] = None
    return tuple(found)


def _once(name: str, taken: Mapping[str, object]) -> str:
    """A name that nothing else has."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name} ({number})"
    return found


def header(given: Header) -> Header:
    """A header with names that a file can hold.

    Raises:
        ValueError: There are more layers, pairs of tasks or features than a file can hold, or two pairs of one name.
    """
    for what in (given.layers, given.feature_names):
        if len(what) > MAX_NAMES:
            raise ValueError(
                f"the model has {len(what):,} names ({text(what[0], 80)!r}, ...); a run file holds {MAX_NAMES:,}. "
                "Measure fewer of them: layers=."
            )
    if (pairs := len(given.tasks) * (len(given.tasks) - 1) // 2) > MAX_NAMES:
        raise ValueError(f"{len(given.tasks):,} tasks have {pairs:,} pairs; a run file holds {MAX_NAMES:,}.")
    found = given.features
    if found is not None:
        found = FeatureHeader(_names(found.tasks), _names(found.features), found.feature_size)
    kept = replace(given, tasks=_names(given.tasks, paired=True), layers=_names(given.layers), features=found)
    if any("|" in task for task in kept.tasks) and len(set(names_along(PAIR, kept))) < pairs:
        raise ValueError(f"of the tasks {list(kept.tasks)[:6]} two pairs have one name; leave '|' out of theirs.")
    return kept


def clusters(given: TestClusters) -> TestClusters:
    """Metrics of a test split with names and numbers that a file can hold; a metric that is infinite is NaN.

    Raises:
        ValueError: They are no numbers, not as many as the names, or more than a file can hold.
    """
    count, wide = len(given.clusters), len(given.metrics)
    if np.shape(given.size) != (count,) or np.shape(given.without) != (count, wide):
        shapes = f"sizes {np.shape(given.size)} and values {np.shape(given.without)}"
        raise ValueError(f"{count} clusters and {wide} metrics, but {shapes}.")
    if max(count, wide) > MAX_NAMES:
        raise ValueError(f"{count:,} clusters and {wide:,} metrics; a run file holds {MAX_NAMES:,}. Put some together.")
    (size, odd), (without, wrong) = (
        column(TEST[name], values, np.shape(values))
        for name, values in (("size", given.size), ("without", given.without))
    )
    if odd or (size < 1).any() or any(not isinstance(value, float) for value in wrong.values()):
        raise ValueError("a cluster without images, or sizes or values that are no numbers.")
    return replace(given, clusters=_names(given.clusters), metrics=_names(given.metrics), size=size, without=without)


# ---- provenance


def provenance(tree: Mapping[Any, Any], ours: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Flat, by dotted names, with values as HDF5 attributes hold them: text, numbers, truth, or lists of one of these.

    What is nothing of these is stored as its text; None as an empty one. Of more entries than a file has room for the
    first are kept, and :data:`_MORE` says how many are not (of twice as many: a tree may have no end).

    Args:
        tree: Whatever a training says of itself; a mapping that holds itself is cut there.
        ours: What there is always room for.

    >>> provenance({"hyp": {"box": 0.05, "anchors": None}, "argv": ["record"]})
    {'hyp.box': 0.05, 'hyp.anchors': '', 'argv': ['record']}
    """
    own = {key: plain(value) for key, value in _flatten(ours or {})}
    flat = list(islice(_flatten(tree), 2 * MAX_ATTRIBUTES))
    room = MAX_ATTRIBUTES - 100 - len(own)
    kept = {key: plain(value) for key, value in flat[:room]}
    return {**kept, **({_MORE: len(flat) - room} if len(flat) > room else {}), **own}


def _flatten(tree: Mapping[Any, Any], prefix: str = "", around: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    around = (*around, id(tree))
    for key, value in _entries(tree) or ():
        name = text(f"{prefix}{_words(key)}", 1 << 10) or "(no name)"
        if id(value) in around:
            yield name, "{...}"
        elif len(around) > 50 or _entries(value) is None:
            yield name, value
        else:
            yield from _flatten(value, f"{name}.", around)


def _entries(value: Any) -> list[tuple[Any, Any]] | None:
    """What a mapping holds; of an entry that it does not give, why not. None: it is none, or gives nothing at all."""
    try:
        return [(key, _entry(value, key)) for key in value] if isinstance(value, Mapping) else None
    except Exception:
        return None


def _entry(tree: Mapping[Any, Any], key: Any) -> Any:
    try:
        return tree[key]
    except Exception as error:  # such as a configuration of which something has to be filled in
        return f"(cannot be read: {type(error).__name__})"


def plain(value: Any) -> Any:
    """A value of a provenance in its plain form.

    >>> plain(None), plain((1, 2.5)), plain([1, "a"]), plain(2**70)
    ('', [1, 2.5], ['1', 'a'], '1180591620717411303424')
    """
    try:
        return _plain(value)
    except Exception:  # of an object that fails at what it is asked
        return text(value)


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    if hasattr(value, "tolist"):  # arrays, their scalars, tensors
        try:
            value = value.tolist() if np.prod(value.shape) <= MAX_TEXT // 8 else f"{type(value).__name__} {value.shape}"
        except Exception:  # of a device that is gone, or a subclass without numbers
            return text(value)
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=_words)
    if not isinstance(value, (list, tuple)):
        return _scalar(value)
    items = [_scalar(item) for item in value]
    if items and all(isinstance(item, (int, float)) for item in items) and 8 * len(items) <= MAX_TEXT:
        return items
    return _texts([text(item) for item in items])


def _scalar(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        number = value if isinstance(value, float) else int(value)
        return float(number) if isinstance(number, float) else number if -(2**63) <= number < 2**63 else text(number)
    if isinstance(value, bytes):
        return text(value.decode("utf-8", "replace"))
    return text(value)


def _texts(values: list[str]) -> list[str] | str:
    """A list that takes as many bytes as its longest text times its length; as one text where that is too much."""
    longest = max((len(value.encode()) for value in values), default=0)
    return values if longest * len(values) <= MAX_TEXT else text(", ".join(values))


def stored(value: Any) -> Any:
    """A plain value as HDF5 is to keep it, so that every tool can read it.

    Lists of text have a fixed length, so that a reader knows their size beforehand; truth is 0 or 1 (h5py would make
    an enumeration of it, which netCDF does not show).

    >>> stored(["record", "--epochs"]).dtype.itemsize
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


# ---- numbers


def column(field: Field, values: Any, shape: tuple[int, ...]) -> tuple[NDArray[Any], dict[int, Any]]:
    """The values of a field as they are stored.

    Args:
        field: Which.
        values: (n, ...), or n of them.
        shape: (n, ...).

    Returns:
        All of them, and by row what could not be stored, or cannot be: ``field.missing`` stands for it.
    """
    found = _at_once(field, values, shape)
    lost: dict[int, Any] = {}
    if found is None:
        found = np.full(shape, field.missing, dtype=field.dtype)
        for row, value in enumerate(values):
            one = _at_once(field, [value], (1, *shape[1:]))
            if one is None:
                lost[row] = value
            else:
                found[row] = one[0]
    wrong = field.impossible(found) & (found != field.missing)
    odd = np.flatnonzero(wrong.reshape(len(found), -1).any(axis=1)) if wrong.any() else ()
    for place in map(int, odd):
        lost[place] = found[place][wrong[place]].flat[0].item()
    if wrong.any():
        found = np.where(wrong, np.asarray(field.missing, dtype=field.dtype), found)
    return found, lost


def _at_once(field: Field, values: Any, shape: tuple[int, ...]) -> NDArray[Any] | None:
    """All values together; None where one of them does not fit."""
    try:
        if np.asarray(values).dtype.kind == "c":  # the real part alone would be kept
            return None
        if field.dtype.kind == "f":
            with np.errstate(over="ignore"):
                return np.asarray(values, dtype=np.float64).astype(field.dtype).reshape(shape)
        counts = isinstance(values, np.ndarray) and values.dtype.kind in "iu"
        whole = np.asarray(values if counts else [_whole(value) for value in values])
        limits = np.iinfo(field.dtype)
        if whole.size and not (limits.min <= whole.min() and whole.max() <= limits.max):
            return None
        return whole.astype(field.dtype).reshape(shape)
    except Exception:  # whatever a foreign object raises where a number is asked of it
        return None


def is_step(value: Any) -> bool:
    """Whether a training step can be stored."""
    try:
        return 0 <= operator.index(value) < 2**63
    except Exception:
        return False


def _whole(value: Any) -> int:
    """A whole number; of a float only where it is one."""
    try:
        return operator.index(value)
    except TypeError:
        number = float(value)
        if not number.is_integer():
            raise ValueError(f"{value!r} is no whole number") from None
        return int(number)


def metrics(values: Mapping[Any, Any]) -> tuple[dict[str, float], list[str]]:
    """Metrics of an epoch by name, and the names of those whose value is no number (NaN stands for it).

    A ``/`` in a name is stored as a dot: HDF5 would make a group of it. Where that makes one name of two, the second
    gets a number.
    """
    found: dict[str, float] = {}
    wrong = []
    for key, value in values.items():
        name = _once(printable(text(key, 1 << 10)).replace("/", "."), found)
        try:
            found[name] = float(value)
        except Exception:
            found[name] = float("nan")
            wrong.append(name)
    return found, wrong


def joined(words: Iterable[str], most: int = 6) -> str:
    """A few of some words."""
    given = list(words)
    return ", ".join(given[:most]) + (f" and {len(given) - most} more" if len(given) > most else "")
