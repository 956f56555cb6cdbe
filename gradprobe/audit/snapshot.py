"""Everything that a training's next step depends on, taken down and put back."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradprobe.audit.experiment import Experiment


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
