"""Two trainings in lockstep, and how they part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from gradprobe.audit import compare
from gradprobe.audit.arm import Arm
from gradprobe.audit.closing import Door
from gradprobe.audit.evaluation import evaluated, relevant
from gradprobe.audit.experiment import Factory, check_task, made
from gradprobe.audit.history import History, Sighting, kind
from gradprobe.audit.snapshot import Snapshot, random_state_kept


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


def setting(make: Factory, task: str, steps: int) -> Setting:
    """Where every pair begins: as the factory leaves an experiment.

    Raises:
        UsageError: There is no such task, or the factory returns no experiment.
    """
    experiment = made(make)
    check_task(experiment, task)
    return Setting(make, Snapshot.taken(experiment), task, steps)
