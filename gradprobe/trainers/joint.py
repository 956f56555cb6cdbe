"""Joint training with static weights: the baseline that every remedy is compared with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradprobe.trainers.balancer import Balancer


class Joint(Balancer):
    """Weights that never change.

    Args:
        weights: Task -> weight.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)

    def weights(self) -> dict[str, float]:
        """The weights given at the start."""
        return dict(self._weights)

    def update(self, losses: Mapping[str, Tensor]) -> None:
        """Nothing to do."""
