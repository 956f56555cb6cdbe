"""Tables: what a run has a value of per row, along which axes, and how it follows from the rows.

Probe, writer, reader, check, repair and exports all go by these; a new column is an attribute of a row and a field of
its table, in one file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradprobe.measures import Array
from gradprobe.rows.layers import stacked

if TYPE_CHECKING:
    from gradprobe.rows.header import Header

__all__ = [
    "EPOCH",
    "FEATURE",
    "Holds",
    "LAYER",
    "OTHER_TASK",
    "PAIR",
    "SOURCE",
    "STEP",
    "TASK",
    "TEXT",
    "Table",
    "field",
    "lengths",
    "names_along",
]


# ---- statuses: why a row holds less than a measurement

MEASURED = "measured"
NONFINITE_GRADIENT = "a task's gradient is not finite"
FIRST_CALL = "only the first of this step's calls was measured: the steps before had a single one"
JOINED_WITHIN = "layers joined between this step's calls: what earlier ones brought there is missing"
OVERFLOWED = "a gradient overflowed under the loss scale: the step is left out"
NONFINITE_LOSS = "a task's loss is not finite"
MISSING_GRADIENT = "a task does not reach a layer that it reached at first"
"""Of files of earlier versions: such a row is measured now, over the layers that it has."""

UNKNOWN_GRADIENT = (NONFINITE_GRADIENT, OVERFLOWED, NONFINITE_LOSS)
"""In rows of such a status NaN may be a gradient that is not finite; in others it says that there is none."""

_ABSENT = "absent at this step: "


def absent(tasks: Sequence[str]) -> str:
    """The status of a row of a step from which some tasks are absent: what they share with others is not measured.

    >>> absent(["cls"])
    'absent at this step: cls'
    """
    return f"{_ABSENT}{', '.join(tasks)}"


def says_absent(status: str) -> bool:
    """Whether a status is one of :func:`absent`."""
    return status.startswith(_ABSENT)


# ---- axes and fields

STEP, LAYER, TASK, PAIR, EPOCH, FEATURE, SOURCE = "step", "layer", "task", "pair", "epoch", "feature", "source"
OTHER_TASK = "other_task"
"""The second of two task axes: tools that select by name need another one for it."""

TEXT = np.dtype(object)
"""The type of a field that holds text."""


class RowBatch:
    """Rows of one table on their way into a file. A table with values that do not stand in its rows has one of its own.

    Args:
        rows: n of them.
        header: Of the file.
        seen: (L, T) bool: who was seen to reach what in rows before these; None: no rows before.
        reach: (L, T) bool: who reaches what, as known after the rows of :data:`gradprobe.rows.ROWS` up to these.
        code: The number under which the words of a status are stored.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        header: Header,
        seen: NDArray[np.bool_] | None,
        reach: NDArray[np.bool_],
        code: Callable[[str], int],
    ) -> None:
        self.rows, self.header, self.seen, self.reach, self._code = rows, header, seen, reach, code
        self.layers, self.tasks = len(header.layers), len(header.tasks)

    def stacked(self, name: str, *lengths: int) -> Array:
        """(n, L, ...) of an attribute (up to L, ...); layers that a row lacks, and rows without it, are NaN."""
        found: Array = stacked([getattr(row, name) for row in self.rows], (self.layers, *lengths))
        return found

    @cached_property
    def gram(self) -> Array:
        """(n, L, T, T)."""
        return self.stacked("gram", self.tasks, self.tasks)

    @cached_property
    def status(self) -> list[int]:
        """(n,) numbers of statuses."""
        return [self._code(row.status) for row in self.rows]


