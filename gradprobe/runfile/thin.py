"""A long run seen through every k-th row, so that summaries and figures take bounded time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.runfile import schema
from gradprobe.runfile.reached_layers import LayerGaps, ReachByEffect
from gradprobe.runfile.reader import Run

__all__ = ["every", "rows_in_words", "thin", "whole"]


ROWS = 10_000
"""A run of up to so many rows is seen whole."""

_BYTES = 64 << 20
"""Of gradient norms and cosines; where rows are large, fewer of them are looked at."""

_FEWEST_ROWS = 1000


class ThinRun(Run):
    """Every ``every``-th row of a run, from the first on; otherwise like the run itself, whose files it uses.

    What was read is kept: it is small, and read-only.
    """

    def __init__(self, whole: Run, every: int) -> None:
        self.__dict__.update(whole.__dict__)
        self.whole, self.every = whole, every
        self._read: dict[str, NDArray[Any]] = {}

    def __len__(self) -> int:
        return -(-len(self.whole) // self.every)

    def read(self, name: str, *, stride: int = 1, start: int = 0, layers: slice | int = slice(None)) -> NDArray[Any]:
        """As of the run, of the rows that are looked at."""
        if name not in self._read:
            self._read[name] = self.whole.read(name, stride=self.every)
            self._read[name].flags.writeable = False
        values = self._read[name]
        found = schema.row_field(name)
        if found is None:
            return values
        return values[start::stride][:, layers] if schema.LAYER in found[1].axes else values[start::stride]

    @property
    def seen(self) -> ReachByEffect:
        """Who reaches what in the whole run."""
        return self.whole.seen

    @property
    def gaps(self) -> LayerGaps:
        """What all rows of the run lack."""
        return self.whole.gaps

    @property
    def joined(self) -> dict[str, int]:
        """Layers that were found after the start of the run."""
        return self.whole.joined

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the rows that are looked at are in the file."""
        return rows * self.every

    def count(self, table: schema.Table) -> int:
        """As of the run, of the rows that are looked at."""
        return -(-self.whole.count(table) // self.every)

    def blocks(
        self, rows: int, size: int = schema.CHUNK_ROWS, *, stride: int = 1, table: schema.Table = schema.ROWS
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """As of the run, of the rows that are looked at."""
        for start in range(0, min(rows, self.count(table)), size * stride):
            stop = min(start + size * stride, rows)
            yield {f.name: self.read(table.path(f.name))[start:stop:stride] for f in table.held(self)}

    def close(self) -> None:
        """Forget what was read; the run stays open."""
        self._read = {}


def thin(run: Run) -> ThinRun:
    """Every row of a short run, every k-th of a long one: at most :data:`ROWS`, and fewer where rows are large.

    k depends on the sizes of the run alone, so that two commands look at the same rows.
    """
    if isinstance(run, ThinRun):
        return run
    tasks = len(run.tasks)
    row = 4 * max(len(run.layers), 1) * (tasks + tasks * (tasks - 1) // 2)
    limit = int(np.clip(_BYTES // max(row, 1), _FEWEST_ROWS, ROWS))
    return ThinRun(run, max(1, -(-len(run) // limit)))


def whole(run: Run) -> Run:
    """The run behind a thin one."""
    return run.whole if isinstance(run, ThinRun) else run


def every(run: Run) -> int:
    """1, or the k of a thin run."""
    return run.every if isinstance(run, ThinRun) else 1


def rows_in_words(run: Run) -> str:
    """How the rows that are looked at are called: "rows", or "every 100th row"."""
    step = every(run)
    if step == 1:
        return "rows"
    ending = "th" if step % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(step % 10, "th")
    return f"every {step}{ending} row"
