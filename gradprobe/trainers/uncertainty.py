"""Weights learned as the inverse of each task's noise.

Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics",
CVPR 2018, arXiv:1705.07115.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradprobe.errors import UsageError
from gradprobe.trainers.balancer import Balancer, Setup, check_static, loss_values, restored_tensor
from gradprobe.trainers.optim import restore_optimizer


class Uncertainty(Balancer):
    """Minimises ``sum_i exp(-s_i) L_i + s_i / 2`` over ``s_i = log sigma_i^2`` too; the weight is ``exp(-s_i)``.

    That is the paper's form for a classification loss (its equation 10), used for both tasks, because YOLOv5's
    detection loss is no Gaussian likelihood either. At rest the weight is ``1 / (2 L_i)``.

    Args:
        initial: Task -> first weight, above 0.
        lr: Of an Adam of its own without decay, so that the model's learning rate and decay do not move the weights.

    Raises:
        UsageError: A first weight is not above 0 or not finite.
    """

    def __init__(self, initial: Mapping[str, float], *, lr: float = 0.025) -> None:
        weights = check_static(initial)
        if not all(weights.values()):
            raise UsageError(f"task weights {dict(initial)}: `uncertainty` starts from weights above 0.")
        self._tasks = tuple(weights)
        self._log_variance = nn.Parameter(-torch.tensor(list(weights.values()), dtype=torch.float64).log())
        self._optimizer = torch.optim.Adam([self._log_variance], lr=lr)

    def weights(self) -> dict[str, float]:
        """Task -> ``exp(-s)``, above 0."""
        return dict(zip(self._tasks, (-self._log_variance.detach()).exp().tolist(), strict=True))

    def update(self, losses: Mapping[str, Tensor]) -> None:
        """One step of Adam on s. A step with a loss that is not finite moves nothing."""
        values = loss_values(losses, self._tasks)
        if not values.isfinite().all():
            return
        self._log_variance.grad = 0.5 - (-self._log_variance.detach()).exp() * values
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The log variances and Adam's moments."""
        return {"log_variance": self._log_variance.detach().clone(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self._log_variance.copy_(restored_tensor(state, "log_variance", self._log_variance))
        restore_optimizer(self._optimizer, state["optimizer"])

    @classmethod
    def create(cls, model: nn.Module, setup: Setup) -> Balancer:
        """From ``--task-weights``."""
        return cls(setup.static)
