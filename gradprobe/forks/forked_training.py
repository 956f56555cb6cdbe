"""Trains, and takes short branches from checkpoints of the training."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradprobe.audit import Experiment
from gradprobe.audit.experiment import Factory, Snapshot, experiment_from, random_state_kept
from gradprobe.errors import TrainingError, UsageError
from gradprobe.forks.branches import (
    Branch,
    ForkedTraining,
    ForkOptions,
    Losses,
    Weights,
    direction_name,
    step_name,
    without_name,
)
from gradprobe.forks.shadow_moments import ByParameter, ShadowMoments
from gradprobe.forks.watched_step import GradientNotFiniteError, PlainTrace, WatchedSteps
from gradprobe.ledger.update_parts import Rule, own_factor, rules

_Progress = Callable[[str], None]

_SEED = 20_261_130
"""Evaluations draw what they draw from this seed, so that two of them can be compared."""

MOST_ERROR = 1e-3
"""How far the state that shadows give at the training's own weights may be from the optimizer's, relative to that."""


def fork(
    make: Factory, options: ForkOptions | None = None, *, progress: _Progress = lambda what: None
) -> ForkedTraining:
    """Train, and take branches.

    A task that a branch does without has weight 0 in it. It is not absent: its forward stays, and with it BatchNorm's
    statistics, the random streams and the batches; its gradient alone is gone, from the branch and from its history.

    Args:
        make: Returns an experiment at its beginning. It ends in the state in which it was made.
        options: How long, and which branches.
        progress: Is told what goes on.

    Raises:
        UsageError: Options that cannot be; an experiment of one task, without ``evaluate``, or with an optimizer whose
            history cannot be matched.
        TrainingError: The optimizer finds something else than the weighted sum of the tasks' gradients, or the
            experiment's state does not decide its next step.
    """
    options = options or ForkOptions()
    with random_state_kept():
        experiment = experiment_from(make)
        _check(experiment, options)
        beginning = Snapshot.taken(experiment)
        try:
            return _Forks(experiment, options, progress).run()
        finally:
            beginning.put_back(experiment)


def _check(experiment: Experiment, options: ForkOptions) -> None:
    tasks = tuple(experiment.weights)
    if len(tasks) < 2:
        raise UsageError(
            f"the experiment has one task, {', '.join(tasks)}; there is no other that could take progress."
        )
    if experiment.evaluate is None:
        raise UsageError(
            "the experiment has no evaluate(tasks): branches are compared by their losses on held-out samples. Return "
            "task -> loss of a fixed set from it."
        )
    if min(options.steps, options.checkpoints, options.horizon) < 1:
        raise UsageError(
            f"--steps {options.steps}, --checkpoints {options.checkpoints}, --horizon {options.horizon}: "
            "each is at least 1."
        )
    places = options.places()
    if options.horizon > options.steps or any(b - a < options.horizon for a, b in pairwise(places)):
        raise UsageError(
            f"--steps {options.steps}: too few for {options.checkpoints} checkpoints with branches of "
            f"{options.horizon} steps that do not overlap; at least {(options.checkpoints + 1) * options.horizon}."
        )
    for task in options.without:
        if task not in tasks:
            raise UsageError(f"--task {task!r}: the experiment has no such task (it has: {', '.join(tasks)}).")
    for name, weights in options.arms.items():
        if name.startswith(("without ", "joint")):
            raise UsageError(f"--arm {name}: a branch of the command's own is called so; choose another name.")
        if set(weights) != set(tasks) or not all(0 <= w < math.inf for w in weights.values()):
            raise UsageError(
                f"--arm {name}: give a weight of 0 or more for every task, such as "
                f"{name}={','.join(f'{task}=1' for task in tasks)}."
            )


class _Forks:
    def __init__(self, experiment: Experiment, options: ForkOptions, progress: _Progress) -> None:
        self._experiment, self._options, self._progress = experiment, options, progress
        self._weights = {task: float(weight) for task, weight in experiment.weights.items()}
        self._tasks = tuple(self._weights)
        self._batches = _Batches(experiment, self._tasks)
        self._steps = WatchedSteps(experiment)
        self._shadows = [ShadowMoments(optimizer, len(self._tasks)) for optimizer in experiment.optimizers]
        self._watched_seconds: list[float] = []
        self._plain_seconds: list[float] = []

    def run(self) -> ForkedTraining:
        options, branches = self._options, self._branches()
        places = options.places()
        start: list[Losses] = []
        joint: list[Losses] = []
        ends: dict[str, list[Losses]] = {branch.name: [] for branch in branches}
        error = twice = 0.0
        for step in range(options.steps):
            if step in places:
                self._progress(f"checkpoint {len(start) + 1} of {len(places)}, at step {step} of {options.steps}")
                batches = self._batches.coming(options.horizon)
                here = Snapshot.taken(self._experiment)
                error = max([error, *(shadow.error(self._list(self._weights)) for shadow in self._shadows)])
                self._check_error(error, step)
                start.append(self._evaluated(here))
                for branch in branches:
                    ends[branch.name].append(self._end_of(branch, here, batches))
                if len(start) == 1:
                    again = self._end_of(Branch("joint", self._weights), here, batches, matched=False)
                here.put_back(self._experiment)
            self._train()
            if step + 1 - options.horizon in places:
                joint.append(self._evaluated(Snapshot.taken(self._experiment)))
                if len(joint) == 1:
                    twice = self._check_twice(start[0], joint[0], again)
        return ForkedTraining(
            tasks=self._tasks,
            weights=self._weights,
            places=places,
            horizon=options.horizon,
            start=np.array(start),
            joint=np.array(joint),
            branches={name: np.array(losses) for name, losses in ends.items()},
            arms=tuple(options.arms),
            shadow_cost=_ratio(self._watched_seconds, self._plain_seconds),
            state_error=error,
            same_twice=twice,
        )

    def _branches(self) -> list[Branch]:
        options, joint = self._options, self._weights
        found = []
        for task in options.without or [task for task in self._tasks if joint[task]]:
            without = {**joint, task: 0.0}
            found.append(Branch(without_name(task), without))
            if options.controls and any(shadow.has_second for shadow in self._shadows):
                found.append(Branch(direction_name(task), without, second=joint))
                found.append(Branch(step_name(task), joint, second=without))
        return found + [Branch(name, dict(weights)) for name, weights in options.arms.items()]

    # ---- steps

    def _train(self) -> None:
        """One step of the training itself."""

        def before(number: int, gradients: list[ByParameter]) -> None:
            self._shadows[number].add(gradients)

        began = time.perf_counter()
        self._steps.step(self._batches.next(), self._weights, before)
        self._watched_seconds.append(time.perf_counter() - began)

    def _end_of(self, branch: Branch, here: Snapshot, batches: Sequence[Any], *, matched: bool = True) -> Losses:
        """The losses (T,) after the steps of a branch; NaN where its gradients are no longer finite."""
        try:
            self._go(branch, here, batches, matched)
        except GradientNotFiniteError:
            return np.full(len(self._tasks), np.nan)
        return self._losses()

    def _go(self, branch: Branch, here: Snapshot, batches: Sequence[Any], matched: bool) -> None:
        here.put_back(self._experiment)
        if matched:
            second = None if branch.second is None else self._list(branch.second)
            for shadow in self._shadows:
                shadow.put(self._list(branch.weights), second)
        if branch.second is not None:
            other = _OtherSecondMoment(self._shadows, self._list(branch.second))
        for place, batch in enumerate(batches):
            if branch.second is not None:
                self._steps.step(batch, branch.weights, other.before, other.after)
            elif place in (0, len(batches) - 1):  # that these weights make such a sum is seen at both ends
                self._steps.step(batch, branch.weights)
            else:
                began = time.perf_counter()
                self._experiment.step(PlainTrace(), batch, dict(branch.weights))
                self._plain_seconds.append(time.perf_counter() - began)

    # ---- losses

    def _evaluated(self, here: Snapshot) -> Losses:
        """The losses (T,); the experiment is left in the state ``here``, which is its own."""
        try:
            return self._losses()
        finally:
            here.put_back(self._experiment)

    def _losses(self) -> Losses:
        assert self._experiment.evaluate is not None
        torch.manual_seed(_SEED)
        with torch.no_grad():
            found = self._experiment.evaluate(self._tasks)
        if missing := [task for task in self._tasks if task not in found]:
            raise UsageError(f"the experiment's evaluate(tasks) returned no loss of {', '.join(missing)}.")
        return np.array([float(found[task]) for task in self._tasks])

    # ---- checks

    def _check_error(self, error: float, step: int) -> None:
        if not error <= MOST_ERROR:
            raise TrainingError(
                f"at step {step} the optimizer's state is {error:.2g} of its size away from what the tasks' gradients "
                "make of it: something else than the optimizer's own rule changes it, or tasks cancel to the last "
                "digits. No branch can be given a matched history."
            )

    def _check_twice(self, start: Losses, joint: Losses, again: Losses) -> float:
        moved = np.abs(joint - start)
        away = np.abs(joint - again)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = float(np.where(away == 0, 0.0, away / moved).max())
        if not found <= 0.1 and np.isfinite(joint).all():
            raise TrainingError(
                f"the same steps taken twice end {found:.2g} of a loss's movement apart: something that is in neither "
                "the model, the optimizer nor Experiment.state decides the next step, or a batch is changed in place. "
                "Put everything that has a state into Experiment.state, and use deterministic kernels."
            )
        return found

    def _list(self, weights: Weights) -> list[float]:
        return [float(weights[task]) for task in self._tasks]


class _OtherSecondMoment:
    """Makes a branch's steps of Adam with the second moment that gradients of other weights make.

    SGD's steps are left alone, and so are numbers on which those gradients never acted, as in the head of a task that
    they lack: divided by a second moment of 0 a step would have no bound.

    Args:
        shadows: At the checkpoint.
        weights: (T) of those gradients.
    """

    def __init__(self, shadows: Sequence[ShadowMoments], weights: list[float]) -> None:
        self._optimizers, self._weights = [shadow.optimizer for shadow in shadows], weights
        self._acted = [{p: v > 0 for p, v in shadow.second(weights).items()} for shadow in shadows]
        self._kept: list[tuple[Tensor, Rule, Tensor, Tensor]] = []

    @torch.no_grad()
    def before(self, number: int, gradients: list[ByParameter]) -> None:
        """Keep each parameter, its rule and its second moment as it is to be after the step."""
        optimizer = self._optimizers[number]
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p in self._acted[number]]
        self._kept = []
        for parameter, rule in zip(stepped, rules(optimizer, stepped), strict=True):
            if rule is None or parameter.grad is None:
                continue
            decay = parameter.detach() * (0.0 if rule.decoupled else rule.decay)
            other = decay.clone()
            for weight, task in zip(self._weights, gradients, strict=True):
                if parameter in task:
                    other.add_(task[parameter], alpha=weight)
            other = torch.where(self._acted[number][parameter], other, parameter.grad + decay)
            second = optimizer.state[parameter]["exp_avg_sq"] * rule.beta2
            second.addcmul_(other, other, value=1 - rule.beta2)
            self._kept.append((parameter, rule, parameter.detach().clone(), second))

    @torch.no_grad()
    def after(self, number: int) -> None:
        """Make the step anew from where it began, with the optimizer's own first moment."""
        for parameter, rule, began, second in self._kept:
            state = self._optimizers[number].state[parameter]
            state["exp_avg_sq"].copy_(second)
            length = own_factor(rule, second)
            assert isinstance(length, Tensor)
            decayed = began * (1 - rule.lr * rule.decay) if rule.decoupled else began
            parameter.copy_(decayed - length / rule.take * state["exp_avg"])


class _Batches:
    """The training's batches, of which some may be looked at before their time."""

    def __init__(self, experiment: Experiment, tasks: Sequence[str]) -> None:
        self._experiment, self._tasks = experiment, tasks
        self._ahead: deque[Any] = deque()
        self._epoch: Iterator[Any] = iter(())

    def next(self) -> Any:
        return self._ahead.popleft() if self._ahead else self._fetched()

    def coming(self, count: int) -> list[Any]:
        """The next ``count``, which stay the next ones."""
        while len(self._ahead) < count:
            self._ahead.append(self._fetched())
        return list(self._ahead)[:count]

    def _fetched(self) -> Any:
        for _ in range(2):
            for batch in self._epoch:
                return batch
            batches = self._experiment.batches
            self._epoch = iter(batches(self._tasks) if callable(batches) else batches)
        raise UsageError("the experiment has no batches: `batches` must be an iterable that can be iterated again.")


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of medians; NaN where there is none."""
    return statistics.median(above) / statistics.median(below) if above and below else math.nan
