"""Many rows as few: every series of a report has as many points, however long the runs are."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

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
    """A numpy reduction over the first axis that returns NaN for empty slices, and says nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(function(values, axis=0))  # type: ignore[operator]


def band(values: Array) -> tuple[Array, Array, Array]:
    """Lowest, mean and highest over seeds, each (...), of (seeds, ...); NaN where no seed has a value."""
    return quietly(np.nanmin, values), quietly(np.nanmean, values), quietly(np.nanmax, values)
