"""Which layers two tasks quarrel over, beyond what noise and chance would show.

Recon (Shi et al., ICLR 2023) counts steps whose cosine is below a fixed threshold. A random cosine in d dimensions has
a spread of about 1 / sqrt(d), so that count picks out small layers, BatchNorm above all. The score here knows both the
dimension of a layer and the noise of the estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe.measures import Array, pair_index

FALSE_DISCOVERIES = 0.10
"""Expected share of false ones among the layers called conflicting."""


@dataclass(frozen=True)
class LayerScores:
    """One entry for each of L layers and P pairs of tasks, arrays (L, P).

    Attributes:
        cosine: Pooled over all rows: a ratio of sums. NaN: fewer than three rows have both gradients.
        low, high: Its 95 % interval within this run. It says nothing of another seed.
        score: By how many standard deviations the cosine lies below 0, where a deviation holds both the noise of the
            estimate and the 1 / sqrt(d) that two unrelated directions in d dimensions show. Above 0: conflict.
        conflicting: Whether it is a discovery by Benjamini and Hochberg's procedure over all layers and pairs, at the
            level :data:`FALSE_DISCOVERIES`. Exploratory: it ranks layers, and proves nothing of one.
    """

    cosine: Array
    low: Array
    high: Array
    score: Array
    conflicting: NDArray[np.bool_]

    def ranked(self) -> list[tuple[int, int]]:
        """(layer, pair), the worst first; those without a cosine are left out."""
        order = np.argsort(-self.score, axis=None, kind="stable")
        places = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, self.score.shape), strict=True)]
        return [place for place in places if np.isfinite(self.score[place])]


def layer_scores(gram: ArrayLike, size: ArrayLike, noise: ArrayLike | None = None) -> LayerScores:
    """Score every layer of a recorded run.

    Args:
        gram: (n, L, T, T), rows in order of time.
        size: (L,) numbers of parameters.
        noise: (n, L, T, T), the noise part of the Gramians where the run has it. Without it, samples that two tasks
            share can bias a cosine, even turn its sign.
    """
    gram = np.asarray(gram, dtype=np.float64)
    if noise is not None:
        gram = gram - np.asarray(noise, dtype=np.float64)
    cosine, variance = pooled_cosine(gram)
    chance = 1.0 / np.asarray(size, dtype=np.float64)[:, None]
    score = -cosine / np.sqrt(chance + variance)
    half = 1.96 * np.sqrt(variance)
    return LayerScores(
        cosine,
        np.maximum(cosine - half, -1.0),
        np.minimum(cosine + half, 1.0),
        score,
        discoveries(tail(score), FALSE_DISCOVERIES),
    )


def pooled_cosine(gram: ArrayLike) -> tuple[Array, Array]:
    """The cosine over all rows, and its variance within the run.

    Args:
        gram: (n, ..., T, T); rows in which a pair has a NaN do not count for it.

    Returns:
        (..., P) each. The cosine is ``sum U_ij / sqrt(sum U_ii sum U_jj)``. The variance is that of a ratio of means,
        from differences of neighbouring rows, so that a slow drift does not count as noise. NaN with fewer than three
        rows, or where a noise-corrected square sums to 0 or less: a gradient that cannot be told from noise has no
        angle.
    """
    gram = np.asarray(gram, dtype=np.float64)
    first, second = pair_index(gram.shape[-1])
    square = np.diagonal(gram, axis1=-2, axis2=-1)
    parts = np.stack([gram[..., first, second], square[..., first], square[..., second]])
    shape = parts.shape[2:]
    found = [_one_pair(column) for column in parts.reshape(3, parts.shape[1], math.prod(shape)).transpose(2, 0, 1)]
    values = np.array(found).reshape(*shape, 2)
    return values[..., 0], values[..., 1]


def _one_pair(parts: Array) -> tuple[float, float]:
    """``parts``: (3, n), the inner products and the two squares."""
    inner, one, other = parts[:, np.isfinite(parts).all(axis=0)]
    count = len(inner)
    if count < 3 or one.mean() <= 0 or other.mean() <= 0:
        return math.nan, math.nan
    length = math.sqrt(one.mean() * other.mean())
    cosine = float(np.clip(inner.mean() / length, -1.0, 1.0))
    psi = inner / length - cosine / 2 * (one / one.mean() + other / other.mean())
    return cosine, float(np.mean(np.square(np.diff(psi))) / (2 * count))


def tail(score: ArrayLike) -> Array:
    """Probability of a score at least as high by chance, one-sided, normal; NaN stays NaN."""
    flat = np.asarray(score, dtype=np.float64)
    values = [0.5 * math.erfc(s / math.sqrt(2)) if np.isfinite(s) else math.nan for s in flat.ravel()]
    return np.array(values).reshape(flat.shape)


def discoveries(p: ArrayLike, rate: float) -> NDArray[np.bool_]:
    """Benjamini and Hochberg's procedure: which of many p-values are discoveries at this false discovery rate."""
    p = np.asarray(p, dtype=np.float64)
    known = np.sort(p[np.isfinite(p)])
    passed = np.flatnonzero(known <= rate * np.arange(1, len(known) + 1) / max(len(known), 1))
    limit = known[passed[-1]] if len(passed) else -1.0
    with np.errstate(invalid="ignore"):
        result: NDArray[np.bool_] = p <= limit
    return result
