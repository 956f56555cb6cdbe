"""Joint training with static weights: the baseline that every remedy is compared with.

With weights read from an earlier run it is `gradnorm-static`, which separates the level of GradNorm's weights from
their motion.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from gradprobe.trainers.balancer import Balancer, Setup, check_static


class Joint(Balancer):
    """Weights that never change.

    Args:
        weights: Task -> weight.

    Raises:
        UsageError: A weight is negative or not finite, or all are zero.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = check_static(weights)

    def weights(self) -> dict[str, float]:
        """The weights given at the start."""
        return dict(self._weights)

    def update(self, losses: Mapping[str, Tensor]) -> None:
        """Nothing to do."""

    @classmethod
    def create(cls, model: nn.Module, setup: Setup) -> Balancer:
        """With ``--task-weights``."""
        return cls(setup.static)
