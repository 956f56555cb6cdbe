"""The bundled trainers as an experiment that can be audited: the loop's own step, with a task or without it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gradprobe.audit import Experiment, Trace
from gradprobe.errors import UsageError
from gradprobe.trainers import checkpoint, loop
from gradprobe.trainers.balancer import Balancer, Setup, find_balancer, make_balancer
from gradprobe.trainers.engine import check_device, make_engine
from gradprobe.trainers.hyp import DetectionHyp
from gradprobe.trainers.joint import Joint
from gradprobe.trainers.optim import make_optimizer, make_schedule
from gradprobe.trainers.paths import Paths
from gradprobe.trainers.problems import Data, SampleScores, problem_of
from gradprobe.trainers.settings import Settings

__all__ = ["audit_settings", "check_auditable", "experiment_factory"]


_EVALUATED_BATCHES = 2

NOT_AUDITABLE = {
    "single": "trains one task alone, which is `joint` with weight 0 for the other: gradprobe audit --trainer joint",
}
"""Trainers of which there is nothing to audit, and why."""


def experiment_factory(
    settings: Settings, data: Data, hyp: DetectionHyp | None = None, *, evaluated: int | None = _EVALUATED_BATCHES
) -> Callable[[], Experiment]:
    """Makes the training that ``gradprobe record`` makes with these settings, without a probe and a file.

    Args:
        settings, data, hyp: Of the training.
        evaluated: On how many of the first validation batches it is evaluated; None: on all.

    Raises:
        UsageError: As :func:`gradprobe.trainers.build.build`; or this trainer cannot be audited, and why.
    """
    check_auditable(settings.trainer)
    return lambda: _Audited(settings, data, hyp or DetectionHyp(), evaluated).experiment()


def check_auditable(trainer: str | None) -> None:
    """Whether there is something to audit.

    Raises:
        UsageError: There is not, and why.
    """
    if trainer in NOT_AUDITABLE:
        raise UsageError(f"--trainer {trainer}: {NOT_AUDITABLE[trainer]}.")


class _PresentTasks:
    """The model, of which only some tasks have a loss."""

    def __init__(self, model: Any, tasks: Sequence[str]) -> None:
        self._model, self._tasks = model, tuple(tasks)

    def __call__(self, images: Tensor) -> Any:
        """The forward is the same whatever the tasks: one trunk, both heads."""
        return self._model(images)

    def losses(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """Of the tasks that are present."""
        return {task: loss for task, loss in self._model.losses(outputs, batch).items() if task in self._tasks}

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All of the model's."""
        yield from self._model.parameters()


class _TracedBackward:
    """Stands where the loop has its probe: the joint backward, seen by the audit."""

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self.trace: Trace | None = None
        self.step, self.share = 0, 1.0
        self._scaler = scaler

    def backward(
        self, losses: Mapping[str, Tensor], weights: Mapping[str, float], *, micro: Any = None, batch_size: Any = 0
    ) -> None:
        """As ``probe.backward`` makes it on a step that is not measured."""
        assert self.trace is not None
        traced = self.trace.losses(losses)
        total = sum(weights[task] * traced[task] for task in losses)
        assert isinstance(total, Tensor)
        (total if self._scaler is None else self._scaler.scale(total)).backward()
        self.step += 1

    def note(self, losses: Mapping[str, Tensor], weights: Mapping[str, float], why: str, *, batch_size: int) -> None:
        """A step that cannot be taken."""
        assert self.trace is not None
        self.trace.losses(losses)


class _NoWatcher:
    """Watches nothing."""

    def stepped(self, epoch: int, step: int, losses: Mapping[str, float]) -> None:
        """Nothing to do."""


