"""Rows of a run on their way to :func:`gradprobe.statistics.pooled`: from layers and steps to one Gramian a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.errors import RunFileError
from gradprobe.runfile import schema

if TYPE_CHECKING:
    from gradprobe.statistics import Estimate

SOURCES = {"probe_loader": schema.PROBE_LOADER, "training": schema.ROWS}

_HOW = {
    "probe_loader": "record with --probe-loader val, or give attach() a gradprobe.ProbeLoader",
    "training": "record with --micro-batches 4, or give the probe micro=[losses, ...]",
}


def estimate(run: Any, group: str | Sequence[str] | None, window: tuple[int, int] | None, source: str) -> Estimate:
    """Documented at :meth:`gradprobe.runfile.Run.estimate`."""
    from gradprobe.statistics import pooled

    if source not in SOURCES:
        raise RunFileError(f"{run.path}: no estimates from {source!r}; there are: {', '.join(SOURCES)}.")
    table = SOURCES[source]
    if table.path(schema.GRAM_NOISE.name) not in run:
        raise RunFileError(
            f"{run.path}: the noise of {source} rows was not measured, so nothing is told from it: {_HOW[source]}."
        )
    layers, rows = run.layer_indices(group), _rows(run, table, window)
    counts = run.counts(table=table)[rows][:, layers]
    gram = measures.from_norms(_read(run, table, "grad_norm", rows, layers), _read(run, table, "cosine", rows, layers))
    noise = _read(run, table, schema.GRAM_NOISE.name, rows, layers)
    size = run[table.path("batch_size")][rows].astype(np.float64)
    size[size == 0] = np.nan  # unknown
    whole = pooled(measures.over_counted(gram, counts), measures.over_counted(noise, counts), size)
    if (counts == counts[..., :1]).all():
        return whole
    return _pair_by_pair(whole, gram, noise, counts, size)


def _rows(run: Any, table: schema.Table, window: tuple[int, int] | None) -> NDArray[np.bool_]:
    """Which rows count."""
    step, measured = run[table.path(schema.STEP)], run[table.path("status")] == 0
    if window is None:
        return np.asarray(measured)
    return np.asarray(measured & (step >= window[0]) & (step < window[1]))


def _read(
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
