"""What one recorded run suggests: which layers to double, whether direction or size is the problem, which weights.

Suggestions for what to try next, with their uncertainty within the run. Whether it helps takes runs with a control.

Recon (Shi et al., ICLR 2023) counts steps whose cosine is below a fixed threshold. A random cosine in d dimensions has
a spread of about 1 / sqrt(d), so that count picks out small layers, BatchNorm above all. The score here knows both the
dimension of a layer and the noise of the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe import measures, statistics
from gradprobe.measures import Array

__all__ = ["advise", "as_json", "layer_scores"]


_DOMINANT = 0.9
"""A task with a larger share of the squared weighted gradient is said to dominate."""

_SIGNIFICANT = 1.96
"""A pair's cosine over all layers is a conflict from this score on."""

FALSE_DISCOVERIES = 0.10
"""Expected share of false ones among the layers called conflicting."""


@dataclass(frozen=True)
class _LayerScores:
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


def layer_scores(gram: ArrayLike, size: ArrayLike, noise: ArrayLike | None = None) -> _LayerScores:
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
    return _LayerScores(
        cosine,
        np.maximum(cosine - half, -1.0),
        np.minimum(cosine + half, 1.0),
        score,
        statistics.benjamini_hochberg(statistics.normal_tail(score), FALSE_DISCOVERIES),
    )


@dataclass(frozen=True)
class _Advice:
    """What a run suggests.

    Attributes:
        layers: Scores of every layer.
        pairs: Scores (1, P) over all shared layers together.
        dominance: (T,) median share of the squared weighted gradient, over rows in which every task has a weight;
            NaN where there are none.
        weights: (T,) that would give all tasks the same relative first-order progress, summing to T, median over
            rows; None where in most rows no positive weights do.
        weight_quartiles: (2, T), 25 and 75 % over rows; NaN where ``weights`` is None.
    """

    layers: _LayerScores
    pairs: _LayerScores
    dominance: Array
    weights: Array | None
    weight_quartiles: Array

    @property
    def direction(self) -> list[int]:
        """The pairs whose gradients point against each other, beyond noise and chance."""
        conflicting = (self.pairs.high[0] < 0) & (self.pairs.score[0] > _SIGNIFICANT)
        return [int(p) for p in np.flatnonzero(conflicting)]

    @property
    def dominant(self) -> list[int]:
        """The tasks that decide nearly all of the update, at most one."""
        with np.errstate(invalid="ignore"):
            return [int(t) for t in np.flatnonzero(self.dominance > _DOMINANT)]

    @property
    def nothing_to_do(self) -> bool:
        """Whether neither a pair, nor a layer, nor a task's size asks for anything."""
        return not (self.direction or self.dominant or self.layers.conflicting.any())


def advise(gram: Array, size: NDArray[np.int64], reach: NDArray[np.bool_], loss: Array, weight: Array) -> _Advice:
    """Look at a recorded run.

    Args:
        gram: (n, L, T, T), n and L at least 1.
        size: (L,) numbers of parameters.
        reach: (L, T) or (n, L, T) bool: whose gradient counts on which layer.
        loss: (n, T), unweighted.
        weight: (n, T), in force.
    """
    total = measures.over_rows(gram, np.broadcast_to(reach, gram.shape[:-1]))
    shares = measures.dominance(total, weight)
    shares[(weight == 0).any(axis=1)] = math.nan  # a task that was switched off is no sign of another's size
    middle, quartiles = _equalising(total, loss)
    return _Advice(
        layers=layer_scores(gram, size),
        pairs=layer_scores(total[:, None], [float(np.sum(size))]),
        dominance=_columns(shares, 0.5),
        weights=middle,
        weight_quartiles=quartiles,
    )


def equal_progress(gram: Array, loss: Array) -> Array | None:
    """Weights under which every loss falls by the same share of itself, to first order: ``G w = L``, scaled to sum T.

    Args:
        gram: (T, T).
        loss: (T,), above 0.

    Returns:
        (T,), all above 0; None where no such weights exist.
    """
    if not (np.isfinite(gram).all() and np.isfinite(loss).all() and (loss > 0).all()):
        return None
    try:
        found = np.linalg.solve(gram, loss)
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(found).all() or (found <= 0).any():
        return None
    result: Array = found * len(loss) / found.sum()
    return result


def _equalising(gram: Array, loss: Array) -> tuple[Array | None, Array]:
    tasks = loss.shape[1]
    measured = np.isfinite(gram).all(axis=(1, 2))
    found = [
        w
        for g, values in zip(gram[measured], loss[measured], strict=True)
        if (w := equal_progress(g, values)) is not None
    ]
    if len(found) <= 0.5 * measured.sum():
        return None, np.full((2, tasks), math.nan)
    middle = np.median(found, axis=0)
    return middle * tasks / middle.sum(), np.quantile(found, [0.25, 0.75], axis=0)


def _columns(values: Array, q: float) -> Array:
    known = values[np.isfinite(values).all(axis=1)]
    return np.quantile(known, q, axis=0) if len(known) else np.full(values.shape[1], math.nan)


def as_json(
    advice: _Advice, layers: Sequence[str], size: NDArray[np.int64], tasks: Sequence[str], pairs: Sequence[str]
) -> dict[str, Any]:
    """The advice by name; None where a number is not known."""
    scores = advice.layers
    ranked = [
        {
            "layer": layers[layer],
            "pair": pairs[pair],
            "parameters": int(size[layer]),
            **_of(scores, layer, pair),
            "conflicting": bool(scores.conflicting[layer, pair]),
        }
        for layer, pair in scores.ranked()
    ]
    names = list(tasks)
    return {
        "nothing_to_do": advice.nothing_to_do,
        "direction": [{"pair": pairs[p], **_of(advice.pairs, 0, p)} for p in advice.direction],
        "dominant": [names[t] for t in advice.dominant],
        "pairs": [{"pair": pair, **_of(advice.pairs, 0, p)} for p, pair in enumerate(pairs)],
        "dominance": dict(zip(names, map(measures.known, advice.dominance), strict=True)),
        "equal_progress_weights": None
        if advice.weights is None
        else {
            name: {"median": float(advice.weights[t]), "q25": measures.known(low), "q75": measures.known(high)}
            for t, (name, low, high) in enumerate(zip(names, *advice.weight_quartiles, strict=True))
        },
        "layers": ranked,
        "dual_parameters": int(np.sum(size)),
    }


def _of(scores: _LayerScores, layer: int, pair: int) -> dict[str, float | None]:
    fields = ("cosine", "low", "high", "score")
    return {name: measures.known(getattr(scores, name)[layer, pair]) for name in fields}
