"""How soon a level is reached: pure functions on series over steps."""

from __future__ import annotations

import numpy as np

from gradprobe.report.bins import Array, quietly

WINDOW = 5
"""Bins in the running median that is compared with the level: one lucky minibatch is no arrival."""


def _trailing(values: Array, window: int = WINDOW) -> Array:
    """The median of each value and those before it, ``window`` at most, over the last axis: (..., B) -> (..., B)."""
    padded = np.concatenate([np.full((*values.shape[:-1], window - 1), np.nan), values], axis=-1)
    views = np.lib.stride_tricks.sliding_window_view(padded, window, axis=-1)
    return quietly(np.nanmedian, np.moveaxis(views, -1, 0))


def final_level(values: Array) -> float:
    """What every seed of an arm reaches by its end: the highest of their last running medians; NaN: unknown.

    Args:
        values: (seeds, B), falling; NaN behind a seed's end.
    """
    smooth = np.where(np.isfinite(values), _trailing(values), np.nan)
    last = [row[np.isfinite(row)][-1] for row in smooth if np.isfinite(row).any()]
    return float(max(last, default=np.nan))


def reached(values: Array, steps: Array, level: float, *, upwards: bool = False) -> Array:
    """The step at which each seed first reaches a level.

    Args:
        values: (seeds, B).
        steps: (B,).
        level: Such as :func:`final_level` of the baseline.
        upwards: Whether the quantity rises towards the level (a metric) or falls (a loss).

    Returns:
        (seeds,); NaN: not reached.

    >>> reached(np.array([[4.0, 3.0, 1.0]]), np.array([0.0, 10.0, 20.0]), 3.0)
    array([20.])
    """
    smooth = _trailing(values)
    with np.errstate(invalid="ignore"):
        there = smooth >= level if upwards else smooth <= level
    return np.where(there.any(axis=1), steps[there.argmax(axis=1)], np.nan)
