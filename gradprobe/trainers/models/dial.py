"""The model of the dial problem: shared linear layers, and a shift of its own for each task."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprobe.errors import UsageError

TARGET = 2.0
"""What every output is to reach."""

BEND = 0.5
"""How far before the target the loss leaves its straight line; up to there gradients are constant."""

REACH = 0.3
"""What a head's number counts: its gradient is so much shorter than that of the trunk, which is to decide the task."""


class Shift(nn.Module):
    """The head of a task: a number that is added, times :data:`REACH`."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """Of any shape."""
        return features + REACH * self.bias


class DialModel(nn.Module):
    """``output_i = sum over layers of w . x_i + shift_i``, where x_i is what task i sees of a sample.

    The loss of a sample is Huber's, of the distance to :data:`TARGET`: a straight line, until the output is within
    :data:`BEND` of the target. So task i's gradient on a layer is minus the mean of the x_i times the task's scale,
    whatever the parameters are: it has the same length and direction throughout a training that has not come so far.

    Args:
        layers: Number of shared layers.
        dim: Parameters of each.
        scales: Of each task's loss.
        seed: Of the small initial weights.
    """

    tasks = ("a", "b")

    def __init__(self, layers: int, dim: int, scales: tuple[float, float], seed: int) -> None:
        super().__init__()
        self._scales = scales
        self.blocks = nn.ModuleList(nn.utils.skip_init(nn.Linear, dim, 1, bias=False) for _ in range(layers))
        self.second = nn.ModuleDict()
        self.heads = nn.ModuleDict({task: Shift() for task in self.tasks})
        stream = torch.Generator().manual_seed(seed % 2**63)
        with torch.no_grad():
            for block in self.blocks:
                nn.init.normal_(next(block.parameters()), 0.0, 0.02, generator=stream)
        self.detached = False
        self.scaled_hyp: dict[str, float] = {}

    @property
    def trunk(self) -> tuple[str, ...]:
        """Names of the layers that both tasks use."""
        return tuple(f"blocks.{index}" for index in range(len(self.blocks)))

    @property
    def last_shared_layer(self) -> str:
        """The one that GradNorm looks at."""
        return self.trunk[-1]

    @property
    def doubled(self) -> tuple[str, ...]:
        """Layers of which task b has a copy of its own."""
        return tuple(f"blocks.{index}" for index in self.second)

    def trunk_layers(self, imgsz: int) -> tuple[str, ...]:
        """The layers of the trunk; ``imgsz`` means nothing here."""
        return self.trunk

    def divide(self, doubled: Collection[str]) -> DialModel:
        """This model, with a copy of some layers for task b.

        Raises:
            UsageError: Nothing to double.
        """
        if not doubled:
            raise UsageError("no layer of the trunk is to be doubled; that is the joint model: --trainer joint")
        for name in doubled:
            self.second[name.rpartition(".")[2]] = copy.deepcopy(self.get_submodule(name))
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Task -> outputs (B,) of samples (B, 2, layers, dim)."""
        a = sum(block(images[:, 0, index]) for index, block in enumerate(self.blocks))
        b = sum(self._for_b(index)(images[:, 1, index]) for index in range(len(self.blocks)))
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        features = {"a": a, "b": b.detach() if self.detached else b}
        return {task: self.heads[task](features[task])[:, 0] for task in self.tasks}

    def _for_b(self, index: int) -> nn.Module:
        return self.second[str(index)] if str(index) in self.second else self.blocks[index]

    def losses(self, outputs: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """Task -> the mean over the samples."""
        return {task: loss.mean() for task, loss in self.sample_losses(outputs).items()}

    def sample_losses(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Task -> the loss of each sample, (B,)."""
        return {
            task: scale * F.huber_loss(output, torch.full_like(output, TARGET), reduction="none", delta=BEND) / BEND
            for scale, (task, output) in zip(self._scales, outputs.items(), strict=True)
        }
