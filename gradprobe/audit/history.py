"""The differences between two trainings, step by step, kept as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gradprobe.audit import compare
from gradprobe.audit.experiment import STAGES
from gradprobe.audit.record import StepRecord
from gradprobe.audit.snapshot import Snapshot


@dataclass(frozen=True)
class Sighting:
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
    size: compare.Distance

    def __str__(self) -> str:
        return f"step {self.step}, {self.stage}, {self.name}: {self.size}"


class History:
    """Of all steps, and of all parameters and buffers; which of them matter is known afterwards."""

    def __init__(self, start: Snapshot, model: nn.Module) -> None:
        self.parameters = [name for name, _ in model.named_parameters()]
        self.buffers = [name for name, _ in model.named_buffers()]
        self.reached: set[str] = set()
        self.differing: set[str] = set()
        self.sightings: list[Sighting] = []
        self.skipped = 0
        self.decided = False
        self.nonfinite: set[str] = set()
        self.eps = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
        self._start = start.tensors
        self._seen: set[tuple[str, str]] = set()
        self._rows: list[dict[str, tuple[float, float, float, float, float]]] = []

    @property
    def steps(self) -> int:
        """How many were compared."""
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
                if (stage, name) not in self._seen and not compare.equal(tensor, other):
                    self._seen.add((stage, name))
                    self.sightings.append(Sighting(step, stage, name, compare.distance(tensor, other)))
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
        apart = not compare.equal(a, b)
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

    def table(
        self, names: set[str], among: Sequence[str] | None = None
    ) -> tuple[compare.Array, compare.Array, compare.Array]:
        """(steps, P) largest difference, element and movement of the parameters, or others, among ``names``."""
        kept = [name for name in (self.parameters if among is None else among) if name in names]
        values = np.array([[row[name] for name in kept] for row in self._rows], dtype=np.float64)
        values = values.reshape(self.steps, len(kept), 5)
        return values[..., 0], values[..., 2], values[..., 3]

    def displacement(self, names: set[str]) -> compare.Array:
        """(steps,) see :class:`gradprobe.audit.pair.Outcome`."""
        kept = [name for name in self.parameters if name in names]
        gap = np.array([sum(row[name][1] for name in kept) for row in self._rows], dtype=np.float64)
        moved = np.array([sum(row[name][4] for name in kept) for row in self._rows], dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(gap == 0, 0.0, np.sqrt(gap / moved.max(initial=0.0)))

    def first(self, names: set[str], weights: Mapping[str, float]) -> list[Sighting]:
        """The first sighting of every stage, of what matters."""
        tensors = {*self.parameters, *self.buffers}
        kept: dict[str, Sighting] = {}
        for sighting in self.sightings:
            if sighting.name in names or sighting.name not in tensors:
                kept.setdefault(sighting.stage, sighting)
        return sorted(kept.values(), key=lambda s: (s.step, STAGES.index(s.stage)))


def kind(history: History, matter: set[str], ulp: compare.Array, envelope: float) -> str:
    """The class of a difference, of the parameters and buffers that matter alone.

    Buffers only: parameters are bitwise equal or differ by rounding, and buffers by more.
    """
    if history.nonfinite & matter:
        return compare.NON_FINITE
    if history.decided:
        return compare.MATERIAL
    if not compare.only_rounding(ulp, envelope):
        return compare.MATERIAL
    if not compare.only_rounding(compare.ulps(*history.table(matter, history.buffers), history.eps), envelope):
        return compare.BUFFERS_ONLY
    return compare.NUMERIC if history.differing & matter else compare.CLEAN