class _Audited:
    def __init__(self, settings: Settings, data: Data, hyp: DetectionHyp, evaluated: int | None) -> None:
        self._settings, self._device, self._evaluated = settings, check_device(settings.device), evaluated
        self._problem = problem_of(settings)
        self._tasks = self._problem.kind.tasks
        self._kind = find_balancer(settings.trainer)
        reference = self._problem.build_model(settings, data, hyp).to(self._device)
        if settings.weights:
            checkpoint.load_weights(reference, settings.weights, str(self._device))
        self._loader = self._problem.loader(data.train, settings.batch_size, seed=settings.seed, shuffle=True)
        setup = Setup(settings, self._tasks, len(self._loader))
        self._model: Any = self._kind.prepare(reference, setup)
        self._model.train()
        self._optimizer = make_optimizer(self._model, settings)
        self._val = self._problem.loader(data.val, settings.batch_size, shuffle=False)
        self._schedule = make_schedule(self._optimizer, settings, settings.epochs * len(self._loader))
        self._engine = make_engine(self._model, settings.precision, self._device)
        self._probe = _TracedBackward(self._engine.scaler)
        self._training: loop.Training | None = None
        self._weights: dict[str, float] = {}  # that it was made for
        self._epoch = 0

    def experiment(self) -> Experiment:
        return Experiment(
            model=self._model,
            optimizer=self._optimizer,
            batches=self._batches,
            step=self._step,
            weights=dict(zip(self._tasks, self._settings.task_weights, strict=True)),
            scaler=self._engine.scaler,
            schedule=self._schedule,
            evaluate=self._evaluate,
        )

    def _batches(self, tasks: Sequence[str]) -> Iterator[Any]:
        self._loader.set_epoch(self._epoch)
        self._epoch += 1
        return iter(self._loader)

    def _step(self, trace: Trace, batch: Any, weights: Mapping[str, float]) -> None:
        if self._training is None or self._weights != weights:
            self._training, self._weights = self._training_of(weights), dict(weights)
        self._probe.trace = trace
        loop.train_step(self._training, batch.to(self._device))

    def _training_of(self, weights: Mapping[str, float]) -> loop.Training:
        """The loop's own record; what a step does not touch is left out."""
        return loop.Training(
            settings=self._settings,
            problem=self._problem,
            model=cast(Any, _PresentTasks(self._model, tuple(weights))),
            engine=self._engine,
            optimizer=self._optimizer,
            schedule=self._schedule,
            balancer=_balancer_of_present(self._kind, self._settings, self._model, weights, len(self._loader)),
            probe=cast(Any, self._probe),
            train_loader=self._loader,
            whole_loader=self._loader,
            val_loader=self._val,
            test_loader=None,
            paths=Paths(Path()),
            watcher=cast(Any, _NoWatcher()),
        )

    def _evaluate(self, tasks: Sequence[str]) -> dict[str, float]:
        """Losses on the first validation batches, and in evaluation mode the main metrics of each task."""
        batches = list(itertools.islice(self._val, self._evaluated))
        total = dict.fromkeys(tasks, 0.0)
        for batch in batches:
            moved = batch.to(self._device)
            losses = self._model.losses(self._model(moved.images), moved)
            for task in tasks:
                total[task] += float(losses[task]) / len(batches)
        if self._model.training:
            return total
        scores: SampleScores = self._problem.score(self._model, batches, device=self._device)
        found, main = scores.metrics(), self._problem.kind.main()
        return total | {f"{task}/{name}": found[name] for task in tasks for name in main[task]}


def _balancer_of_present(
    kind: type[Balancer],
    settings: Settings,
    model: Any,
    weights: Mapping[str, float],
    steps_per_epoch: int,
) -> Balancer:
    """The trainer's balancer over the tasks that are present, as it would be in a training without the others.

    GradNorm's weights sum to the number of tasks that are there. One task alone has nothing to balance: it keeps its
    weight, but for the trainers that learn or draw it.

    Raises:
        UsageError: The trainer cannot begin with these weights.
    """
    if len(weights) == 1 and kind.same_step:  # surgery combines gradients of several
        return Joint(weights)
    if settings.trainer == "uncertainty" and not all(weights.values()):
        raise UsageError(
            "--trainer uncertainty learns its weights, and begins above 0: say with which, such as --weight 1."
        )
    present = dataclasses.replace(
        settings,
        task_weights=tuple(weights.values()),
        weight_sum=settings.weight_sum * len(weights) / len(settings.task_weights),
    )
    return make_balancer(kind, model, Setup(present, tuple(weights), steps_per_epoch))


def audit_settings(settings: Settings) -> Settings:
    """The settings of the audit's own: a loss that is not finite is audited, and ends nothing."""
    return dataclasses.replace(settings, keep_going=True)
