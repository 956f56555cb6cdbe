"""Two trainings in lockstep, how they part, and what became of the other tasks' losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradprobe.audit import differences
from gradprobe.audit.arm import Door, LockstepArm, patched
from gradprobe.audit.differences import FirstDifference, History, bitwise_equal, difference_class
from gradprobe.audit.experiment import Experiment, Factory, Snapshot, check_task, experiment_from, random_state_kept

_SEED = 20_200_119
"""Evaluations draw what they draw from this seed, so that two of them can be compared."""


class _Enough(BaseException):
    """Leaves a step function when its losses are known; no ``except Exception`` of the user's stops it."""


def _relevant(turns: _Turns, reached: set[str], differing: set[str], known: dict[str, bool]) -> set[str]:
    """The parameters and buffers that the other tasks depend on.

    Parameters that had a gradient without the task do. Of the others that differ, those do which change the other
    tasks' losses when they are put into the training without the task; found by bisection.

    Args:
        turns: Both arms, after their last step.
        reached: Parameters that had a gradient other than 0 without the task.
        differing: All parameters and buffers that differ somewhere.
        known: What earlier pairs found; brought up to date.
    """
    without, with_ = turns.arms
    doubtful = sorted(differing - reached - known.keys())
    if not doubtful:
        return set(reached) | {name for name, matters in known.items() if matters}
    with turns.of(with_):
        theirs = {name: tensor.detach().clone() for name, tensor in with_.experiment.tensors().items()}
    with turns.of(without):
        here = Snapshot.taken(without.experiment)
        before = _losses(without, here)

        def matter(names: list[str]) -> bool:
            with torch.no_grad():
                for name in names:
                    without.experiment.tensors()[name].copy_(theirs[name])
            changed = Snapshot.taken(without.experiment)
            try:
                return any(
                    not bitwise_equal(_number(before[key]), _number(v)) for key, v in _losses(without, changed).items()
                )
            finally:
                here.put_back(without.experiment)

        found = set(_bisected(doubtful, matter))
    known.update({name: name in found for name in doubtful})
    return set(reached) | {name for name, matters in known.items() if matters}


def _bisected(names: list[str], matters: Callable[[list[str]], bool]) -> list[str]:
    if not names or not matters(names):
        return []
    if len(names) == 1:
        return names
    middle = len(names) // 2
    # Where only both halves together matter, all of them do.
    return [*_bisected(names[:middle], matters), *_bisected(names[middle:], matters)] or names


def _evaluated(turns: _Turns) -> dict[str, dict[str, tuple[float, float]]]:
    """Mode -> name -> (without, with): the other tasks' losses and metrics as both arms stand now."""
    found = []
    for arm in turns.arms:
        with turns.of(arm):
            here = Snapshot.taken(arm.experiment)
            found.append(_losses(arm, here))
    a, b = found
    modes: dict[str, dict[str, tuple[float, float]]] = {"training": {}, "evaluation": {}}
    for mode, name in a:
        if (mode, name) in b:
            modes[mode][name] = (float(a[mode, name]), float(b[mode, name]))
    return modes


def _losses(arm: LockstepArm, here: Snapshot) -> dict[tuple[str, str], Any]:
    """Of the other tasks, in both modes; the experiment is left in the state ``here``."""
    result: dict[tuple[str, str], Any] = {}
    for mode in ("training", "evaluation"):
        arm.experiment.model.train(mode == "training")
        torch.manual_seed(_SEED)
        try:
            for name, value in _values(arm).items():
                result[mode, name] = value
        finally:
            here.put_back(arm.experiment)
    return result


def _values(arm: LockstepArm) -> Mapping[str, Any]:
    others = [task for task in arm.weights if task != arm.task]
    evaluate = arm.experiment.evaluate
    if evaluate is not None:
        with torch.no_grad():
            values = evaluate(others)
        return {name: v for name, v in values.items() if name.split("/")[0] != arm.task}
    return _of_a_step(arm.experiment, arm.first_batch, {t: arm.weights[t] for t in others})


