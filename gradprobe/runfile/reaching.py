"""Who reaches what in a run, by effect: told by the norms of its rows, piece by piece, so that memory is bounded.

Files of earlier versions say what graphs reach, and have sums over shared layers that go by that; the zeros of their
rows say better, and so they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.rows import MISSING_GRADIENT, UNKNOWN_GRADIENT
from gradprobe.runfile import schema
from gradprobe.runfile.pieces import Piece

_NEVER = np.iinfo(np.int64).max

Block = dict[str, NDArray[Any]]

Norms = Iterator[tuple[int, NDArray[np.float32]]]
"""The place of the first row, and norms (k, L, T), piece by piece."""

SUMS = {
    schema.ROWS: ("grad_norm", "cosine", "shared_grad_norm", "shared_cosine"),
    schema.UPDATES: ("update_norm", "cosine", "shared_update_norm", "shared_cosine"),
}
"""By table: norms and cosines by layer, and over all shared layers."""


@dataclass(frozen=True)
class Reaching:
    """Who reaches what.

    Attributes:
        graph: (L, T) bool: as the file says it, which in files of earlier versions is what graphs reach.
        first: (L, T) place of the first row in which the task had a gradient other than 0; :data:`_NEVER`: in none.
    """

    graph: NDArray[np.bool_]
    first: NDArray[np.int64]

    @property
    def reach(self) -> NDArray[np.bool_]:
        """(L, T): by effect; of a task without any gradient, as the file says it."""
        seen = self.first < _NEVER
        return np.where(seen.any(axis=0), seen, self.graph)


@dataclass(frozen=True)
class Gaps:
    """What rows lack.

    Attributes:
        joined: (L,) place of the first measured row that has the layer; 0 for those of the first measured row.
        lacking: (L,) measured rows, from there on, in which a task that has had a gradient there has none.
        rows: Measured rows that lack a layer at least.
    """

    joined: NDArray[np.int64]
    lacking: NDArray[np.int64]
    rows: int


def look(norms: Norms, graph: NDArray[np.bool_]) -> Reaching:
    """Read norms until everybody who may be seen has been seen: in most runs that is the first row."""
    first = np.full(graph.shape, _NEVER, dtype=np.int64)
    for start, values in norms:
        found = values > 0
        new = found.any(axis=0) & (first == _NEVER)
        first[new] = start + np.argmax(found, axis=0)[new]
        if not (graph & (first == _NEVER)).any():
            break
    return Reaching(graph, first)


def gaps(norms: Norms, first: NDArray[np.int64], status: NDArray[np.uint8]) -> Gaps:
    """Read all norms; ``first`` as in :class:`Reaching`, and the status of every row."""
    joined = np.full(len(first), _NEVER, dtype=np.int64)
    lacking, rows = np.zeros(len(first), np.int64), 0
    for start, values in norms:
        place = np.arange(start, start + len(values))
        known, measured = ~np.isnan(values), status[place] == 0
        if known.all() and measured.any() and (joined < _NEVER).all():  # of most runs all but the first rows
            continue
        there = known.any(axis=2) & measured[:, None]
        new = there.any(axis=0) & (joined == _NEVER)
        joined[new] = start + np.argmax(there, axis=0)[new]
        due = (place[:, None, None] >= first).astype(bool) & measured[:, None, None]
        lacks = (due & ~known).any(axis=2) & (place[:, None] >= joined)
        lacking += lacks.sum(axis=0)
        rows += int(lacks.any(axis=1).sum())
    begun = joined.min(initial=_NEVER)
    return Gaps(np.where((joined == _NEVER) | (joined == begun), 0, joined), lacking, rows)


def norms_of(pieces: Iterable[Piece], layers: int) -> Norms:
    """The norms in these files of a run that has so many layers."""
    start = 0
    for piece in pieces:
        for begin in range(0, piece.rows, schema.CHUNK_ROWS):
            with piece.reading():
                norms = piece.column(schema.ROWS, _NORM, slice(begin, begin + schema.CHUNK_ROWS), among=layers)
            yield start + begin, norms
        start += piece.rows


_NORM = schema.ROWS["grad_norm"]


def _codes(names: tuple[str, ...], chosen: Any) -> NDArray[np.bool_]:
    """(256,) whether the name of a status is chosen, by its number."""
    found = np.zeros(256, dtype=bool)
    for code, name in enumerate(names[:256]):
        found[code] = chosen(name)
    return found


def unknown(names: tuple[str, ...], status: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n,): whether NaN may be a gradient that is not finite."""
    return _codes(names, lambda name: name in UNKNOWN_GRADIENT)[status]


