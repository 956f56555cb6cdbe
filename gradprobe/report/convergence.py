"""How soon a level is reached: pure functions on series over steps."""

from __future__ import annotations

import numpy as np

from gradprobe.report.bins import Array, quietly

WINDOW = 5
"""Bins in the running median that is compared with the level: one lucky minibatch is no arrival."""


def trailing(values: Array, window: int = WINDOW) -> Array:
    """The median of each value and those before it, ``window`` at most, over the last axis: (..., B) -> (..., B)."""
    padded = np.concatenate([np.full((*values.shape[:-1], window - 1), np.nan), values], axis=-1)
    views = np.lib.stride_tricks.sliding_window_view(padded, window, axis=-1)
    return quietly(np.nanmedian, np.moveaxis(views, -1, 0))


def final_level(values: Array) -> float:
    """Where an arm ends: the median over seeds of the median of the last tenth, of (seeds, B); NaN: unknown."""
    tail = values[:, -max(1, values.shape[1] // 10) :]
    return float(quietly(np.nanmedian, quietly(np.nanmedian, tail.T)))


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
    smooth = trailing(values)
    with np.errstate(invalid="ignore"):
        there = smooth >= level if upwards else smooth <= level
    return np.where(there.any(axis=1), steps[there.argmax(axis=1)], np.nan)
