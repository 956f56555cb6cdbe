"""Whether two tensors, and two trainings, are the same: how far they are apart, and where they were seen to part."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradprobe.audit.arm import StepRecord
from gradprobe.audit.experiment import STAGES, Snapshot

CLEAN = "clean"
NUMERIC = "numeric"
_BUFFERS_ONLY = "buffers only"
MATERIAL = "material"
NON_FINITE = "non-finite"

CLASSES = (CLEAN, NUMERIC, _BUFFERS_ONLY, MATERIAL, NON_FINITE)
"""From nothing to worst."""

_NUMERIC_ULP = 8.0
"""What a step may add, in units of the last place, where only the order of operations differs."""

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Distance:
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


def bitwise_equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Bitwise equality, but for the sign of zero and the payload of NaN, which no sum of a training carries on.

    >>> signs = torch.tensor([0.0, float("nan")]), torch.tensor([-0.0, float("nan")])
    >>> bitwise_equal(*signs), bitwise_equal(None, torch.zeros(1))
    (True, False)
    """
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    return bool(a.is_floating_point() and torch.equal(a.isnan(), b.isnan()) and torch.equal(_zeroed(a), _zeroed(b)))


def _zeroed(a: Tensor) -> Tensor:
    """NaN as 0."""
    return torch.where(a.isnan(), torch.zeros_like(a), a)


def distance(reference: Tensor | None, other: Tensor | None) -> _Distance:
    """How far ``other`` is from ``reference``.

    >>> distance(torch.ones(4), torch.ones(4) * (1 + 2**-23)).ulp
    1.0
    """
    nan = math.nan
    if reference is None or other is None:
        return _Distance(nan, nan, nan, "None against a tensor" if reference is None else "a tensor against None")
    if reference.shape != other.shape:
        return _Distance(nan, nan, nan, f"shapes {tuple(reference.shape)} and {tuple(other.shape)}")
    a, b = reference.detach().double(), other.detach().double()
    if a.numel() == 1:
        return _Distance(float((a - b).abs()), nan, nan, f"{float(a):.7g} against {float(b):.7g}")
    if not reference.is_floating_point():
        return _Distance(float((a - b).abs().max()), nan, nan, "differs")
    if not b.isfinite().all() and a.isfinite().all():
        return _Distance(nan, nan, nan, "not finite")
    gap = _zeroed(a - b)
    largest = float(gap.abs().max()) if gap.numel() else 0.0
    norm, size = float(_zeroed(a).norm()), float(_zeroed(a).abs().max()) if a.numel() else 0.0
    eps = torch.finfo(reference.dtype).eps if reference.is_floating_point() else 1.0
    return _Distance(
        largest=largest,
        relative=float(gap.norm()) / norm if norm else (math.inf if largest else 0.0),
        ulp=largest / (eps * 2.0 ** math.floor(math.log2(size))) if size else (math.inf if largest else 0.0),
    )


def ulps(gap: _Array, size: _Array, moved: _Array, eps: float) -> _Array:
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


def only_rounding(ulp: _Array, envelope: float = 0.0) -> bool:
    """Whether differences are rounding that does not grow: no step adds more than :data:`_NUMERIC_ULP` on average.

    Args:
        ulp: (N,) of :func:`ulps`.
        envelope: The largest that the same training run twice shows; 0 where it is bitwise reproducible.
    """
    different = np.flatnonzero(ulp)
    if not len(different):
        return True
    since = np.maximum(np.arange(len(ulp)) - different[0] + 1, 1)
    return bool(np.all(ulp <= np.maximum(_NUMERIC_ULP * since, envelope)))


def growth_exponent(displacement: Sequence[float]) -> float:
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

_STRUCTURAL, _LINEAR, _SCALE_FREE, _MIXED = "structural", "linear", "scale-free", "mixed"


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
        return _STRUCTURAL, slope
    if not any(displacement):
        return CLEAN, slope
    if math.isnan(slope):
        return _MIXED, slope
    return (_SCALE_FREE if abs(slope) < 0.3 else _LINEAR if abs(slope - 1) < 0.3 else _MIXED), slope


@dataclass(frozen=True)
class FirstDifference:
    """Where a difference was first seen in one tensor of one stage.

    Attributes:
        step: From 0.
        stage: One of :data:`gradprobe.audit.experiment.STAGES`.
        name: Of the parameter, buffer, loss, or part of the batch.
        size: How large it was.
    """

    step: int
    stage: str
    name: str
    size: _Distance

    def __str__(self) -> str:
        return f"step {self.step}, {self.stage}, {self.name}: {self.size}"


