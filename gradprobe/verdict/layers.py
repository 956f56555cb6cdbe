"""Which layers two tasks quarrel over, beyond what noise and chance would show.

Recon (Shi et al., ICLR 2023) counts steps whose cosine is below a fixed threshold. A random cosine in d dimensions has
a spread of about 1 / sqrt(d), so that count picks out small layers, BatchNorm above all. The score here knows both the
dimension of a layer and the noise of the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe import statistics
from gradprobe.measures import Array

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
    pooled = statistics.pooled_cosine(gram)
    cosine, variance = np.clip(pooled.mean, -1.0, 1.0), pooled.variance
    chance = 1.0 / np.asarray(size, dtype=np.float64)[:, None]
    score = -cosine / np.sqrt(chance + variance)
    half = 1.96 * np.sqrt(variance)
    return LayerScores(
        cosine,
        np.maximum(cosine - half, -1.0),
        np.minimum(cosine + half, 1.0),
        score,
        statistics.benjamini_hochberg(statistics.normal_tail(score), FALSE_DISCOVERIES),
    )
