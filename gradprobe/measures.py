"""Pure functions on Gramians of task gradients.

The Gramian of one layer (or of any group of layers) is ``gram[i, j] = <g_i, g_j>``, where ``g_i`` is the
gradient of task i's unweighted loss with respect to that layer's parameters. Leading axes are free: steps,
layers, runs. NaN means "not there" (a task that does not reach the layer, a gradient that is not finite)
and is handed through, never turned into 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

FIRST_STEPS_OF_ADAM = 20
"""Steps before which Adam's second moment is that of few gradients: it depends too much on the present batch."""


def first_settled_step(optimizer: str) -> int:
    """The first step whose update says something of the training, by the optimizer's name; unknown ones are adaptive.

    >>> first_settled_step("SGD"), first_settled_step("AdamW")
    (0, 20)
    """
    return 0 if optimizer.upper() == "SGD" else FIRST_STEPS_OF_ADAM


def pairs(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """Every two tasks once, in the order in which pairs are stored everywhere.

    >>> pairs(["a", "b", "c"])
    [('a', 'b'), ('a', 'c'), ('b', 'c')]
    """
    return list(combinations(tasks, 2))


def pair_index(count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row and column of each of the P = T (T - 1) / 2 pairs in a (T, T) matrix, in stored order."""
    return np.triu_indices(count, k=1)


def norm(gram: ArrayLike) -> Array:
    """Euclidean norm of every task gradient.

    Args:
        gram: (..., T, T), in (loss per unit of parameter)^2.

    Returns:
        (..., T), in loss per unit of parameter, >= 0. Zero: the gradient is exactly zero. NaN: there is none.

    >>> norm([[4.0, -6.0], [-6.0, 9.0]])
    array([2., 3.])
    """
    return np.sqrt(_diagonal(gram))


def cosine(gram: ArrayLike) -> Array:
    """Cosine of the angle between every two task gradients.

    Args:
        gram: (..., T, T), in (loss per unit of parameter)^2.

    Returns:
        (..., T, T), dimensionless, in [-1, 1]. A task whose gradient is exactly zero has no angle: its row
        and column are NaN, since 0 would read as "orthogonal".

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", 2020, definition 1.

    >>> cosine([[4.0, -6.0], [-6.0, 9.0]])
    array([[ 1., -1.],
           [-1.,  1.]])
    """
    length = norm(gram)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 is NaN, on purpose
        unit = np.asarray(gram, dtype=np.float64) / length[..., :, None] / length[..., None, :]
    return np.clip(unit, -1.0, 1.0)


def pair_cosine(gram: ArrayLike) -> Array:
    """The upper triangle of :func:`cosine`: (..., T, T) -> (..., P), in the order of :func:`pairs`."""
    full = cosine(gram)
    first, second = pair_index(full.shape[-1])
    result: Array = full[..., first, second]
    return result


def conflict(cosines: ArrayLike) -> Array:
    """1 where two task gradients point against each other (cosine < 0), 0 where not, NaN where unknown.

    Of one minibatch this is mostly noise: its mean over steps is the *stochastic conflict rate*.

    Source: Yu et al., 2020, definition 1.

    >>> conflict([-0.1, 0.0, 0.3, np.nan])
    array([ 1.,  0.,  0., nan])
    """
    values = np.asarray(cosines, dtype=np.float64)
    return np.where(np.isnan(values), np.nan, (values < 0).astype(np.float64))


def magnitude_similarity(gram: ArrayLike) -> Array:
    """How alike two gradients are in length: 2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2).

    Args:
        gram: (..., T, T).

    Returns:
        (..., T, T), dimensionless, in [0, 1]; 1 = equal length, near 0 = one drowns the other. NaN where both
        are zero or one is missing.

    Source: Yu et al., 2020, definition 2.

    >>> magnitude_similarity([[1.0, 0.0], [0.0, 1.0]])
    array([[1., 1.],
           [1., 1.]])
    """
    square = _diagonal(gram)
    length = np.sqrt(square)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = 2 * (length[..., :, None] * length[..., None, :]) / (square[..., :, None] + square[..., None, :])
    return np.clip(value, 0.0, 1.0)  # equal lengths may exceed 1 by a rounding


def dominance(gram: ArrayLike, weight: ArrayLike) -> Array:
    """Each task's share of the summed squared lengths of the weighted gradients: w_i^2 G_ii / sum_j w_j^2 G_jj.

    Args:
        gram: (..., T, T).
        weight: (..., T), the weights in force.

    Returns:
        (..., T), dimensionless, in [0, 1], summing to 1. NaN where all weighted gradients are zero or any
        is missing.

    >>> dominance([[1.0, 0.0], [0.0, 9.0]], [3.0, 1.0])
    array([0.5, 0.5])
    """
    part = np.square(np.asarray(weight, dtype=np.float64)) * _diagonal(gram)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = part / part.sum(axis=-1, keepdims=True)
    return result


def share(parts: ArrayLike) -> Array:
    """How much of a sum of vectors each of them is: <u_i, u> / <u, u> with u = sum_i u_i.

    Args:
        parts: (..., P, P), inner products of the parts.

    Returns:
        (..., P), dimensionless, summing to 1. Below 0: the part points against the sum. NaN where the sum is zero or
        a part is missing.

    >>> share([[4.0, -2.0], [-2.0, 9.0]])
    array([0.22222222, 0.77777778])
    """
    along = np.asarray(parts, dtype=np.float64).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = along / along.sum(axis=-1, keepdims=True)
    return result


def effect(gram: ArrayLike, weight: ArrayLike) -> Array:
    """What each task's share of a plain gradient step does to each other's progress: w_j G_ij / (w_i G_ii).

    Args:
        gram: (..., T, T).
        weight: (..., T).

    Returns:
        (..., T, T), dimensionless; entry [i, j] is the part of task i's own first-order progress that
        task j adds (+) or cancels (-). Below -1 task i is driven backwards. The diagonal is 1. NaN where task i
        makes no progress of its own (zero gradient or weight 0) or either is missing.

    >>> effect([[4.0, -2.0], [-2.0, 9.0]], [1.0, 1.0])[0, 1]
    np.float64(-0.5)
    """
    force = np.asarray(gram, dtype=np.float64) * np.asarray(weight, dtype=np.float64)[..., None, :]
    own = _diagonal(force)[..., :, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = np.where(own == 0, np.nan, force / own)
    return result


def loss_change(parts: ArrayLike, reach: ArrayLike) -> Array:
    """What each part of an update changes each task's loss by over all shared layers, to first order.

    Args:
        parts: (..., L, T, S): by layer, task whose loss it is, and source of the part.
        reach: (L, T) or (..., L, T) bool.

    Returns:
        (..., T, S), in units of loss; below 0: the loss falls. NaN where a layer that the task reaches is unknown.
    """
    there = np.asarray(reach, dtype=bool)[..., None]
    total = np.where(there, np.asarray(parts, dtype=np.float64), 0.0).sum(axis=-3)
    return np.where(there.any(axis=-3), total, np.nan)


def update_effect(change: ArrayLike) -> Array:
    """What each task's part of the real update does to each other's progress: changes of a loss over its task's own.

    Args:
        change: (..., T, S) from :func:`loss_change`.

    Returns:
        (..., T, T), dimensionless, read as :func:`effect`. NaN where a task's own part makes no progress: with
        momentum it may point uphill.
    """
    values = np.asarray(change, dtype=np.float64)
    tasks = values[..., : values.shape[-2]]
    own = _diagonal(tasks)[..., :, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = np.where(own < 0, tasks / own, np.nan)
    return result


def progress(gram: ArrayLike, weight: ArrayLike) -> Array:
    """First-order fall of every task's loss per unit of learning rate under plain descent: sum_j w_j G_ij.

    Args:
        gram: (..., T, T).
        weight: (..., T).

    Returns:
        (..., T), in loss per unit of learning rate. Negative: the joint step harms the task, to first order.

    >>> progress([[4.0, -6.0], [-6.0, 9.0]], [1.0, 1.0])
    array([-2.,  3.])
    """
    force = np.asarray(gram, dtype=np.float64) * np.asarray(weight, dtype=np.float64)[..., None, :]
    result: Array = force.sum(axis=-1)
    return result


def reached(norms: ArrayLike, before: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Which task has had a gradient other than 0 on which layer, up to each row.

    The graph alone does not tell: losses that come out of one vector, a compiled region, or a sum of zeros lead it to
    layers on which a task's gradient is exactly 0.

    Args:
        norms: (n, L, T) of the rows in order; NaN: there is no gradient.
        before: (L, T) bool, of rows before these.

    Returns:
        (n, L, T) bool.
    """
    found = np.asarray(norms, dtype=np.float64) > 0
    if before is not None and len(found):
        found[0] |= np.asarray(before, dtype=bool)
    result: NDArray[np.bool_] = np.logical_or.accumulate(found, axis=0)
    return result


def counted(norms: ArrayLike, before: ArrayLike | None = None, unknown: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Whose gradient counts on which layer in sums over the shared layers of each row.

    A layer is shared where two tasks have had a gradient other than 0, up to the row. A task that has had none anywhere
    tells nothing of what it reaches: its gradients of 0 count wherever it has some.

    Args:
        norms, before: As for :func:`reached`.
        unknown: (n,) bool: rows in which NaN may be a gradient that is not finite, so that sums are not known. In
            others NaN says that the task does not reach the layer at that row, and the sum is over what it does reach.

    Returns:
        (n, L, T) bool, for :func:`over_layers`.
    """
    return counting(reached(norms, before), norms, unknown)


def counting(seen: ArrayLike, norms: ArrayLike, unknown: ArrayLike | None = None) -> NDArray[np.bool_]:
    """The same where it is known already who has been seen to reach what up to each row: (n, L, T), of any rows."""
    seen, there = np.asarray(seen, dtype=bool), ~np.isnan(np.asarray(norms, dtype=np.float64))
    seen = np.where(seen.any(axis=1, keepdims=True), seen, there)
    defined = there if unknown is None else there | np.asarray(unknown, dtype=bool)[:, None, None]
    return by_several(seen) & defined


def by_several(reach: ArrayLike) -> NDArray[np.bool_]:
    """(..., L, T) bool: who reaches what, less the layers that a task has for itself; of one task alone all it reaches.

    >>> by_several([[True, True], [True, False]])
    array([[ True,  True],
           [False, False]])
    """
    reach = np.asarray(reach, dtype=bool)
    result: NDArray[np.bool_] = reach & (reach.sum(axis=-1, keepdims=True) >= min(2, reach.shape[-1]))
    return result


def over_layers(gram: ArrayLike, reach: ArrayLike) -> tuple[Array, Array]:
    """Norms and cosines over a group of layers together, as if their parameters were one vector.

    Args:
        gram: (..., L, T, T).
        reach: (L, T) or (..., L, T) bool, whose gradient counts on which layer: of rows, from :func:`counted`. A task's
            norm is taken over the layers it reaches, a pair's cosine over those that both reach.

    Returns:
        (..., T) norms and (..., P) cosines. A reached layer whose entry is NaN makes the sum NaN: a group is
        never measured on a part of itself without saying so. NaN too where a task (a pair) reaches none.
    """
    gram = np.asarray(gram, dtype=np.float64)
    reach = np.asarray(reach, dtype=bool)
    first, second = pair_index(reach.shape[-1])
    both = reach[..., first] & reach[..., second]
    squares = [_masked_sum(gram[..., task, task], both) for task in (first, second)]
    inner = _masked_sum(gram[..., first, second], both)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.clip(inner / (np.sqrt(squares[0]) * np.sqrt(squares[1])), -1.0, 1.0)
        return np.sqrt(_masked_sum(_diagonal(gram), reach)), cosine


def over_all(gram: ArrayLike, reach: ArrayLike) -> Array:
    """The Gramian over all layers together.

    Args:
        gram: (..., L, T, T).
        reach: (L, T) or (..., L, T) bool, whose gradient counts on which layer.

    Returns:
        (..., T, T). A layer that a task does not reach adds nothing to its entries; a reached one whose entry is NaN
        makes the sum NaN.
    """
    total: Array = np.where(_both(reach), np.asarray(gram, dtype=np.float64), 0.0).sum(axis=-3)
    return total


def over_counted(gram: ArrayLike, reach: ArrayLike) -> Array:
    """As :func:`over_all`, but NaN, and not 0, where no layer counts for a pair (on the diagonal: for a task)."""
    return np.where(_both(reach).any(axis=-3), over_all(gram, reach), np.nan)


def over_rows(gram: ArrayLike, counts: ArrayLike) -> Array:
    """As :func:`over_all`, of rows: NaN where a task counts on no layer of a row, but does in others.

    Args:
        gram: (n, L, T, T).
        counts: (n, L, T) bool, from :func:`counted`.

    Returns:
        (n, T, T). Two tasks that share no layer have an inner product of 0: neither changes the other's loss.
    """
    counts = np.asarray(counts, dtype=bool)
    gone: NDArray[np.bool_] = np.any(counts, axis=(0, 1)) & ~np.any(counts, axis=1)
    return np.where(gone[:, :, None] | gone[:, None, :], np.nan, over_all(gram, counts))


def from_norms(norms: ArrayLike, cosines: ArrayLike) -> Array:
    """The Gramian that norms (..., T) and pair cosines (..., P) came from: (..., T, T).

    A pair without an angle because one gradient is exactly zero has inner product 0; one that is missing stays
    NaN.
    """
    norms, cosines = np.asarray(norms, dtype=np.float64), np.asarray(cosines, dtype=np.float64)
    first, second = pair_index(norms.shape[-1])
    product = norms[..., first] * norms[..., second]
    inner = np.where(product == 0, 0.0, product * cosines)
    gram = norms[..., :, None] * np.eye(norms.shape[-1]) * norms[..., None, :]
    gram[..., first, second] = inner
    gram[..., second, first] = inner
    result: Array = gram
    return result


def _diagonal(gram: ArrayLike) -> Array:
    result: Array = np.diagonal(np.asarray(gram, dtype=np.float64), axis1=-2, axis2=-1)
    return result


def _masked_sum(values: Array, mask: NDArray[np.bool_]) -> Array:
    """Sum over the layer axis (the last but one) of ``values`` where ``mask``; NaN where the mask is empty.

    Of pairs alone, where :func:`over_counted` makes the whole Gramian: a writer does this for every row.
    """
    return np.where(mask.any(axis=-2), np.where(mask, values, 0.0).sum(axis=-2), np.nan)


def _both(reach: ArrayLike) -> NDArray[np.bool_]:
    """(..., L, T) -> (..., L, T, T): whether both tasks of a pair count on a layer."""
    reach = np.asarray(reach, dtype=bool)
    result: NDArray[np.bool_] = reach[..., :, None] & reach[..., None, :]
    return result


def match_norm(gram: ArrayLike, weight: ArrayLike, reference: ArrayLike) -> Array:
    """Weights scaled so that the combined gradient is as long as that of other weights.

    Args:
        gram: (..., T, T).
        weight: (..., T), to be scaled.
        reference: (..., T), whose step ``|sum_i r_i g_i|`` gives the length.

    Returns:
        (..., T). As they are where the combined gradient all but vanishes (below 1e-4 of the other): a point from
        which the method sees no way down has no direction to scale.

    >>> match_norm([[1.0, 0.0], [0.0, 1.0]], [0.3, 0.4], [3.0, 4.0])
    array([3., 4.])
    """
    gram, weight = np.asarray(gram, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    wanted, found = step_norm(gram, reference), step_norm(gram, weight)
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = np.where(found > 1e-4 * wanted, wanted / found, 1.0)
    result: Array = weight * factor[..., None]
    return result


def step_norm(gram: ArrayLike, weight: ArrayLike) -> Array:
    """Length of the combined gradient, ``|sum_i w_i g_i|``: (..., T, T) and (..., T) -> (...)."""
    weight = np.asarray(weight, dtype=np.float64)
    square = np.einsum("...i,...ij,...j->...", weight, np.asarray(gram, dtype=np.float64), weight)
    result: Array = np.sqrt(np.maximum(square, 0.0))  # rounding may leave -1e-20 of two that cancel
    return result


def known(value: float) -> float | None:
    """The number for JSON, which has no NaN: None where it is not finite."""
    return float(value) if np.isfinite(value) else None
