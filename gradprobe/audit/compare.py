"""Whether two tensors, and two trainings, are the same; pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CLEAN = "clean"
NUMERIC = "numeric"
BUFFERS_ONLY = "buffers only"
MATERIAL = "material"
NON_FINITE = "non-finite"

CLASSES = (CLEAN, NUMERIC, BUFFERS_ONLY, MATERIAL, NON_FINITE)
"""From nothing to worst."""

NUMERIC_ULP = 8.0
"""What a step may add, in units of the last place, where only the order of operations differs."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Distance:
    """How far two tensors are apart.

    Attributes:
        largest: The largest absolute difference; NaN where it is not a number, or the shapes differ.
        relative: Euclidean norm of the difference over that of the reference; NaN as above, inf for a reference of 0.
        ulp: ``largest`` in units of the last place of the reference's largest element.
        what: In words where numbers do not tell: "None against a tensor", "not finite", "shapes (3,) and (4,)".
    """

    largest: float
    relative: float
    ulp: float
    what: str = ""

    def __str__(self) -> str:
        if self.what:
            return self.what
        return f"{self.relative:.2g} of its norm, {self.ulp:.3g} ulp"


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Bitwise equality, but for the sign of zero and the payload of NaN, which no sum of a training carries on.

    >>> equal(torch.tensor([0.0, float("nan")]), torch.tensor([-0.0, float("nan")])), equal(None, torch.zeros(1))
    (True, False)
    """
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    return bool(a.is_floating_point() and torch.equal(a.isnan(), b.isnan()) and torch.equal(zeroed(a), zeroed(b)))


def zeroed(a: Tensor) -> Tensor:
    """NaN as 0."""
    return torch.where(a.isnan(), torch.zeros_like(a), a)


def distance(reference: Tensor | None, other: Tensor | None) -> Distance:
    """How far ``other`` is from ``reference``.

    >>> distance(torch.ones(4), torch.ones(4) * (1 + 2**-23)).ulp
    1.0
    """
    nan = math.nan
    if reference is None or other is None:
        return Distance(nan, nan, nan, "None against a tensor" if reference is None else "a tensor against None")
    if reference.shape != other.shape:
        return Distance(nan, nan, nan, f"shapes {tuple(reference.shape)} and {tuple(other.shape)}")
    a, b = reference.detach().double(), other.detach().double()
    if a.numel() == 1:
        return Distance(float((a - b).abs()), nan, nan, f"{float(a):.7g} against {float(b):.7g}")
    if not reference.is_floating_point():
        return Distance(float((a - b).abs().max()), nan, nan, "differs")
    if not b.isfinite().all() and a.isfinite().all():
        return Distance(nan, nan, nan, "not finite")
    gap = zeroed(a - b)
    largest = float(gap.abs().max()) if gap.numel() else 0.0
    norm, size = float(zeroed(a).norm()), float(zeroed(a).abs().max()) if a.numel() else 0.0
    eps = torch.finfo(reference.dtype).eps if reference.is_floating_point() else 1.0
    return Distance(
        largest=largest,
        relative=float(gap.norm()) / norm if norm else (math.inf if largest else 0.0),
        ulp=largest / (eps * 2.0 ** math.floor(math.log2(size))) if size else (math.inf if largest else 0.0),
    )


def ulps(gap: Array, size: Array, moved: Array, eps: float) -> Array:
    """Differences of parameters in units of rounding.

    Args:
        gap: (N, P) largest difference of each parameter tensor after each step.
        size: (N, P) its largest element.
        moved: (N, P) the largest distance of an element from where it started.
        eps: Of the type of the parameters.

    Returns:
        (N,) the largest over tensors. The unit is the rounding of the tensor's own largest element, or of the largest
        movement of the model where that is more: a tensor that starts at 0 and has rounding noise for gradient is no
        finding.
    """
    unit = eps * np.maximum(size, moved.max(axis=1, keepdims=True, initial=0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(gap == 0, 0.0, gap / unit)
    return np.asarray(ratio.max(axis=1, initial=0.0), dtype=np.float64)


def only_rounding(ulp: Array, envelope: float = 0.0) -> bool:
    """Whether differences are rounding that does not grow: no step adds more than :data:`NUMERIC_ULP` on average.

    Args:
        ulp: (N,) of :func:`ulps`.
        envelope: The largest that the same training run twice shows; 0 where it is bitwise reproducible.
    """
    different = np.flatnonzero(ulp)
    if not len(different):
        return True
    since = np.maximum(np.arange(len(ulp)) - different[0] + 1, 1)
    return bool(np.all(ulp <= np.maximum(NUMERIC_ULP * since, envelope)))


def growth(displacement: Sequence[float]) -> float:
    """The exponent p of displacement ~ (steps since the first difference)^p, by least squares.

    Returns:
        About 0.5: a random walk; 1: steady; above 2: it feeds itself. NaN with fewer than three steps that differ.
    """
    values = np.asarray(displacement, dtype=np.float64)
    different = np.flatnonzero(values > 0)
    if len(different) < 3:
        return math.nan
    kept = values[different[0] :]
    steps = np.arange(1, len(kept) + 1)[np.isfinite(kept) & (kept > 0)]
    finite = kept[np.isfinite(kept) & (kept > 0)]
    if len(finite) < 3:
        return math.nan
    return float(np.polyfit(np.log(steps), np.log(finite), 1)[0])


ROUNDING = 1e-5
"""Relative displacements below are not told from the rounding of float32, which many steps and Adam enlarge."""

STRUCTURAL, LINEAR, SCALE_FREE, MIXED = "structural", "linear", "scale-free", "mixed"


def dose_kind(weights: Sequence[float], displacement: Sequence[float]) -> tuple[str, float]:
    """What the displacement does as the weight goes to 0.

    Args:
        weights: From 0 upwards, the first being 0.
        displacement: Of each; 0 where clean.

    Returns:
        ``structural`` (there at weight 0), ``linear`` (as the weight), ``scale-free`` (the same whatever the weight,
        yet nothing at 0) or ``mixed``, or ``clean``; and the flattest slope of log displacement over log weight between
        neighbouring small weights (up to 0.1, where there are two) whose displacement is above :data:`ROUNDING`. NaN:
        there are no two.
    """
    pairs = [(w, d) for w, d in zip(weights, displacement, strict=True) if w > 0 and ROUNDING < d < math.inf]
    small = [pair for pair in pairs if pair[0] <= 0.1]
    pairs = small if len(small) > 1 else pairs
    slopes = [math.log(d1 / d0) / math.log(w1 / w0) for (w0, d0), (w1, d1) in itertools.pairwise(pairs)]
    slope = min(slopes, key=abs, default=math.nan)
    at_zero = next((d for w, d in zip(weights, displacement, strict=True) if w == 0), 0.0)
    if at_zero != 0:  # NaN included: at weight 0 nothing should be there at all
        return STRUCTURAL, slope
    if not any(displacement):
        return CLEAN, slope
    if math.isnan(slope):
        return MIXED, slope
    return (SCALE_FREE if abs(slope) < 0.3 else LINEAR if abs(slope - 1) < 0.3 else MIXED), slope
