"""Long runs as few numbers: series in bins of steps, cosines by layer and bin, and when a level is reached."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe import measures

Array = NDArray[np.float64]
Floats = NDArray[np.float32]

BINS = 120
"""Points of a series at most."""


def edges(first: int, last: int, rows: int, limit: int = BINS) -> Array:
    """Borders of equally wide bins of training steps: (B + 1,), B <= ``limit``, about one row or more in each.

    Args:
        first: Lowest step of all runs.
        last: Highest step of all runs.
        rows: Rows of the longest run.
        limit: Bins at most.

    >>> edges(0, 9, 5)
    array([ 0.,  2.,  4.,  6.,  8., 10.])
    """
    count = int(np.clip(rows, 1, limit))
    return np.linspace(first, last + 1, count + 1)


def centres(borders: Array) -> Array:
    """The step in the middle of each bin, (B,)."""
    return (borders[:-1] + borders[1:] - 1) / 2


def places(steps: ArrayLike, borders: Array) -> NDArray[np.intp]:
    """The bin of each row, (n,), in [0, B)."""
    return np.clip(np.searchsorted(borders, np.asarray(steps), side="right") - 1, 0, len(borders) - 2)


def medians(values: NDArray[np.generic], place: NDArray[np.intp], count: int) -> NDArray[np.float32]:
    """The median of each bin over its finite values.

    Args:
        values: (n, ...); NaN and infinity count as missing.
        place: (n,), the bin of each row.
        count: Number of bins, B.

    Returns:
        (B, ...); NaN where a bin has no finite value.
    """
    result = np.full((count, *values.shape[1:]), np.nan, np.float32)
    known = np.where(np.isfinite(values), values, np.nan)
    for bin_ in np.unique(place):
        result[bin_] = quietly(np.nanmedian, known[place == bin_])
    return result


def sums(values: NDArray[np.generic], place: NDArray[np.intp], count: int) -> Array:
    """The sum of each bin over its finite values: (n, ...) -> (B, ...); 0 where there is none."""
    result = np.zeros((count, *values.shape[1:]))
    np.add.at(result, place, np.where(np.isfinite(values), values, 0.0))
    return result


def quietly(function: object, values: ArrayLike) -> Array:
    """A numpy reduction over the first axis that returns NaN for empty slices, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(function(values, axis=0))  # type: ignore[operator]


def band(values: Array) -> tuple[Array, Array, Array]:
    """Lowest, mean and highest over seeds, each (...), of (seeds, ...); NaN where no seed has a value."""
    return quietly(np.nanmin, values), quietly(np.nanmean, values), quietly(np.nanmax, values)


_ROWS_PER_CELL = 8
"""Of a run that is corrected for noise: fewer rows would leave most cells unresolved."""

FEWEST_COLUMNS = 12
"""Columns in time, where there are so many rows."""


@dataclass(frozen=True)
class RunCosines:
    """Cosines by layer and bin of one run.

    Attributes:
        layers: (L,) names.
        naive: (P, L, B), the median of each bin, not corrected; NaN where nothing was measured.
        sums: (P, L, B, 3), per bin the sums of the corrected inner product and of both squared norms; None: the noise
            is not known.
    """

    layers: Sequence[str]
    naive: Floats
    sums: Array | None


