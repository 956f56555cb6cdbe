"""The files of a run, the main one and its parts beside it: how parts are named, and which of them count."""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gradprobe.errors import RunFileError
from gradprobe.rows.layers import begins_with
from gradprobe.rows.table import lengths
from gradprobe.runfile import schema, untrusted
from gradprobe.runfile.files import SummedFile
from gradprobe.runfile.untrusted import RefusedError, attribute, printable
from gradprobe.whole_files import followed, there

PartSpan = tuple[int, int]
"""First and last number that a part stands for: (7, 7), or (1, 32) for one put together from 32."""


def parts_folder(run: Path) -> Path:
    """Where the parts of a run lie: beside the file itself, where ``run`` is a symbolic link to it."""
    with suppress(OSError):  # where links lead nowhere, who opens the run says so
        run = followed(run)
    return run.parent / (run.name + schema.PARTS_SUFFIX)


def part_name(span: PartSpan) -> str:
    """The file name of a part.

    >>> part_name((7, 7)), part_name((1, 32))
    ('00000007.h5', '00000001-00000032.h5')
    """
    first, last = span
    return f"{first:08d}.h5" if first == last else f"{first:08d}-{last:08d}.h5"


def part_span(path: Path) -> PartSpan | None:
    """What a part stands for; None for any other file.

    >>> part_span(Path("00000001-00000032.h5")), part_span(Path("00000007.h5")), part_span(Path("x.h5"))
    ((1, 32), (7, 7), None)
    """
    first, dash, last = path.stem.partition("-")
    numbers = [first, last] if dash else [first]
    if path.suffix != ".h5" or not all(n.isascii() and n.isdecimal() for n in numbers):
        return None
    return int(numbers[0]), int(numbers[-1])


def _counting(spans: Iterable[PartSpan], merged_through: int = 0) -> list[PartSpan]:
    """The parts whose rows are in no other: those above ``merged_through`` that no wider part contains.

    A kill between putting parts together and removing them leaves both.

    >>> _counting([(1, 1), (2, 2), (1, 2), (3, 3)]), _counting([(1, 2), (3, 3)], merged_through=2)
    ([(1, 2), (3, 3)], [(3, 3)])
    """
    kept: list[PartSpan] = []
    for first, last in sorted(spans, key=lambda s: (s[0], -s[1])):
        if first > merged_through and not (kept and last <= kept[-1][1]):
            kept.append((first, last))
    return kept


def parts_due(widths: Sequence[int], fan: int) -> int:
    """How many of the last parts are to be put together now; 0: none.

    Parts are put together as digits carry in a number of base ``fan``, so that there are never more than
    ``fan`` of one width, and a row is written again no more often than that number has digits.

    Args:
        widths: How many numbers each part stands for, in order.
        fan: How many of a width make one of the next.

    >>> parts_due([1, 1, 1], 4), parts_due([4, 1, 1, 1, 1], 4), parts_due([4, 4, 4, 1, 1, 1, 1], 4)
    (0, 4, 7)
    """
    taken, width = 0, 1
    while True:
        rest = widths[: len(widths) - taken]
        same = next((i for i, w in enumerate(reversed(rest)) if w != width), len(rest))
        if same + (taken > 0) < fan:
            return taken
        taken, width = taken + same, width * fan


def part_paths(run: Path) -> list[Path]:
    """The parts that lie beside ``run``, in order, without those that a wider one contains."""
    place = parts_folder(run)
    found = [s for s in map(part_span, place.glob("*.h5")) if s is not None] if there(place) else []
    return [place / part_name(s) for s in _counting(found)]


_log = logging.getLogger("gradprobe")

_Identity = tuple[int, int, int]

_FEATURES = schema.FEATURES.path(schema.FEATURE)
_FEATURE_SIZE = schema.FEATURES.path(schema.FEATURE_SIZE.name)
_JSON = schema.AUDIT.path("json")

_open: weakref.WeakSet[Piece] = weakref.WeakSet()