@dataclass(frozen=True)
class Field:
    """One dataset.

    Attributes:
        name: In the file; also of the attribute of a row, unless ``of`` says how it follows from rows.
        axes: Names, the first is the table's own.
        dtype: As it is stored; :data:`TEXT`: text.
        meaning: In words, with what 0 and NaN mean.
        units: Empty: none.
        of: The values (n, ...) of a :class:`RowBatch`; None: the attribute of that name.
        missing: What stands for it where a file lacks it, or a value could not be stored.
        least, most: The range that is possible, ends included.
        finite: Infinity is impossible.
        optional: Only in files with rows that have it.
        export: The name of its table in exports, where it has more than an axis of rows and one of tasks.
    """

    name: str
    axes: tuple[str, ...]
    dtype: np.dtype[Any]
    meaning: str
    units: str = ""
    of: Callable[[Any], Any] | None = None
    missing: float = math.nan
    least: float = -math.inf
    most: float = math.inf
    finite: bool = False
    optional: bool = False
    export: str = ""

    def impossible(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of some values cannot be; NaN can."""
        if self.dtype.kind not in "if":
            return np.zeros(values.shape, dtype=bool)
        beyond = (values < self.least) | (values > self.most)
        return beyond | np.isinf(values) if self.finite else beyond

    @property
    def impossible_is(self) -> str:
        """What is wrong with a value that cannot be."""
        if self.least == 0 and self.most == math.inf:
            return "is negative or infinite" if self.finite else "is negative"
        if self.most == math.inf and self.least > -math.inf:
            return f"is below {self.least:g}"
        return "is infinite" if self.finite else f"is beyond {self.least:g} to {self.most:g}"


def field(name: str, axes: str, dtype: str, meaning: str, units: str = "", **more: Any) -> Field:
    """A :class:`Field`; whole numbers count something unless ``least`` says otherwise, and are 0 where missing."""
    kind = np.dtype(dtype)
    if kind.kind == "i":
        more = {"least": 0, "missing": 0, **more}
    elif kind.kind == "u":
        more = {"missing": 0, **more}
    return Field(name, tuple(axes.split()), kind, meaning, units, **more)


class Holds(Protocol):
    """A file, or a run."""

    def __contains__(self, name: str, /) -> bool:
        """Whether it has a dataset."""


@dataclass(frozen=True, eq=False)
class Table:
    """Datasets along one axis of rows.

    Attributes:
        name: As in ``run.table(name)``.
        group: Of the file; empty: the root.
        fields: What has a value per row. The first is the axis itself, the only one that every such table has: what a
            file lacks of the others reads as missing.
        batch: How its values follow from rows.
        names: Axes of its own that hold names.
    """

    name: str
    group: str
    fields: tuple[Field, ...]
    batch: type[RowBatch] = RowBatch
    names: tuple[str, ...] = ()

    @property
    def axis(self) -> str:
        """The axis of rows."""
        return self.fields[0].name

    @property
    def own(self) -> tuple[str, ...]:
        """The axes that lie in its group; the others are those of the run."""
        return tuple(dict.fromkeys((self.axis, *self.names)))

    def path(self, name: str) -> str:
        """Where a dataset of it is in the file."""
        return f"{self.group}/{name}" if self.group else name

    def place(self, axis: str) -> str:
        """Where the names, or steps, of an axis are in the file."""
        return self.path(axis) if axis in self.own else axis

    def held(self, there: Holds) -> tuple[Field, ...]:
        """The fields that a file, or a run, has, or that read as missing there."""
        return tuple(f for f in self.fields if not f.optional or self.path(f.name) in there)

    def __getitem__(self, name: str) -> Field:
        """A field by name."""
        return next(f for f in self.fields if f.name == name)


def names_along(axis: str, run: Any) -> tuple[str, ...]:
    """What the places along an axis are called.

    Args:
        axis: Not one of rows.
        run: A header or a run: something with ``tasks``, ``layers`` and ``feature_names``.
    """
    if axis == PAIR:
        return tuple(f"{a}|{b}" for i, a in enumerate(run.tasks) for b in run.tasks[i + 1 :])
    if axis == SOURCE:
        return tuple(sources(run.tasks))
    held = {LAYER: run.layers, TASK: run.tasks, OTHER_TASK: run.tasks, FEATURE: run.feature_names}
    return tuple(held[axis])


def lengths(field_: Field, run: Any, rows: int = 0) -> tuple[int, ...]:
    """The shape of a dataset with so many rows; ``run`` as for :func:`names_along`."""
    tasks = len(run.tasks)
    counts = {PAIR: tasks * (tasks - 1) // 2, SOURCE: tasks + len(EARLIER_SOURCES), TASK: tasks, OTHER_TASK: tasks}
    counts |= {LAYER: len(run.layers), FEATURE: len(run.feature_names)}
    return tuple(counts.get(axis, rows) for axis in field_.axes)


EARLIER_SOURCES = ("weight decay", "earlier momentum")
"""What an update comes from beside the tasks, in the order of the columns of a ledger."""


def sources(tasks: Sequence[str]) -> list[str]:
    """What an update comes from."""
    return [*tasks, *EARLIER_SOURCES]


def common_fields(step: str) -> tuple[Field, Field, Field]:
    """Where in the training a row is. ``step``: what the step of a row is."""
    return (
        field("step", "step", "<i8", step),
        field("epoch", "step", "<i4", "epoch of the row, from 0; -1: it could not be stored", least=-1, missing=-1),
        field("time", "step", "<f8", "time since recording started", "s"),
    )


MEASURED_BEFORE = "training step of the row, from 0; measured before the step's update"
WHOSE_UPDATE = "training step whose update this is, from 0"


def overhead_field(of: str = "measuring") -> Field:
    """What a row cost."""
    return field("overhead", "step", "<f4", f"time spent {of} this row", "s", least=0, finite=True)


def status_field(zero: str, where: str = " of /status") -> Field:
    """The status of a row. ``zero``: what 0 says of it."""
    meaning = f"0: {zero}; else an index into the attribute status_names{where}"
    return field("status", "step", "|u1", meaning, of=lambda batch: batch.status)


COSINE: Mapping[str, Any] = {"least": -1, "most": 1}
"""The range of a cosine."""

LENGTH: Mapping[str, Any] = {"least": 0, "finite": True}
"""The range of a norm."""


def takes(sink: Any, table: Table) -> bool:
    """Whether a sink takes the rows of a table."""
    named = getattr(sink, "tables", ())  # of a stand-in that answers to any name, it may be anything
    return not table.group or (isinstance(named, (tuple, list, set, frozenset)) and table.name in named)
