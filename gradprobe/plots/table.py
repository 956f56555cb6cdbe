"""The numbers behind a figure, as a tidy table: one row per observation, one column per variable."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.foreign import cell

LONG = ("panel", "step", "epoch", "layer", "series", "quantity", "value")
"""Columns of several tables put together; ``layer`` may be a feature, ``series`` is a task, a pair or a metric."""


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        index: What an observation belongs to: "step", "epoch", "layer", and the series ("task", "pair",
            "metric").
        values: What was observed, numbers. NaN: not there, an empty cell in the CSV.
    """

    index: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    values: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """All columns by name, those of the index first."""
        return {**self.index, **self.values}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def csv(self) -> str:
        """The table as CSV with a header line; numbers in the fewest digits that give them back exactly."""
        return _csv(tuple(self.columns), zip(*map(_cells, self.columns.values()), strict=True))


def stack(tables: Sequence[Table]) -> Table:
    """Tables with the same columns below each other; an empty table where there are none."""
    filled = [table for table in tables if len(table)]
    if not filled:
        return tables[0] if tables else Table()
    return Table(
        {k: np.concatenate([t.index[k] for t in filled]) for k in filled[0].index},
        {k: np.concatenate([t.values[k] for t in filled]) for k in filled[0].values},
    )


def long_csv(tables: Mapping[str, Table]) -> str:
    """Tables of several panels as one CSV with the columns :data:`LONG`."""
    rows: list[tuple[str, ...]] = []
    for panel, table in tables.items():
        cells = {name: _cells(values) for name, values in table.index.items()}
        blank = [""] * len(table)
        series = next((v for k, v in cells.items() if k in ("task", "pair", "metric")), blank)
        place = cells.get("layer", cells.get("feature", blank))
        fixed = [*(cells.get(name, blank) for name in ("step", "epoch")), place]
        for quantity, values in table.values.items():
            rows += zip([panel] * len(table), *fixed, series, [quantity] * len(table), _cells(values), strict=True)
    return _csv(LONG, rows)


def _cells(values: NDArray[Any]) -> list[str]:
    # str() of a numpy number is the shortest text that gives the number back in its own precision.
    return ["" if isinstance(v, np.floating) and np.isnan(v) else str(v) for v in values]


def _csv(header: Sequence[str], rows: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(cell, header))
    writer.writerows(map(cell, row) for row in rows)
    return text.getvalue()
