"""Estimates that know their noise, from Gramians measured in micro-batches.

Leading axes are free: steps, layers, runs. NaN means "not known" and is handed through, never turned into 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gradprobe.measures import Array


def noise_part(gram: ArrayLike, micro: ArrayLike, shares: ArrayLike) -> Array:
    """The noise part D of a Gramian that was measured in m independent micro-batches.

    A minibatch gradient is the true one plus noise, and two tasks' noise comes from the same samples, so that products
    are off on average: E F = <true_i, true_j> + (covariance of the noise). ``F - D`` is free of that.

    Args:
        gram: F, (..., T, T): products of the gradients g_i = sum_a alpha_a g_i^a of the whole batch.
        micro: (..., T, T): sum_a alpha_a^2 <g_i^a, g_j^a> over the micro-batches.
        shares: (m,) the alpha_a: each micro-batch's share of the batch, summing to 1.

    Returns:
        (..., T, T) float64, in (loss per unit of parameter)^2. NaN where either is, and everywhere for m = 1: one
        gradient says nothing about its own noise. With equal shares it is (W - F) / (m - 1), W the mean over the
        micro-batches.

    Raises:
        ValueError: Shares that are not positive or do not sum to 1.

    Source: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, appendix A, for squares of norms
    and two batch sizes; here for every product and any shares.

    >>> noise_part([[2.0]], [[5.0 / 2]], [0.5, 0.5])  # W = 5, F = 2
    array([[3.]])
    """
    alpha = np.asarray(shares, dtype=np.float64)
    if alpha.ndim != 1 or not alpha.size or not (alpha > 0).all() or abs(alpha.sum() - 1.0) > 1e-9:
        raise ValueError(f"shares of micro-batches must be positive and sum to 1; they are {alpha.tolist()}")
    whole, parts = np.asarray(gram, dtype=np.float64), np.asarray(micro, dtype=np.float64)
    if alpha.size == 1:
        return np.full(np.broadcast_shapes(whole.shape, parts.shape), np.nan)
    squared = float(np.square(alpha).sum())
    result: Array = (parts - squared * whole) / (1.0 - squared)
    return result