class History:
    """Of all steps, and of all parameters and buffers; which of them matter is known afterwards."""

    def __init__(self, start: Snapshot, model: nn.Module) -> None:
        self.parameters = [name for name, _ in model.named_parameters()]
        self.buffers = [name for name, _ in model.named_buffers()]
        self.reached: set[str] = set()
        self.differing: set[str] = set()
        self.first_differences: list[FirstDifference] = []
        self.skipped = 0
        self.decided = False
        self.nonfinite: set[str] = set()
        self.eps = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
        self._start = start.tensors
        self._seen: set[tuple[str, str]] = set()
        self._rows: list[dict[str, tuple[float, float, float, float, float]]] = []

    @property
    def steps(self) -> int:
        """How many steps were compared."""
        return len(self._rows)

    @property
    def broken(self) -> bool:
        """Whether parameters are no longer finite."""
        return bool(self.nonfinite & set(self.parameters))

    def add(self, step: int, reference: StepRecord, record: StepRecord) -> None:
        """Compare one step."""
        for stage in STAGES:
            for name, tensor in reference.stages[stage].items():
                other = record.stages[stage].get(name)
                if (stage, name) not in self._seen and not bitwise_equal(tensor, other):
                    self._seen.add((stage, name))
                    self.first_differences.append(FirstDifference(step, stage, name, distance(tensor, other)))
        for name, gradient in reference.stages["clip"].items():
            if name not in self.reached and gradient is not None and bool(gradient.any()):
                self.reached.add(name)
        self.skipped += abs(reference.optimizer_steps - record.optimizer_steps)
        self.decided |= any(record.decisions.get(n) != v for n, v in reference.decisions.items())
        a, b = reference.stages["optimizer"], record.stages["optimizer"]
        self._rows.append({name: self._gap(name, a[name], b[name]) for name in a})

    def _gap(self, name: str, a: Tensor | None, b: Tensor | None) -> tuple[float, float, float, float, float]:
        assert a is not None
        assert b is not None
        start = self._start[name]
        if not a.is_floating_point():
            a, b, start = a.double(), b.double(), start.double()
        moved = (a - start).double()
        if bool(a.isfinite().all()) and not bool(b.isfinite().all()):
            self.nonfinite.add(name)
        apart = not bitwise_equal(a, b)
        if apart:
            self.differing.add(name)
        gap = (a - b).double() if apart else torch.zeros(1)
        if not a.numel():
            return (0.0,) * 5
        return (
            float(gap.abs().max()),
            float(gap.square().sum()),
            float(a.abs().max()),
            float(moved.abs().max()),
            float(moved.square().sum()),
        )

    def table(self, names: set[str], among: Sequence[str] | None = None) -> tuple[_Array, _Array, _Array]:
        """(steps, P) largest difference, element and movement of the parameters, or others, among ``names``."""
        kept = [name for name in (self.parameters if among is None else among) if name in names]
        values = np.array([[row[name] for name in kept] for row in self._rows], dtype=np.float64)
        values = values.reshape(self.steps, len(kept), 5)
        return values[..., 0], values[..., 2], values[..., 3]

    def displacement(self, names: set[str]) -> _Array:
        """(steps,) see :class:`gradprobe.audit.pair.PairOutcome`."""
        kept = [name for name in self.parameters if name in names]
        gap = np.array([sum(row[name][1] for name in kept) for row in self._rows], dtype=np.float64)
        moved = np.array([sum(row[name][4] for name in kept) for row in self._rows], dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(gap == 0, 0.0, np.sqrt(gap / moved.max(initial=0.0)))

    def first(self, names: set[str], weights: Mapping[str, float]) -> list[FirstDifference]:
        """The first difference of every stage, of what matters."""
        tensors = {*self.parameters, *self.buffers}
        kept: dict[str, FirstDifference] = {}
        for difference in self.first_differences:
            if difference.name in names or difference.name not in tensors:
                kept.setdefault(difference.stage, difference)
        return sorted(kept.values(), key=lambda s: (s.step, STAGES.index(s.stage)))


def difference_class(history: History, matter: set[str], ulp: _Array, envelope: float) -> str:
    """The class of a difference, of the parameters and buffers that matter alone.

    Buffers only: parameters are bitwise equal or differ by rounding, and buffers by more.
    """
    if history.nonfinite & matter:
        return NON_FINITE
    if history.decided:
        return MATERIAL
    if not only_rounding(ulp, envelope):
        return MATERIAL
    if not only_rounding(ulps(*history.table(matter, history.buffers), history.eps), envelope):
        return _BUFFERS_ONLY
    return NUMERIC if history.differing & matter else CLEAN
