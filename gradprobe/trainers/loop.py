"""The training loop that all bundled trainers share. Read it from top to bottom."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gradprobe.errors import NonFiniteLossError
from gradprobe.probes import GradientProbe
from gradprobe.probes.calls import mean_losses, shares_of
from gradprobe.rows import NONFINITE_LOSS, TestClusters
from gradprobe.trainers import checkpoint
from gradprobe.trainers.balancer import Balancer, check_weights
from gradprobe.trainers.checkpoint import digest
from gradprobe.trainers.data.dataset import micro_batches
from gradprobe.trainers.engine import Engine
from gradprobe.trainers.evaluation import leave_out, recompute_batchnorm
from gradprobe.trainers.optim import restore_optimizer, restore_schedule
from gradprobe.trainers.paths import Paths
from gradprobe.trainers.problems import Problem, SampleScores
from gradprobe.trainers.registry import TRAINERS
from gradprobe.trainers.settings import Settings

__all__ = ["TrainingOutcome", "load_training_state", "run", "training_state"]


UNKNOWN_ORDER = {"hash": "unknown", "count": 0}
"""The state of a checkpoint that does not tell: what is added to it is equal to nothing else."""


class BatchOrder:
    """A chain of hashes over the names of the samples of every training batch.

    Two trainings with equal ``hash`` and ``count`` saw the same samples in the same batches in the same order.
    """

    def __init__(self) -> None:
        self.hash = hashlib.sha256(b"gradprobe batches").hexdigest()
        self.count = 0

    def add(self, names: Iterable[str]) -> None:
        """One more batch."""
        link = "\0".join([self.hash, *names])
        self.hash = hashlib.sha256(link.encode("utf-8", "surrogateescape")).hexdigest()
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """The hash, in hex, and how many batches it is of."""
        return {"hash": self.hash, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.hash, self.count = state["hash"], state["count"]


class Watcher(Protocol):
    """Is told how far the training is; a display, or nothing."""

    def phase(self, what: str) -> None:
        """What goes on now, in a word or two."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def stepped(self, epoch: int, step: int, losses: Mapping[str, float]) -> None:
        """A step is done."""

    def evaluated(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """An epoch is done."""


@dataclass
class Training:
    """All that a training consists of; made by :mod:`gradprobe.trainers.build`."""

    settings: Settings
    problem: Problem
    model: Any  # see Problem
    engine: Engine
    optimizer: Optimizer
    schedule: LambdaLR
    balancer: Balancer
    probe: GradientProbe
    train_loader: Any  # this process's part of every batch
    whole_loader: Any  # whole batches
    val_loader: Any
    test_loader: Any | None
    paths: Paths
    watcher: Watcher
    epoch: int = 0
    best: float = -math.inf
    batches: BatchOrder = field(default_factory=BatchOrder)
    origin: Mapping[str, Any] = field(default_factory=dict)  # what a resumed training is built from again


@dataclass(frozen=True)
class TrainingOutcome:
    """What is known only in the end.

    Attributes:
        test: Metrics on the test split; empty where there is none.
        clusters: The same with one cluster of images left out.
        batches: Which batches were trained on, see :class:`gradprobe.trainers.loop.BatchOrder`.
    """

    test: Mapping[str, float]
    clusters: TestClusters | None
    batches: Mapping[str, Any]


def run(training: Training) -> TrainingOutcome:
    """Train to the end; what it came to is known to the first process alone.

    Raises:
        NonFiniteLossError: A loss became NaN or infinite, unless ``keep_going``.
    """
    t = training
    while t.epoch < t.settings.epochs:
        t.probe.epoch = t.epoch
        t.watcher.phase("training")
        _train_epoch(t)
        if t.engine.processes.first:  # the others wait for it in the next epoch's first step
            _end_epoch(t)
        else:
            t.epoch += 1
    if t.test_loader is None or not t.engine.processes.first:
        return TrainingOutcome({}, None, t.batches.state_dict())
    t.watcher.phase("testing")
    # Once, with the last weights: val chose nothing here, so nothing was fitted to the test split.
    scores = _evaluate_on(t, t.test_loader)
    return TrainingOutcome(
        scores.metrics(), leave_out(scores, t.problem.clusters(t.test_loader.dataset)), t.batches.state_dict()
    )


def _end_epoch(t: Training) -> None:
    """Metrics on val, and a state to go on from."""
    t.watcher.phase("evaluating")
    metrics = _evaluate_on(t, t.val_loader).metrics()
    t.probe.log_metrics(t.epoch, **metrics)
    t.watcher.evaluated(t.epoch, metrics)
    t.epoch += 1
    _save_state(t, metrics)


def _train_epoch(t: Training) -> None:
    """One pass over the training data."""
    t.model.train()
    t.train_loader.set_epoch(t.epoch)
    for batch in t.train_loader:
        t.batches.add(t.train_loader.names)
        train_step(t, batch.to(t.engine.device))


def train_step(t: Training, batch: Any) -> None:
    """One update: forward, balancer, joint backward with the probe, optimizer."""
    losses, micro, sizes = _losses_of(t, batch)
    values, size, step, taken = t.engine.values(losses), sum(sizes), t.probe.step, True
    if _is_finite(t, losses, values, size):
        t.balancer.loss_scale = t.engine.loss_scale
        weights = t.engine.processes.agreed(t.balancer.step(losses))
        check_weights(weights, tuple(losses), step=step, signed=t.balancer.signed)
        t.probe.share = t.train_loader.share
        t.probe.backward(losses, weights, micro=micro, batch_size=sizes if micro and size else size)
        t.balancer.after_backward()
        taken = t.engine.update(t.optimizer, t.model.parameters(), t.settings.clip_norm)
    else:
        t.optimizer.step()  # with no gradient there, this counts the step and changes nothing
    t.optimizer.zero_grad(set_to_none=True)
    if taken:
        t.schedule.step()
    t.watcher.stepped(t.epoch, step, values)


def _losses_of(
    t: Training, batch: Any
) -> tuple[Mapping[str, Tensor], Sequence[Mapping[str, Tensor]] | None, list[int]]:
    """The losses of a batch, or of this process's part of it.

    In micro-batches each part of it has a forward of its own, as noise can be told from independent parts only.
    BatchNorm and dropout see parts then: it is another training than with whole batches.

    Returns:
        The losses that are trained; those of each micro-batch, None where the training has none; and their sizes, which
        are 0 where the batch only stands in for one.
    """
    count, share = t.engine.micro_batches(t.settings.micro_batches), t.train_loader.share
    counted = 1 if share else 0
    if count == 1:
        return t.engine.losses(t.model, batch, share), None, [len(batch.images) * counted]
    parts = micro_batches(batch, count)
    micro = [t.engine.losses(t.model, part, share) for part in parts]
    sizes = [len(part.images) for part in parts]
    return mean_losses(micro, shares_of(sizes)), micro, [size * counted for size in sizes]


def _is_finite(t: Training, losses: Mapping[str, Tensor], values: Mapping[str, float], size: int) -> bool:
    """Whether the step can be taken; a step that cannot is recorded, and ends the training unless it may go on."""
    for task, value in values.items():
        if not math.isfinite(value):
            t.probe.note(losses, t.balancer.weights(), NONFINITE_LOSS, batch_size=size)
            if not t.settings.keep_going:
                raise NonFiniteLossError(task, t.probe.step, value)
            return False
    return True


def _evaluate_on(t: Training, loader: Iterable[Any]) -> SampleScores:
    """An evaluation on a split, with BatchNorm statistics that fit the present weights.

    YOLOv5's running statistics follow with a momentum of 0.03: in a short run they are those of weights long gone.
    Recomputing them changes nothing in the training, which uses the batch's own.
    """
    if t.settings.bn_batches:
        t.whole_loader.set_epoch(0)
        recompute_batchnorm(t.model, t.whole_loader, batches=t.settings.bn_batches)
    return t.problem.score(t.model, loader, device=t.engine.device)


def _save_state(t: Training, metrics: Mapping[str, float]) -> None:
    """After an epoch: the last weights, the best ones if these are, and all that resuming needs.

    A disk that takes no more ends no training: what could not be saved is said, and tried again after the next epoch.
    """
    _save_or_warn(t, t.paths.last, t.model.state_dict())
    fitness = t.problem.fitness(metrics)
    if fitness > t.best and _save_or_warn(t, t.paths.best, t.model.state_dict()):
        t.best = fitness
    if t.probe.flush():  # a state that is ahead of the rows would leave a gap in the run that is resumed from it
        _save_or_warn(t, t.paths.checkpoint, training_state(t))


def _save_or_warn(t: Training, path: Path, state: Mapping[str, Any]) -> bool:
    """Whether ``state`` could be saved; if not, the user is told."""
    try:
        checkpoint.save(path, state)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = str(error).splitlines()[0]
        t.watcher.note(f"{path.name} of epoch {t.epoch} not saved, is the disk full? ({reason}) Training goes on.")
        return False
    return True


def training_state(t: Training) -> dict[str, Any]:
    """All state between two epochs, see :mod:`gradprobe.trainers.checkpoint`."""
    state = {
        **t.origin,
        "epoch": t.epoch,
        "best": t.best,
        "model": t.model.state_dict(),
        "optimizer": t.optimizer.state_dict(),
        "schedule": t.schedule.state_dict(),
        "balancer": t.balancer.state_dict(),
        "scaler": t.engine.scaler.state_dict() if t.engine.scaler is not None else {},
        "probe": t.probe.state_dict(),
        "batches": t.batches.state_dict(),
        "rng": torch.get_rng_state(),
    }
    return {**state, "sum": digest(state)}


def load_training_state(t: Training, state: Mapping[str, Any]) -> None:
    """Go on where :func:`training_state` left off.

    Raises:
        RunFileError: A part of the state is of another training; says which. Nothing of the run has changed.
    """
    most = t.settings.epochs * len(t.train_loader)
    loads: dict[str, Callable[[], Any]] = {
        "model": lambda: _load_model(t, state["model"]),
        "optimizer": lambda: restore_optimizer(t.optimizer, state["optimizer"]),
        "schedule": lambda: restore_schedule(t.schedule, state["schedule"], most),
        "balancer": lambda: _load_balancer(t, state["balancer"]),
        "scaler": lambda: _load_scaler(t, state["scaler"]),
        "batches": lambda: t.batches.load_state_dict(state.get("batches", UNKNOWN_ORDER)),
        "rng": lambda: torch.set_rng_state(state["rng"].cpu()),
        "probe": lambda: _load_probe(t, state["probe"], most),  # last: from here on the run's file is told
    }
    for part, load in loads.items():
        with checkpoint.fitting(t.paths.checkpoint, part):
            load()
    t.epoch, t.best = state["epoch"], state["best"]
    if t.best > -math.inf and t.engine.processes.first and not t.paths.best.exists():
        t.watcher.note(
            f"{t.paths.best.name} is missing: the weights of the best epoch of the first {t.epoch} are lost. It is "
            f"written again by an epoch that is better than that one was ({t.best:.4g}), and by no other."
        )


def _load_model(t: Training, state: Mapping[str, Any]) -> None:
    t.model.load_state_dict(dict(state))
    if digest(t.model.state_dict()) != digest(state):  # copying makes one type of another
        raise ValueError("its tensors are of other types, or in another order")


def _load_balancer(t: Training, state: Mapping[str, Any]) -> None:
    if t.settings.trainer in TRAINERS and (others := t.balancer.state_dict().keys() ^ state.keys()):
        raise ValueError(f"{t.settings.trainer} has no {sorted(others)[0]}, or this has none")
    t.balancer.load_state_dict(state)
    if t.settings.trainer in TRAINERS:
        check_weights(t.balancer.weights(), t.problem.kind.tasks, step=t.probe.step, signed=t.balancer.signed)


def _load_scaler(t: Training, state: Mapping[str, Any]) -> None:
    if (t.engine.scaler is None) != (not state):
        raise ValueError(f"--precision {t.settings.precision} goes {'without' if state else 'with'} one")
    if t.engine.scaler is not None:
        known = t.engine.scaler.state_dict()
        if wrong := [n for n, v in known.items() if type(state.get(n)) is not type(v) or not 0 <= state[n] < math.inf]:
            raise ValueError(f"{wrong[0]} is {state.get(wrong[0])!r}")
        t.engine.scaler.load_state_dict(dict(state))


def _load_probe(t: Training, state: Mapping[str, Any], most: int) -> None:
    step, epoch = state["clock"]["step"], max(state["epoch"], state["last_metrics"])
    if step > most or state["clock"]["last_asked"] > step or epoch >= t.settings.epochs:
        raise ValueError(f"it is at step {step}, epoch {epoch}, of {most} steps and {t.settings.epochs} epochs")
    t.probe.load_state_dict(state)
