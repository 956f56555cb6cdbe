"""Cosines by layer and time, of one arm's runs: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.report import bins
from gradprobe.report.bins import Array

Floats = NDArray[np.float32]

_ROWS_PER_CELL = 8
"""Of a run that is corrected for noise: fewer rows would leave most cells unresolved."""

FEWEST = 12
"""Columns in time, where there are so many rows."""


@dataclass(frozen=True)
class RunHeat:
    """One run's.

    Attributes:
        layers: (L,) names.
        naive: (P, L, B), the median of each bin, not corrected; NaN where nothing was measured.
        sums: (P, L, B, 3), per bin the sums of the corrected inner product and of both squared norms; None: the noise
            is not known.
    """

    layers: Sequence[str]
    naive: Floats
    sums: Array | None


def columns(rows: int, corrected: bool, most: int) -> int:
    """Bins of time for so many rows, at most ``most``.

    >>> columns(400, True, 120), columns(400, False, 120), columns(5, True, 5)
    (50, 120, 5)
    """
    wanted = max(rows // _ROWS_PER_CELL, FEWEST) if corrected else most
    return min(wanted, most)


def naive(
    cosine: NDArray[np.generic], have: Sequence[str], want: Sequence[str], place: NDArray[np.intp], count: int
) -> Floats:
    """Medians by bin of (n, L, P') cosines of the pairs ``have``: (P, L, B) for those ``want``ed."""
    found = np.full((len(want), cosine.shape[1], count), np.nan, np.float32)
    held = [(i, list(have).index(pair)) for i, pair in enumerate(want) if pair in have]
    if held and cosine.shape[1]:
        middle = bins.medians(cosine[:, :, [j for _, j in held]], place, count)
        for k, (i, _) in enumerate(held):
            found[i] = middle[..., k].T
    return found


def sums(true: Array, have: Sequence[str], want: Sequence[str], place: NDArray[np.intp], count: int) -> Array:
    """Sums by bin of (n, L, T, T) corrected Gramians, as :class:`RunHeat` holds them; NaN: no such pair."""
    total = bins.sums(true, place, count)  # (B, L, T, T)
    found = np.full((len(want), true.shape[1], count, 3), np.nan)
    first, second = measures.pair_index(true.shape[-1])
    for i, pair in enumerate(want):
        if pair in have:
            j = list(have).index(pair)
            a, b = first[j], second[j]
            found[i] = np.stack([total[..., a, b], total[..., a, a], total[..., b, b]], axis=-1).transpose(1, 0, 2)
    return found


def pooled(total: Array) -> Floats:
    """Cosines from sums, (..., 3) -> (...): a ratio of sums.

    NaN where noise hides them: a square that is not above 0, or a cosine beyond 1, which no true gradients have.
    Neither is turned into a small number or cut off.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = np.where((total[..., 1] > 0) & (total[..., 2] > 0), total[..., 1] * total[..., 2], np.nan)
        cosine = total[..., 0] / np.sqrt(squares)
        return np.where(np.abs(cosine) <= 1, cosine, np.nan).astype(np.float32)


def of_arm(runs: Sequence[RunHeat]) -> tuple[list[str], Floats, bool]:
    """The layers that all runs have, their cosines (P, L', B), and whether these are corrected for noise.

    Corrected ones are pooled over seeds; others are the median over seeds.
    """
    common = [layer for layer in runs[0].layers if all(layer in run.layers for run in runs)]
    places = [[list(run.layers).index(layer) for layer in common] for run in runs]
    known = [run.sums for run in runs if run.sums is not None]
    if len(known) == len(runs):
        total = sum(one[:, place] for one, place in zip(known, places, strict=True))
        return common, pooled(np.asarray(total)), True
    each = np.stack([run.naive[:, place] for run, place in zip(runs, places, strict=True)])
    return common, bins.quietly(np.nanmedian, each).astype(np.float32), False
