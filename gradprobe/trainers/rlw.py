"""Random loss weighting: a control that any learned weighting has to beat.

Lin, Ye, Zhang, Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
TMLR 2022, arXiv:2111.10603.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradprobe.trainers.balancer import Balancer, Setup, restored_tensor


class RLW(Balancer):
    """``w = T softmax(z)``, z drawn from a standard normal distribution at every step.

    Args:
        tasks: Names.
        seed: Of a generator of its own, so that it draws nothing that data or dropout would have drawn.
    """

    def __init__(self, tasks: Sequence[str], seed: int = 0) -> None:
        self._tasks = tuple(tasks)
        self._generator = torch.Generator().manual_seed(seed)
        self._draw()

    def _draw(self) -> None:
        z = torch.randn(len(self._tasks), generator=self._generator, dtype=torch.float64)
        self._weight = len(self._tasks) * torch.softmax(z, 0)

    def weights(self) -> dict[str, float]:
        """Task -> weight; above 0, summing to T."""
        return dict(zip(self._tasks, self._weight.tolist(), strict=True))

    def update(self, losses: Mapping[str, Tensor]) -> None:
        """Draw the next step's."""
        self._draw()

    def state_dict(self) -> dict[str, Any]:
        """The weights and the generator."""
        return {"weight": self._weight.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._weight = restored_tensor(state, "weight", self._weight)
        self._generator.set_state(state["generator"].cpu())

    @classmethod
    def create(cls, model: nn.Module, setup: Setup) -> Balancer:
        """With ``--seed``."""
        return cls(setup.tasks, setup.settings.seed)