def _of_a_step(experiment: Experiment, batch: Any, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The losses that the step function would hand over; it is left there, and what it did before is undone later."""
    found: dict[str, Tensor] = {}

    class Listener:
        def losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found.update({task: loss.detach().clone() for task, loss in losses.items()})
            if found.keys() >= weights.keys():
                raise _Enough
            return dict(losses)

        def decide(self, name: str, value: bool) -> bool:
            return value

    kept = {module: module.training for module in experiment.model.modules()}

    def train(mode: bool = True) -> Any:
        """A step function that calls ``model.train()`` is not to leave the mode that is asked for."""
        return experiment.model

    with patched(experiment.model, "train", train), suppress(_Enough):
        experiment.step(Listener(), batch, dict(weights))
    for module, mode in kept.items():
        module.training = mode
    return found


def _number(value: Any) -> Tensor:
    return value.reshape(()) if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


@dataclass
class PairOutcome:
    """How a training with the task differs from the same without it.

    Attributes:
        kind: ``clean``, ``numeric``, ``buffers only``, ``material`` or ``non-finite``, of what the others depend on.
        steps: Steps made in lockstep; fewer than asked for where an arm stopped or was no longer finite.
        displacement: (steps,) Euclidean distance of the other tasks' parameters, relative to how far they came in all
            these steps without the task; 0: bitwise equal; NaN: not finite; inf: they did not move.
        ulp: (steps,) the same in units of rounding, see :func:`gradprobe.audit.differences.ulps`.
        first_differences: The first difference of every stage, in order of time.
        effect: Mode -> name -> (without, with): the other tasks' losses and metrics after the last step.
        skipped: Optimizer steps that one arm made and the other did not.
        acted: How often the closings changed something, in both arms.
        error: Why it could not be run to its end, where it could not.
    """

    kind: str
    steps: int
    displacement: differences._Array
    ulp: differences._Array
    first_differences: list[FirstDifference] = field(default_factory=list)
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
    ) -> PairOutcome:
        """Two arms from the snapshot: without the task, and with it.

        Args:
            weight: Of the task in the second arm; None: both arms are without it (the same twice).
            doors: Held shut in both.
            envelope: See :func:`gradprobe.audit.differences.only_rounding`.
            evaluate: Whether to look at losses and metrics after the last step.
            each: Is told the number of steps done.
        """
        with random_state_kept():
            first, second = experiment_from(self.make), experiment_from(self.make)
            others = {t: w for t, w in first.weights.items() if t != self.task}
            present = others if weight is None else {t: others.get(t, weight) for t in first.weights}
            arms = tuple(
                LockstepArm(experiment, weights, self.task, [door.close() for door in doors])
                for experiment, weights in ((first, others), (second, present))
            )
            try:
                return self._run(arms[0], arms[1], envelope, evaluate, each)
            finally:
                for experiment in (first, second):
                    self.snapshot.put_back(experiment)

    def _run(
        self, without: LockstepArm, with_: LockstepArm, envelope: float, evaluate: bool, each: Callable[[int], None]
    ) -> PairOutcome:
        turns = _Turns(self.snapshot, without, with_)
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

    def _judged(self, turns: _Turns, history: History, envelope: float, evaluate: bool, error: str) -> PairOutcome:
        without, _ = turns.arms
        matter = _relevant(turns, history.reached, history.differing, self.matters)
        gap, size, moved = history.table(matter)
        ulp = differences.ulps(gap, size, moved, history.eps)
        displacement = history.displacement(matter)
        outcome = PairOutcome(
            kind=difference_class(history, matter, ulp, envelope),
            steps=history.steps,
            displacement=displacement,
            ulp=ulp,
            first_differences=history.first(matter, without.weights),
            skipped=history.skipped,
            acted=sum(c.acted for arm in turns.arms for c in arm.closings),
            error=error,
        )
        if error:
            outcome.kind = differences.NON_FINITE if history.nonfinite else differences.MATERIAL
        if evaluate:
            outcome.effect = _evaluated(turns)
        return outcome


class _Turns:
    """Two arms in one process: each finds the random streams as it left them, and, where both are of the same objects,
    all the rest as well.
    """

    def __init__(self, snapshot: Snapshot, without: LockstepArm, with_: LockstepArm) -> None:
        self.arms = (without, with_)
        self._shared = without.experiment.model is with_.experiment.model
        for arm in self.arms:
            snapshot.put_back(arm.experiment)
        self._kept = {id(arm): snapshot for arm in self.arms}
        self._random = {id(arm): snapshot.random for arm in self.arms}

    @contextmanager
    def of(self, arm: LockstepArm) -> Iterator[None]:
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
    experiment = experiment_from(make)
    check_task(experiment, task)
    return Setting(make, Snapshot.taken(experiment), task, steps)
