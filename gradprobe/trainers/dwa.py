"""Dynamic weight average: more weight for a task whose loss falls more slowly from epoch to epoch.

Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, arXiv:1803.10704, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradprobe.errors import UsageError
from gradprobe.trainers.balancer import Balancer, Setup, loss_values, restored_count, restored_tensor


class DWA(Balancer):
    """``w_i = T softmax(r_i / temperature)`` with ``r_i = L_i(e - 1) / L_i(e - 2)``, L the mean loss of an epoch.

    The weights are 1 for two epochs, and then change from epoch to epoch.

    Args:
        tasks: Names.
        steps_per_epoch: How many updates make one epoch.
        temperature: Above 0; the larger, the more even the weights. The paper uses 2.

    Raises:
        UsageError: The temperature or the number of steps is not above 0.
    """

    def __init__(self, tasks: Sequence[str], steps_per_epoch: int, *, temperature: float = 2.0) -> None:
        if steps_per_epoch < 1 or not temperature > 0:
            raise UsageError(f"DWA: {steps_per_epoch} steps per epoch and temperature {temperature} must be above 0.")
        self._tasks, self._steps, self._temperature = tuple(tasks), steps_per_epoch, temperature
        self._sum = torch.zeros(len(self._tasks), dtype=torch.float64)
        self._seen, self._counted = 0, 0  # of the present epoch: updates, and those with finite losses
        self._means: list[Tensor] = []  # of the last two epochs

    def weights(self) -> dict[str, float]:
        """Task -> weight; above 0, summing to T."""
        rate = torch.ones(len(self._tasks), dtype=torch.float64)
        if len(self._means) == 2 and all(mean.isfinite().all() and (mean > 0).all() for mean in self._means):
            rate = self._means[1] / self._means[0]
        weight = len(self._tasks) * torch.softmax(rate / self._temperature, 0)
        return dict(zip(self._tasks, weight.tolist(), strict=True))

    def update(self, losses: Mapping[str, Tensor]) -> None:
        """Count the losses in; a step with one that is not finite is left out of the mean."""
        values = loss_values(losses, self._tasks)
        if values.isfinite().all():
            self._sum += values
            self._counted += 1
        self._seen += 1
        if self._seen == self._steps:
            self._means = [*self._means[-1:], self._sum / self._counted]
            self._sum, self._seen, self._counted = torch.zeros_like(self._sum), 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The means of the last two epochs, and the sum of the present one."""
        return {"sum": self._sum.clone(), "seen": self._seen, "counted": self._counted, "means": list(self._means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum, self._seen, self._counted = (
            restored_tensor(state, "sum", self._sum),
            restored_count(state, "seen"),
            restored_count(state, "counted"),
        )
        if not self._counted <= self._seen < self._steps or len(state["means"]) > 2:
            raise ValueError(f"seen is {self._seen}, counted {self._counted}, of {self._steps} steps")
        self._means = [restored_tensor({"mean": mean}, "mean", self._sum, finite=False) for mean in state["means"]]

    @classmethod
    def create(cls, model: nn.Module, setup: Setup) -> Balancer:
        """With ``--dwa-temperature``."""
        return cls(setup.tasks, setup.steps_per_epoch, temperature=setup.settings.dwa_temperature)