class Piece:
    """One file of a run: the main file, or a part.

    Args:
        path: The file.
        part: It is a part; its name then says which numbers it stands for.
        lenient: Use what is left of damaged sums (see :class:`gradprobe.runfile.files.SummedFile`).

    Raises:
        FileNotFoundError: It is not there (any more).
        RunFileError: It cannot be read, is not a run, is of a later major version, or something in it is not as
            docs/run-file.md says; nothing outside the file was touched.
    """

    def __init__(self, path: Path, *, part: bool = False, lenient: bool = False) -> None:
        self.path = path
        self._datasets: dict[str, h5py.Dataset | None] = {}
        self.span = require_span(path) if part else (0, 0)
        try:
            self.identity = _identity(path)
            self.raw = SummedFile(path, follow=not part, lenient=lenient)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RunFileError(f"{path}: cannot be read as a run file ({error}).") from error
        try:
            self.file = self._open()
            with self.reading():
                untrusted.check_version(self.file)
                untrusted.check(self.file, self.raw)
                self._read_header()
        except BaseException:
            self.close()
            raise
        _open.add(self)

    def _open(self) -> h5py.File:
        # The traceback through h5py holds what crashes Python at its end, if it still lives then: take the words only.
        try:
            return h5py.File(self.raw, "r")
        except Exception as error:
            words = self.raw.error or str(error)
        raise RunFileError(f"{self.path}: cannot be read as a run file ({words}).")

    def _read_header(self) -> None:
        self.tasks = self._names(schema.TASK)
        self.layers = self._names(schema.LAYER)
        self.pairs = self._names(schema.PAIR)
        expected = [f"{a}|{b}" for i, a in enumerate(self.tasks) for b in self.tasks[i + 1 :]]
        if list(self.pairs) != expected:
            raise RefusedError(f"its pairs are {list(self.pairs)[:6]}, those of its tasks are {expected[:6]}")
        self.feature_names = self._names(_FEATURES) if _FEATURES in self else ()
        if schema.OTHER_TASK in self and self._names(schema.OTHER_TASK) != self.tasks:
            raise RefusedError(f"its {schema.OTHER_TASK!r} are not its tasks")
        self.rows = self.count(schema.ROWS)
        self.end: str = attribute(self.file, "end", str)
        self.file_time: str = attribute(self.file, "file_time", str)
        self.merged_through = self._count("merged_through")
        self.rows_dropped = self._count("rows_dropped")
        names = attribute(self.file["status"], "status_names", list)
        if not all(isinstance(name, str) for name in names):
            raise RefusedError("attribute 'status_names' of /status is of the wrong type")
        self.status_names: tuple[str, ...] = tuple(names)
        about = self.file["reach"].attrs
        basis = attribute(self.file["reach"], schema.BASIS) if schema.BASIS in about else None
        self.by_effect = basis == schema.BY_EFFECT

    @property
    def held(self) -> frozenset[str]:
        """Tables and optional fields that the file has, see :class:`gradprobe.rows.Header`."""
        optional = (t.path(f.name) for t in schema.TABLES for f in t.fields if f.optional)
        tables = (t.name for t in schema.TABLES if t.group and t.path(t.axis) in self)
        return frozenset([*tables, *(path for path in optional if path in self)])

    @property
    def unknown(self) -> list[str]:
        """What is at its root, or in the group of a table, that this version knows nothing of."""
        tables = (*schema.TABLES, *schema.WHOLE)
        fields = {table.path(field.name) for table in tables for field in table.fields}
        names = {table.path(axis) for table in tables for axis in table.names}
        alone = {*(field.name for field in schema.HEADER_FIELDS), _FEATURE_SIZE, _JSON, *schema.MEANINGS}
        known = {*fields, *names, *alone, *(table.group for table in tables), "epochs", "provenance"}
        groups = [table.group for table in tables if table.group and table.group in self.file]
        inside = (f"{group}/{name}" for group in groups for name in self.file[group])
        return [name for name in (*self.file, *inside) if name not in known]

    def count(self, table: schema.Table) -> int:
        """Number of rows of a table; 0 where the file has no such table."""
        path = table.path(schema.STEP)
        dataset = self._dataset(path)
        return 0 if dataset is None else int(dataset.shape[0])

    def column(
        self,
        table: schema.Table,
        field: schema.Field,
        rows: slice,
        layers: slice | int = slice(None),
        *,
        among: int | None = None,
    ) -> Any:
        """Some rows of a field; what stands for it, where the file has the table but not this field of it.

        Args:
            table, field: Which.
            rows: Of the file.
            layers: Of a field that has them.
            among: How many layers the run has, where some have joined since this file; the file has the first of them.
        """
        path = table.path(field.name)
        others = (layers,) if schema.LAYER in field.axes else ()
        dataset = self._dataset(path)
        if dataset is not None:
            if not others or among is None or among == len(self.layers):
                return dataset[(rows, *others)]
            return self._among(dataset, field, rows, layers, among)
        whole = list(lengths(field, self, self.count(table)))
        if others and among is not None:
            whole[1] = among
        return np.broadcast_to(np.asarray(field.missing, dtype=field.dtype), whole)[(rows, *others)]

    def whole(self, table: schema.Table) -> dict[str, Any]:
        """A table that was written at once, by name; empty where the file has none.

        Raises:
            RunFileError: It is damaged.
        """
        if table.path(table.axis) not in self:
            return {}
        with self.reading():
            found = {}
            for field in table.fields:
                dataset = self.file[table.path(field.name)]
                texts = field.dtype == schema.TEXT
                found[field.name] = _texts(dataset.asstr()[()]) if texts else dataset[()]
            return found

    def _among(self, dataset: h5py.Dataset, field: schema.Field, rows: slice, layers: slice | int, among: int) -> Any:
        """Some layers of a run that has more of them than this file."""
        wanted = np.atleast_1d(np.arange(among)[layers])
        own = wanted[wanted < len(self.layers)]
        count = len(range(*rows.indices(dataset.shape[0])))
        found = np.full((count, len(wanted), *dataset.shape[2:]), field.missing, field.dtype)
        if own.size:
            first, last = int(own[0]), int(own[-1])
            found[:, : len(own)] = dataset[(rows, slice(first, last + 1))][:, own - first]
        return found[:, 0] if isinstance(layers, int) else found

    def _count(self, name: str) -> int:
        value: int = attribute(self.file, name, int)
        if value < 0 or isinstance(value, bool):
            raise RefusedError(f"attribute {name!r} of / is {value}")
        return value

    def _names(self, axis: str) -> tuple[str, ...]:
        names = tuple(str(name) for name in self.file[axis].asstr()[()])
        for name in names:
            if not name or name != printable(name):
                raise RefusedError(f"dataset {axis!r} holds a name that is empty or not printable: {name!r}")
        if len(set(names)) != len(names):
            raise RefusedError(f"dataset {axis!r} holds a name twice")
        return names

    @property
    def provenance(self) -> dict[str, Any]:
        """Attributes of the group: str, bool, int, float and lists of these, by dotted name."""
        with self.reading():
            group = self.file["provenance"]
            return {printable(name): attribute(group, name) for name in group.attrs}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what HDF5 raises into our error, with what was found in the bytes.

        Raises:
            RunFileError: Names the file and the damage.
        """
        try:
            yield
        except RefusedError as error:
            raise RunFileError(f"{self.path}: {error}.") from error
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError) as error:
            words = self.raw.error or str(error)
            raise RunFileError(f"{self.path}: is not a complete run file ({words}).") from error

    def _dataset(self, name: str) -> h5py.Dataset | None:
        """None where the file has none of that name. Looked up once: a file that is open does not change."""
        if name not in self._datasets:
            found = self.file.get(name)
            self._datasets[name] = found if isinstance(found, h5py.Dataset) else None
        return self._datasets[name]

    def __getitem__(self, name: str) -> Any:
        found = self._dataset(name)
        return self.file[name] if found is None else found

    def __contains__(self, name: str) -> bool:
        return self._dataset(name) is not None

    def close(self) -> None:
        """Let go of the file. A second call does nothing."""
        self._datasets.clear()
        if hasattr(self, "file"):
            self.file.close()
        self.raw.close()
        _open.discard(self)


def _texts(values: Sequence[Any]) -> Any:
    return np.array([printable(str(text)) for text in values], dtype=object)


def require_span(part: Path) -> PartSpan:
    """First and last number that a part stands for, from its name."""
    span = part_span(part)
    if span is None:
        raise RunFileError(f"{part}: is not named as a part of a run is (00000007.h5, or 00000001-00000032.h5).")
    return span


def _identity(path: Path) -> _Identity:
    """The same for two looks at one file that was not replaced between them."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def open_pieces(path: Path, known: Sequence[Piece] = ()) -> list[Piece]:
    """The main file and the parts that count, in order. Those among ``known`` that still stand are used again.

    Raises:
        RunFileError: No such run, or a file that is refused.
    """
    stands = {piece.identity: piece for piece in known}
    for _ in range(20):
        taken: list[Piece] = []
        try:
            _collect(path, stands, taken)
        except FileNotFoundError:  # merged away between the listing and the opening: look again
            _close(taken, stands)
        except BaseException:
            _close(taken, stands)
            raise
        else:
            _check_same_run(taken, stands)
            return taken
    raise RunFileError(f"{path}: its parts change faster than they can be opened. Try again.")


