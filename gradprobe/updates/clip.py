"""What each task has to do with the clipping of the global gradient norm; pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradprobe.measures import Array

_UNCLIPPED = 1e-4
"""A scale so near 1 is that of rounding."""

SAME_LIMIT, SIGHTINGS = 1e-4, 3
"""How far norms after clipping may be apart, relatively, and how many are needed, to be one limit."""

_UNEXPLAINED = 1e-2
"""How much of the squared norm the tasks' parts may leave out, beyond which they are unknown."""


@dataclass(frozen=True)
class Norms:
    """The joint gradient before it was clipped.

    Attributes:
        joint: Its Euclidean norm over all of the model's parameters, in loss per unit of parameter.
        share: (T,) <w_i g_i, g> / <g, g>: a task's part in the square of ``joint``. They sum to 1.
        own: (T,) squared norms of the weighted task gradients.
    """

    joint: float
    share: Array
    own: Array


def norms(scale: float, square: float, gram: Array, weight: Array, private: Array) -> Norms:
    """The norm of the joint gradient, and each task's part in it.

    Args:
        scale: What the gradient was multiplied with since the backward, all of it alike.
        square: Squared norm of ``.grad`` over all parameters, as the optimizer finds it.
        gram: (L, T, T) of the unweighted task gradients; NaN where a task does not reach a layer.
        weight: (T,).
        private: (T,) squared norm of ``.grad`` on what a task alone reaches.

    Returns:
        The parts are NaN where they do not explain the norm: something else has a gradient too.
    """
    tasks = len(weight)
    if not (scale > 0 and math.isfinite(square)):
        return Norms(math.nan, np.full(tasks, np.nan), np.full(tasks, np.nan))
    joint = square / scale**2
    weighted = np.nansum(gram, axis=0).reshape(tasks, tasks) * np.outer(weight, weight)
    heads = np.asarray(private, dtype=np.float64) / scale**2
    own = np.diagonal(weighted) + heads
    share = (weighted.sum(axis=1) + heads) / joint if joint else np.full(tasks, np.nan)
    if not abs(share.sum() - 1) <= _UNEXPLAINED:
        share = own = np.full(tasks, np.nan)
    return Norms(math.sqrt(joint), share, own)


def scale_without(norms: Norms, scale: float, limit: float | None) -> Array:
    """What the scale would have been had each task been absent: (T,).

    Args:
        norms: From :func:`norms`.
        scale: That was.
        limit: Beyond which norms are clipped; None: unknown.

    Returns:
        In [0, 1]; NaN where it is unknown.
    """
    with np.errstate(invalid="ignore"):
        rest = np.sqrt(np.maximum(norms.joint**2 * (1 - 2 * norms.share) + norms.own, 0.0))
    if limit is None:
        fits = (scale > 1 - _UNCLIPPED) & (rest <= norms.joint)
        return np.where(fits, 1.0, np.nan)
    with np.errstate(divide="ignore"):
        return np.where(np.isnan(rest), np.nan, np.minimum(1.0, limit / rest))


class Limit:
    """Finds out at which norm a training clips: the norm after clipping, where it is the same at three clipped steps.

    A scale below 1 may have other reasons, such as a mean over tasks, under which that norm changes from step to step.

    Attributes:
        value: The limit; None: none is known.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self._seen: list[float] = []

    def look(self, norm: float, scale: float) -> None:
        """At one step's norm before clipping, and its scale."""
        clipped = norm * scale
        if not math.isfinite(clipped) or scale > 1 - _UNCLIPPED:
            return
        self._seen = [*self._seen[1 - SIGHTINGS :], clipped]
        same = len(self._seen) == SIGHTINGS and max(self._seen) - min(self._seen) <= SAME_LIMIT * clipped
        self.value = clipped if same else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "seen": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self._seen = state["value"], list(state["seen"])
