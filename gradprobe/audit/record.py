"""What one step left behind, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradprobe.audit.experiment import STAGES
from gradprobe.audit.snapshot import RandomState

Traced = dict[str, Tensor | None]


@dataclass
class StepRecord:
    """One step of one arm.

    Attributes:
        batch: As the step function got it.
        stages: Stage -> name -> a copy of the tensor; None: a gradient that is not there.
        optimizer_steps: How often an optimizer stepped.
        rates: Learning rate and the other numbers of every group, one entry per optimizer step.
        decisions: In the order in which they were made.
        stopped: Whether the training asked to stop.
    """

    batch: Any = None
    stages: dict[str, Traced] = field(default_factory=lambda: {stage: {} for stage in STAGES})
    optimizer_steps: int = 0
    rates: list[list[dict[str, float]]] = field(default_factory=list)
    decisions: dict[str, bool] = field(default_factory=dict)
    stopped: bool = False


def leaves(batch: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Tensors and numbers of a batch with their places in it.

    >>> [name for name, _ in leaves({"image": torch.zeros(1), "targets": [1, torch.zeros(2)]})]
    ["batch['image']", "batch['targets'][0]", "batch['targets'][1]"]
    """
    if isinstance(batch, Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for f in dataclasses.fields(batch):
            yield from leaves(getattr(batch, f.name), f"{path}.{f.name}")
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        for index, value in enumerate(batch):
            yield from leaves(value, f"{path}[{index}]")
    elif isinstance(batch, (bool, int, float)):
        yield path, torch.tensor(batch)


def copied(tensors: Mapping[str, Tensor | None]) -> Traced:
    """Copies that later steps do not change."""
    return {name: None if t is None else t.detach().clone() for name, t in tensors.items()}


def gradients(model: nn.Module) -> Traced:
    """Copies of ``.grad``."""
    return copied({name: p.grad for name, p in model.named_parameters()})


def random_states() -> Traced:
    """The global random streams as tensors, to be compared."""
    state = RandomState.taken()
    legacy = state.numpy  # (name, 624 words, position, has_gauss, cached)
    return {
        "random state of torch": state.torch,
        "random state of numpy": torch.tensor([*map(int, legacy[1]), int(legacy[2])]),
        "random state of python": torch.tensor([int(x) for x in state.python[1]]),
    }
