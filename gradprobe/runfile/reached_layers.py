"""What rows say over the layers that tasks share: who reaches them, by effect, sums over them, and pooled estimates.

Who reaches what is told by the norms of the rows, piece by piece, so that memory is bounded. Files of earlier versions
say what graphs reach, and have sums over shared layers that go by that; the zeros of their rows say better, and so they
are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.errors import RunFileError
from gradprobe.rows import MISSING_GRADIENT, UNKNOWN_GRADIENT
from gradprobe.runfile import schema
from gradprobe.runfile.pieces import Piece

if TYPE_CHECKING:
    from gradprobe.statistics import Estimate

_NEVER = np.iinfo(np.int64).max

_Block = dict[str, NDArray[Any]]

NormBlocks = Iterator[tuple[int, NDArray[np.float32]]]
"""The place of the first row, and norms (k, L, T), piece by piece."""

SHARED_SUMS = {
    schema.ROWS: ("grad_norm", "cosine", "shared_grad_norm", "shared_cosine"),
    schema.UPDATES: ("update_norm", "cosine", "shared_update_norm", "shared_cosine"),
}
"""By table: norms and cosines by layer, and over all shared layers."""


@dataclass(frozen=True)
class ReachByEffect:
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
class LayerGaps:
    """What rows lack.

    Attributes:
        joined: (L,) place of the first measured row that has the layer; 0 for those of the first measured row.
        lacking: (L,) measured rows, from there on, in which a task that has had a gradient there has none.
        rows: Measured rows that lack a layer at least.
    """

    joined: NDArray[np.int64]
    lacking: NDArray[np.int64]
    rows: int


def first_seen(norms: NormBlocks, graph: NDArray[np.bool_]) -> ReachByEffect:
    """Read norms until everybody who may be seen has been seen: in most runs that is the first row."""
    first = np.full(graph.shape, _NEVER, dtype=np.int64)
    for start, values in norms:
        found = values > 0
        new = found.any(axis=0) & (first == _NEVER)
        first[new] = start + np.argmax(found, axis=0)[new]
        if not (graph & (first == _NEVER)).any():
            break
    return ReachByEffect(graph, first)


def find_gaps(norms: NormBlocks, first: NDArray[np.int64], status: NDArray[np.uint8]) -> LayerGaps:
    """Read all norms; ``first`` as in :class:`ReachByEffect`, and the status of every row."""
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
    return LayerGaps(np.where((joined == _NEVER) | (joined == begun), 0, joined), lacking, rows)


def norms_of(pieces: Iterable[Piece], layers: int) -> NormBlocks:
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


def _unknown_gradients(names: tuple[str, ...], status: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n,): whether NaN may be a gradient that is not finite."""
    return _codes(names, lambda name: name in UNKNOWN_GRADIENT)[status]


def counts_at(
    found: ReachByEffect,
    names: tuple[str, ...],
    place: NDArray[np.int64],
    norms: NDArray[Any],
    status: NDArray[np.uint8],
) -> NDArray[np.bool_]:
    """Whose gradient counts where in rows at these places: (n, L, T), see :func:`gradprobe.measures.counted`."""
    seen = place[:, None, None] >= found.first
    return counts_of(seen, names, norms, status)


