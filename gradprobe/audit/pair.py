"""Two trainings in lockstep, and how they part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from gradprobe.audit import compare
from gradprobe.audit.arm import Arm
from gradprobe.audit.closing import Door
from gradprobe.audit.evaluation import evaluated, relevant
from gradprobe.audit.experiment import STAGES, Factory, check_task, made
from gradprobe.audit.record import StepRecord
from gradprobe.audit.snapshot import Snapshot, random_state_kept


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


@dataclass
class Outcome:
    """How a training with the task differs from the same without it.

    Attributes:
        kind: ``clean``, ``numeric``, ``buffers only``, ``material`` or ``non-finite``, of what the others depend on.
        steps: Steps made in lockstep; fewer than asked for where an arm stopped or was no longer finite.
        displacement: (steps,) Euclidean distance of the other tasks' parameters, relative to how far they came in all
            these steps without the task; 0: bitwise equal; NaN: not finite; inf: they did not move.
        ulp: (steps,) the same in units of rounding, see :func:`gradprobe.audit.compare.ulps`.
        sightings: The first difference of every stage, in order of time.
        effect: Mode -> name -> (without, with): the other tasks' losses and metrics after the last step.
        skipped: Optimizer steps that one arm made and the other did not.
        acted: How often the closings changed something, in both arms.
        error: Why it could not be run to its end, where it could not.
    """

    kind: str
    steps: int
    displacement: compare.Array
    ulp: compare.Array
    sightings: list[Sighting] = field(default_factory=list)
    effect: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    skipped: int = 0
    acted: int = 0
    error: str = ""

    @property
    def last(self) -> float:
        """The displacement after the last step; NaN where it is not finite."""
        return float(self.displacement[-1]) if len(self.displacement) else 0.0

    @property
    def largest(self) -> float:
        """The largest displacement of all steps; inf where it was not finite."""
        values = np.where(np.isnan(self.displacement), math.inf, self.displacement)
        return float(values.max(initial=0.0))


@dataclass(frozen=True)
class Setting:
    """What all pairs of one audit share.

    Attributes:
        make: Makes an experiment.
        snapshot: The state in which every arm begins.
        task: The one that is taken away.
        steps: How many.
        matters: Of parameters and buffers without a gradient of the other tasks': whether those depend on them.
    """

    make: Factory
    snapshot: Snapshot
    task: str
    steps: int
    matters: dict[str, bool] = field(default_factory=dict)

    def run(
        self,
        weight: float | None,
        doors: Sequence[Door] = (),
        *,
        envelope: float = 0.0,
        evaluate: bool = False,
        each: Callable[[int], None] = lambda step: None,
    ) -> Outcome:
        """Two arms from the snapshot: without the task, and with it.

        Args:
            weight: Of the task in the second arm; None: both arms are without it (the same twice).
            doors: Held shut in both.
            envelope: See :func:`gradprobe.audit.compare.only_rounding`.
            evaluate: Whether to look at losses and metrics after the last step.
            each: Is told the number of steps done.
        """
        with random_state_kept():
            first, second = made(self.make), made(self.make)
            others = {t: w for t, w in first.weights.items() if t != self.task}
            present = others if weight is None else {t: others.get(t, weight) for t in first.weights}
            arms = tuple(
                Arm(experiment, weights, self.task, [door.close() for door in doors])
                for experiment, weights in ((first, others), (second, present))
            )
            try:
                return self._run(arms[0], arms[1], envelope, evaluate, each)
            finally:
                for experiment in (first, second):
                    self.snapshot.put_back(experiment)

    def _run(self, without: Arm, with_: Arm, envelope: float, evaluate: bool, each: Callable[[int], None]) -> Outcome:
        turns = Turns(self.snapshot, without, with_)
        history = History(self.snapshot, without.experiment.model)
        error = ""
        for step in range(self.steps):
            with turns.of(without):
                reference = without.advance()
            try:
                with turns.of(with_):
                    record = with_.advance(reference)
            except Exception as raised:
                if not step and not with_.closings:
                    raise
                error = f"step {step}: {type(raised).__name__}: {raised}"
                break
            history.add(step, reference, record)
            each(step + 1)
            if reference.stopped or record.stopped or history.broken:
                break
        return self._judged(turns, history, envelope, evaluate, error)

    def _judged(self, turns: Turns, history: History, envelope: float, evaluate: bool, error: str) -> Outcome:
        without, _ = turns.arms
        matter = relevant(turns, history.reached, history.differing, self.matters)
        gap, size, moved = history.table(matter)
        ulp = compare.ulps(gap, size, moved, history.eps)
        displacement = history.displacement(matter)
        outcome = Outcome(
            kind=kind(history, matter, ulp, envelope),
            steps=history.steps,
            displacement=displacement,
            ulp=ulp,
            sightings=history.first(matter, without.weights),
            skipped=history.skipped,
            acted=sum(c.acted for arm in turns.arms for c in arm.closings),
            error=error,
        )
        if error:
            outcome.kind = compare.NON_FINITE if history.nonfinite else compare.MATERIAL
        if evaluate:
            outcome.effect = evaluated(turns)
        return outcome


class Turns:
    """Two arms in one process: each finds the random streams as it left them, and, where both are of the same objects,
    all the rest as well.
    """

    def __init__(self, snapshot: Snapshot, without: Arm, with_: Arm) -> None:
        self.arms = (without, with_)
        self._shared = without.experiment.model is with_.experiment.model
        for arm in self.arms:
            snapshot.put_back(arm.experiment)
        self._kept = {id(arm): snapshot for arm in self.arms}
        self._random = {id(arm): snapshot.random for arm in self.arms}

    @contextmanager
    def of(self, arm: Arm) -> Iterator[None]:
        """This arm's turn."""
        if self._shared:
            self._kept[id(arm)].put_back(arm.experiment)
        self._random[id(arm)].put_back()
        yield
        self._random[id(arm)] = type(self._random[id(arm)]).taken()
        if self._shared:
            self._kept[id(arm)] = Snapshot.taken(arm.experiment)


class History:
    """The differences of all steps, kept as numbers."""

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
        """(steps,) see :class:`Outcome`."""
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


def setting(make: Factory, task: str, steps: int) -> Setting:
    """Where every pair begins: as the factory leaves an experiment.

    Raises:
        UsageError: There is no such task, or the factory returns no experiment.
    """
    experiment = made(make)
    check_task(experiment, task)
    return Setting(make, Snapshot.taken(experiment), task, steps)