def counts(
    found: Reaching, names: tuple[str, ...], place: NDArray[np.int64], norms: NDArray[Any], status: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """Whose gradient counts where in rows at these places: (n, L, T), see :func:`gradprobe.measures.counted`."""
    seen = place[:, None, None] >= found.first
    return counts_of(seen, names, norms, status)


def counts_of(
    seen: NDArray[np.bool_], names: tuple[str, ...], norms: NDArray[Any], status: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """The same with who has been seen to reach what up to each row, (n, L, T)."""
    return measures.counting(seen, norms, unknown(names, status))


def settled(found: Reaching, names: tuple[str, ...], table: schema.Table) -> int:
    """From which place on no row of a file of an earlier version is to be :func:`mended`."""
    if table is not schema.ROWS:
        return _NEVER if (found.graph & ~found.reach).any() else 0
    return _NEVER if MISSING_GRADIENT in names else int(np.where(found.graph, found.first, 0).max(initial=0))


def mended_status(names: tuple[str, ...], table: schema.Table, status: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Statuses of a file of an earlier version: rows that lack a layer are measured."""
    if table not in (schema.ROWS, schema.PROBE_LOADER) or MISSING_GRADIENT not in names:
        return status
    return np.where(_lacks(names, status), 0, status).astype(status.dtype)


def _lacks(names: tuple[str, ...], status: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return _codes(names, lambda name: name == MISSING_GRADIENT)[status]


def mended(
    found: Reaching, names: tuple[str, ...], table: schema.Table, block: Block, place: NDArray[np.int64]
) -> Block:
    """Rows of a file of an earlier version: sums go over the layers that are shared by effect.

    Args:
        found: Of the run.
        names: Of its statuses.
        table: Which rows.
        block: All of :data:`SUMS` (where the table is in it) and the status. What need not be changed stays as it is.
        place: (n,) of the rows, among those of their table.
    """
    if "status" not in block:
        return block
    status = block["status"]
    changed = {"status": mended_status(names, table, status)}
    if table not in SUMS:
        return {**block, **changed}
    lacks = _lacks(names, status)
    norms, cosines, *summed = (block[name] for name in SUMS[table])
    if table is schema.ROWS:
        due = lacks | (place[:, None, None] < np.where(found.graph, found.first, 0)).any(axis=(1, 2))
    else:
        due = np.full(len(place), bool((found.graph & ~found.reach).any()))
    if not due.any():
        return {**block, **changed}
    if table is schema.ROWS:
        counted = counts(found, names, place[due], norms[due], status[due])
    else:
        counted = np.broadcast_to(measures.by_several(found.reach), norms[due].shape)
    better = _better(norms[due], cosines[due], (summed[0][due], summed[1][due]), counted, found.graph)
    for name, old, new in zip(SUMS[table][2:], summed, better, strict=True):
        values = old.copy()
        values[due] = new
        changed[name] = values
    return {**block, **changed}


def _better(
    norms: NDArray[Any],
    cosines: NDArray[Any],
    stored: tuple[NDArray[Any], NDArray[Any]],
    counted: NDArray[np.bool_],
    graph: NDArray[np.bool_],
) -> list[NDArray[Any]]:
    """Norms (n, T) and cosines (n, P) over what counts; those that were summed over the same are as they are."""
    first, second = measures.pair_index(norms.shape[-1])
    some = norms != 0  # NaN too
    of_pairs = (
        graph[:, first] & graph[:, second],
        counted[..., first] & counted[..., second],
        some[..., first] | some[..., second],
    )
    sums = measures.over_layers(measures.from_norms(norms, cosines), counted)
    result = []
    for (was, now, matters), old, new in zip(((graph, counted, some), of_pairs), stored, sums, strict=True):
        other = (was & ~now & matters).any(axis=1) | ~now.any(axis=1)
        result.append(np.where(other, new, old).astype(old.dtype))
    return result