def counts_of(
    seen: NDArray[np.bool_], names: tuple[str, ...], norms: NDArray[Any], status: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """The same with who has been seen to reach what up to each row, (n, L, T)."""
    return measures.counting(seen, norms, _unknown_gradients(names, status))


def first_settled(found: ReachByEffect, names: tuple[str, ...], table: schema.Table) -> int:
    """From which place on no row of a file of an earlier version is to be :func:`mended_rows`."""
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


def mended_rows(
    found: ReachByEffect, names: tuple[str, ...], table: schema.Table, block: _Block, place: NDArray[np.int64]
) -> _Block:
    """Rows of a file of an earlier version: sums go over the layers that are shared by effect.

    Args:
        found: Of the run.
        names: Of its statuses.
        table: Which rows.
        block: All of :data:`SHARED_SUMS` (where the table is in it) and the status. What need not be changed stays.
        place: (n,) of the rows, among those of their table.
    """
    if "status" not in block:
        return block
    status = block["status"]
    changed = {"status": mended_status(names, table, status)}
    if table not in SHARED_SUMS:
        return {**block, **changed}
    lacks = _lacks(names, status)
    norms, cosines, *summed = (block[name] for name in SHARED_SUMS[table])
    if table is schema.ROWS:
        due = lacks | (place[:, None, None] < np.where(found.graph, found.first, 0)).any(axis=(1, 2))
    else:
        due = np.full(len(place), bool((found.graph & ~found.reach).any()))
    if not due.any():
        return {**block, **changed}
    if table is schema.ROWS:
        counted = counts_at(found, names, place[due], norms[due], status[due])
    else:
        counted = np.broadcast_to(measures.by_several(found.reach), norms[due].shape)
    better = _better(norms[due], cosines[due], (summed[0][due], summed[1][due]), counted, found.graph)
    for name, old, new in zip(SHARED_SUMS[table][2:], summed, better, strict=True):
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


_SOURCES = {"probe_loader": schema.PROBE_LOADER, "training": schema.ROWS}

_HOW = {
    "probe_loader": "record with --probe-loader val, or give attach() a gradprobe.ProbeLoader",
    "training": "record with --micro-batches 4, or give the probe micro=[losses, ...]",
}


def pooled_estimate(
    run: Any, group: str | Sequence[str] | None, window: tuple[int, int] | None, source: str
) -> Estimate:
    """Documented at :meth:`gradprobe.runfile.Run.estimate`."""
    from gradprobe.statistics import pooled

    if source not in _SOURCES:
        raise RunFileError(f"{run.path}: no estimates from {source!r}; there are: {', '.join(_SOURCES)}.")
    table = _SOURCES[source]
    if table.path(schema.GRAM_NOISE.name) not in run:
        raise RunFileError(
            f"{run.path}: the noise of {source} rows was not measured, so nothing is told from it: {_HOW[source]}."
        )
    layers, rows = run.layer_indices(group), _rows_in_window(run, table, window)
    counts = run.counts(table=table)[rows][:, layers]
    gram = measures.from_norms(
        _read_layers(run, table, "grad_norm", rows, layers), _read_layers(run, table, "cosine", rows, layers)
    )
    noise = _read_layers(run, table, schema.GRAM_NOISE.name, rows, layers)
    size = run[table.path("batch_size")][rows].astype(np.float64)
    size[size == 0] = np.nan  # unknown
    whole = pooled(measures.over_counted(gram, counts), measures.over_counted(noise, counts), size)
    if (counts == counts[..., :1]).all():
        return whole
    return _pair_by_pair(whole, gram, noise, counts, size)


def _rows_in_window(run: Any, table: schema.Table, window: tuple[int, int] | None) -> NDArray[np.bool_]:
    """Which rows count."""
    step, measured = run[table.path(schema.STEP)], run[table.path("status")] == 0
    if window is None:
        return np.asarray(measured)
    return np.asarray(measured & (step >= window[0]) & (step < window[1]))


def _read_layers(
    run: Any, table: schema.Table, name: str, rows: NDArray[np.bool_], layers: NDArray[np.intp]
) -> measures.Array:
    """Some rows and layers; a single layer is read alone."""
    path = table.path(name)
    chosen = (
        run.read(path, layers=slice(int(layers[0]), int(layers[0]) + 1)) if len(layers) == 1 else run[path][:, layers]
    )
    return np.asarray(chosen[rows], dtype=np.float64)


def _pair_by_pair(
    whole: Estimate, gram: measures.Array, noise: measures.Array, counts: NDArray[np.bool_], size: measures.Array
) -> Estimate:
    """The same where some tasks share some of the layers only: a pair's squares are of the layers that both reach."""
    from gradprobe.statistics import pooled

    first, second = measures.pair_index(counts.shape[-1])
    by_pair: dict[str, list[float]] = {name: [] for name in _OF_PAIRS}
    for pair in zip(first, second, strict=True):
        both, (rows, columns) = counts[..., pair].all(axis=-1), np.ix_(pair, pair)
        own = np.stack([both, both], axis=-1)
        squares, noises = (measures.over_counted(values[:, :, rows, columns], own) for values in (gram, noise))
        found = pooled(squares, noises, size)
        for name, values in by_pair.items():
            values.append(getattr(found, name)[0])
    return replace(whole, **{name: np.array(values) for name, values in by_pair.items()})


_OF_PAIRS = (
    "cosine",
    "low",
    "high",
    "magnitude_similarity",
    "noise_correlation",
    "noise_correlation_low",
    "noise_correlation_high",
    "rows",
)