def heat_columns(rows: int, corrected: bool, most: int) -> int:
    """Bins of time for so many rows, at most ``most``.

    >>> heat_columns(400, True, 120), heat_columns(400, False, 120), heat_columns(5, True, 5)
    (50, 120, 5)
    """
    wanted = max(rows // _ROWS_PER_CELL, FEWEST_COLUMNS) if corrected else most
    return min(wanted, most)


def median_cosines(
    cosine: NDArray[np.generic], have: Sequence[str], want: Sequence[str], place: NDArray[np.intp], count: int
) -> Floats:
    """Medians by bin of (n, L, P') cosines of the pairs ``have``: (P, L, B) for those ``want``ed."""
    found = np.full((len(want), cosine.shape[1], count), np.nan, np.float32)
    held = [(i, list(have).index(pair)) for i, pair in enumerate(want) if pair in have]
    if held and cosine.shape[1]:
        middle = medians(cosine[:, :, [j for _, j in held]], place, count)
        for k, (i, _) in enumerate(held):
            found[i] = middle[..., k].T
    return found


def pair_sums(true: Array, have: Sequence[str], want: Sequence[str], place: NDArray[np.intp], count: int) -> Array:
    """Sums by bin of (n, L, T, T) corrected Gramians, as `RunCosines` holds them; NaN: no such pair."""
    total = sums(true, place, count)  # (B, L, T, T)
    found = np.full((len(want), true.shape[1], count, 3), np.nan)
    first, second = measures.pair_index(true.shape[-1])
    for i, pair in enumerate(want):
        if pair in have:
            j = list(have).index(pair)
            a, b = first[j], second[j]
            found[i] = np.stack([total[..., a, b], total[..., a, a], total[..., b, b]], axis=-1).transpose(1, 0, 2)
    return found


def pooled_cosines(total: Array) -> Floats:
    """Cosines from sums, (..., 3) -> (...): a ratio of sums.

    NaN where noise hides them: a square that is not above 0, or a cosine beyond 1, which no true gradients have.
    Neither is turned into a small number or cut off.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = np.where((total[..., 1] > 0) & (total[..., 2] > 0), total[..., 1] * total[..., 2], np.nan)
        cosine = total[..., 0] / np.sqrt(squares)
        return np.where(np.abs(cosine) <= 1, cosine, np.nan).astype(np.float32)


def heat_of_arm(runs: Sequence[RunCosines]) -> tuple[list[str], Floats, bool]:
    """The layers that all runs have, their cosines (P, L', B), and whether these are corrected for noise.

    Corrected ones are pooled over seeds; others are the median over seeds.
    """
    common = [layer for layer in runs[0].layers if all(layer in run.layers for run in runs)]
    places = [[list(run.layers).index(layer) for layer in common] for run in runs]
    known = [run.sums for run in runs if run.sums is not None]
    if len(known) == len(runs):
        total = sum(one[:, place] for one, place in zip(known, places, strict=True))
        return common, pooled_cosines(np.asarray(total)), True
    each = np.stack([run.naive[:, place] for run, place in zip(runs, places, strict=True)])
    return common, quietly(np.nanmedian, each).astype(np.float32), False


WINDOW = 5
"""Bins in the running median that is compared with the level: one lucky minibatch does not count."""


def _running_median(values: Array, window: int = WINDOW) -> Array:
    """The median of each value and those before it, ``window`` at most, over the last axis: (..., B) -> (..., B)."""
    padded = np.concatenate([np.full((*values.shape[:-1], window - 1), np.nan), values], axis=-1)
    views = np.lib.stride_tricks.sliding_window_view(padded, window, axis=-1)
    return quietly(np.nanmedian, np.moveaxis(views, -1, 0))


def final_level(values: Array) -> float:
    """What every seed of an arm reaches by its end: the highest of their last running medians; NaN: unknown.

    Args:
        values: (seeds, B), falling; NaN behind a seed's end.
    """
    smooth = np.where(np.isfinite(values), _running_median(values), np.nan)
    last = [row[np.isfinite(row)][-1] for row in smooth if np.isfinite(row).any()]
    return float(max(last, default=np.nan))


def steps_to_reach(values: Array, steps: Array, level: float, *, upwards: bool = False) -> Array:
    """The step at which each seed first reaches a level.

    Args:
        values: (seeds, B).
        steps: (B,).
        level: Such as :func:`final_level` of the baseline.
        upwards: Whether the quantity rises towards the level (a metric) or falls (a loss).

    Returns:
        (seeds,); NaN: not reached.

    >>> steps_to_reach(np.array([[4.0, 3.0, 1.0]]), np.array([0.0, 10.0, 20.0]), 3.0)
    array([20.])
    """
    smooth = _running_median(values)
    with np.errstate(invalid="ignore"):
        there = smooth >= level if upwards else smooth <= level
    return np.where(there.any(axis=1), steps[there.argmax(axis=1)], np.nan)
