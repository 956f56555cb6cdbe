"""The six rules: from differences over seeds to a verdict. One function for one study and for 20,000 simulated ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe.measures import Array
from gradprobe.statistics import Contrast, holm

MARGIN = 0.10
"""The default of the smallest difference that matters."""

MIN_SEEDS = 3
"""Fewer give a description and no verdict."""

LEVEL = 0.025
"""Of a one-sided test: what an end of a 95 % interval stands for."""


@dataclass(frozen=True)
class Decision:
    """Verdicts on one question: arrays (..., F) over F comparisons of arms and subjects.

    Attributes:
        rule: 1 reduced materially, 2 equivalent, 3 reduced and its size uncertain, 4 increased, 5 not reduced,
            6 inconclusive; 0: no verdict, since there are fewer than three seeds or no number.
        low95, high95, low90, high90: Of the effect; not adjusted.
        p_material, p_zero, p_increased: One-sided p-values of rules 1, 3 and 4.
        p_material_holm, p_zero_holm, p_increased_holm: Adjusted over the F comparisons.
    """

    rule: NDArray[np.int64]
    low95: Array
    high95: Array
    low90: Array
    high90: Array
    p_material: Array
    p_zero: Array
    p_increased: Array
    p_material_holm: Array
    p_zero_holm: Array
    p_increased_holm: Array


def decide(contrast: Contrast, margin: ArrayLike = MARGIN) -> Decision:
    """Decide on arm minus baseline of a quantity that is to fall.

    The rules, in order; of 1, 3 and 4 also Holm's adjusted p-value has to be at most .025, which with a single
    comparison says the same as the interval::

        1  high95 < -margin                   reduced, materially
        2  the 90 % interval within +-margin  equivalent: not reduced
        3  high95 < 0                         reduced, its size uncertain
        4  low95 > 0                          increased
        5  low90 > -margin                    not reduced
        6  else                               inconclusive

    Args:
        contrast: (..., F); the last axis holds all comparisons that were planned for the question. Those without a
            number count in the family, and get no verdict.
        margin: () or (F,), above 0, in the unit of the effect.
    """
    margin = np.broadcast_to(np.asarray(margin, dtype=np.float64), contrast.effect.shape)
    enough = (contrast.seeds >= MIN_SEEDS) & np.isfinite(contrast.effect) & np.isfinite(contrast.error)
    low95, high95 = contrast.interval(0.95)
    low90, high90 = contrast.interval(0.90)
    p = [
        np.where(enough, one, np.nan)
        for one in (contrast.p_below(-margin), contrast.p_below(0.0), contrast.p_above(0.0))
    ]
    adjusted = [holm(one) for one in p]
    with np.errstate(invalid="ignore"):
        material, zero, above = (one <= LEVEL for one in adjusted)
        rules = [
            ~enough,
            (high95 < -margin) & material,
            (low90 > -margin) & (high90 < margin),
            (high95 < 0) & zero,
            (low95 > 0) & above,
            low90 > -margin,
        ]
    return Decision(np.select(rules, [0, 1, 2, 3, 4, 5], default=6), low95, high95, low90, high90, *p, *adjusted)
