"""What is audited: a training, as a factory of the user's returns it; and all that its next step depends on."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.errors import GradprobeError, UsageError

__all__ = ["Factory", "Snapshot", "experiment_from", "random_state_kept"]

STAGES = ("data", "forward", "backward", "clip", "scaler", "optimizer", "schedule", "decision")
"""The stages of a step, in the order in which they are compared.

data: the batch. forward: losses, buffers, random states. backward: ``.grad`` after the last backward, unscaled where a
scaler has unscaled it. clip: ``.grad`` as the optimizer finds it. scaler: steps taken, and the scale. optimizer: the
parameters. schedule: the learning rates. decision: what ``trace.decide`` was told.
"""


class Trace(Protocol):
    """What a step function is handed. Backward, clipping, optimizer and schedule are seen without it."""

    def losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hand over the unweighted losses of the tasks, and go on with those that are returned.

        To be called in every step, while the graph is alive and before the backward; once, or once per task or
        micro-batch. The losses returned are the same, but where a door is held shut that acts on them.
        """

    def decide(self, name: str, value: bool) -> bool:
        """Tell a decision, such as ``("stop", patience < 0)`` or ``("best", loss < best)``; follow what is returned."""


_StepFunction = Callable[[Trace, Any, Mapping[str, float]], Any]


@dataclass
class Experiment:
    """A training that can be taken step by step.

    Attributes:
        model: In the mode in which it trains.
        optimizer: One, or several.
        batches: Batches of one epoch: an iterable that can be iterated again, or a function of the tasks that are
            present, which returns one. It is asked again when it is exhausted.
        step: ``step(trace, batch, weights)`` makes one training step: forward, ``losses = trace.losses(losses)``,
            backward, clipping, optimizer, schedule. ``weights`` is task -> weight; a task that is not in it is absent,
            and the step is to be the one that a training without this task would make.
        weights: Task -> weight, of all tasks.
        scaler: The GradScaler, if there is one.
        schedule: The learning-rate scheduler, or several, if there are.
        evaluate: ``evaluate(tasks)`` returns task -> loss and further numbers, named ``task/metric``, with the model in
            the mode it is in. Without it the losses of the first batch stand in.
        state: Whatever else changes in training: name -> object with ``state_dict`` and ``load_state_dict`` (a
            balancer, a sampler), or a ``torch.Generator``.
    """

    model: nn.Module
    optimizer: Optimizer | Sequence[Optimizer]
    batches: Iterable[Any] | Callable[[Sequence[str]], Iterable[Any]]
    step: _StepFunction
    weights: Mapping[str, float]
    scaler: Any = None
    schedule: Any = None
    evaluate: Callable[[Sequence[str]], Mapping[str, Any]] | None = None
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizers, also where there is one."""
        return (self.optimizer,) if isinstance(self.optimizer, Optimizer) else tuple(self.optimizer)

    @property
    def scale(self) -> float:
        """What the scaler multiplies losses with; 1 where there is none."""
        return float(self.scaler.get_scale()) if self.scaler is not None and self.scaler.is_enabled() else 1.0

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def stateful(self) -> dict[str, Any]:
        """Everything with a state but model and optimizers, by name."""
        schedules = self.schedule if isinstance(self.schedule, Sequence) else [self.schedule]
        named = {f"schedule {i}": s for i, s in enumerate(schedules) if s is not None}
        scaler = {} if self.scaler is None else {"scaler": self.scaler}
        return {**scaler, **named, **self.state}


Factory = Callable[[], Experiment]


def experiment_from(factory: Callable[[], Any]) -> Experiment:
    """What the factory returns, as an experiment; a tuple is taken as (model, optimizer, batches, step, weights).

    Raises:
        UsageError: It is something else, or the factory fails; says what.
    """
    try:
        result = factory()
    except GradprobeError:
        raise
    except Exception as error:
        raise UsageError(f"the factory failed: {type(error).__name__}: {error}") from error
    if isinstance(result, tuple) and len(result) == 5:
        result = Experiment(*result)
    if not isinstance(result, Experiment):
        raise UsageError(
            f"the factory returned a {type(result).__name__}; it must return a gradprobe.audit.Experiment, "
            "or a tuple of model, optimizer, batches, step function and task weights."
        )
    if not isinstance(result.model, nn.Module) or not all(isinstance(o, Optimizer) for o in result.optimizers):
        raise UsageError("the factory's experiment has no torch model, or an optimizer that is none of torch's.")
    return result


def check_task(experiment: Experiment, task: str) -> None:
    """Whether the task can be taken away.

    Raises:
        UsageError: There is no such task, or no other.
    """
    if task not in experiment.weights:
        raise UsageError(f"--task {task!r}: the experiment has no such task (it has: {', '.join(experiment.weights)}).")
    if len(experiment.weights) < 2:
        raise UsageError(f"--task {task!r} is the only task; there is no other that it could change.")


# ---- everything that a training's next step depends on, taken down and put back


@dataclass(frozen=True)
class RandomState:
    """The global random streams of Python, numpy and torch (CPU and CUDA)."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def taken(cls) -> RandomState:
        """The streams as they are now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def put_back(self) -> None:
        """Set the global streams to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leaves the global random streams as it found them."""
    before = RandomState.taken()
    try:
        yield
    finally:
        before.put_back()


@dataclass(frozen=True)
class Snapshot:
    """The state of an experiment, independent of it.

    Attributes:
        tensors: Parameters and buffers, those that ``state_dict`` leaves out included.
        gradients: ``.grad`` of every parameter; None where there is none.
        training: The mode of every module.
        optimizers: Their ``state_dict``.
        others: State of scaler, schedules and whatever the experiment names.
        random: The global random streams.
    """

    tensors: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    training: dict[str, bool]
    optimizers: list[Any]
    others: dict[str, Any]
    random: RandomState

    @classmethod
    def taken(cls, experiment: Experiment) -> Snapshot:
        """A copy of the experiment's state as it is now."""
        model = experiment.model
        return cls(
            tensors={name: t.detach().clone() for name, t in experiment.tensors().items()},
            gradients={
                name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
            },
            training={name: module.training for name, module in model.named_modules()},
            optimizers=[copy.deepcopy(o.state_dict()) for o in experiment.optimizers],
            others={name: _state(thing) for name, thing in experiment.stateful().items()},
            random=RandomState.taken(),
        )

    def put_back(self, experiment: Experiment) -> None:
        """Bring an experiment, this one or another from the same factory, into this state; parameters stay the same
        objects.
        """
        with torch.no_grad():
            for name, tensor in experiment.tensors().items():
                tensor.copy_(self.tensors[name])
        for name, parameter in experiment.model.named_parameters():
            gradient = self.gradients[name]
            parameter.grad = None if gradient is None else gradient.clone()
        for name, module in experiment.model.named_modules():
            module.training = self.training[name]
        for optimizer, state in zip(experiment.optimizers, self.optimizers, strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))
        for name, thing in experiment.stateful().items():
            _load(thing, self.others[name])
        self.random.put_back()


def _state(thing: Any) -> Any:
    return thing.get_state() if isinstance(thing, torch.Generator) else copy.deepcopy(thing.state_dict())


def _load(thing: Any, state: Any) -> None:
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    else:
        thing.load_state_dict(copy.deepcopy(state))
    if isinstance(thing, torch.amp.GradScaler):  # a step that was cut off leaves it with an optimizer unscaled
        thing._per_optimizer_states.clear()