def _collect(path: Path, stands: dict[_Identity, Piece], taken: list[Piece]) -> None:
    found = part_paths(path)  # listed first: what is merged meanwhile is in the main file then, and skipped
    if there(path):
        taken.append(_take(path, stands, part=False))
    elif not found:
        raise RunFileError(f"{path}: no such file.")
    merged = taken[0].merged_through if taken else 0
    for part in found:
        if require_span(part)[0] > merged:
            taken.append(_take(part, stands, part=True))


def _take(path: Path, stands: dict[_Identity, Piece], *, part: bool) -> Piece:
    return stands.get(_identity(path)) or Piece(path, part=part)


def _check_same_run(pieces: list[Piece], stands: dict[_Identity, Piece]) -> None:
    first = pieces[0]
    for before, piece in pairwise(pieces):
        if piece.tasks != first.tasks or not begins_with(piece.layers, before.layers):
            _close(pieces, stands)
            raise RunFileError(
                f"{piece.path}: is a part of another run: it has tasks {list(piece.tasks)} on {len(piece.layers)} "
                f"layers, {before.path.name} has {list(before.tasks)} on {len(before.layers)}."
            )
    features = {piece.feature_names for piece in pieces if piece.feature_names}
    if len(features) > 1:
        _close(pieces, stands)
        raise RunFileError(f"{first.path}: its files are of different runs: they have features {sorted(features)}.")


def _close(pieces: Sequence[Piece], but: dict[_Identity, Piece]) -> None:
    for piece in pieces:
        if piece.identity not in but:
            piece.close()


@atexit.register
def _close_all() -> None:
    # A file that HDF5 closes after Python has ended calls back into what is no more, and crashes.
    for piece in list(_open):
        piece.close()
