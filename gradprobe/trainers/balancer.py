"""What a trainer adds to the common loop: the weights of the tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Balancer(ABC):
    """Decides how much each task weighs at each step.

    The loop asks for :meth:`weights` first, hands the losses to :meth:`update` while their graph is alive, and then
    makes the joint backward with the weights it was given. So an update at step t acts from step t + 1 on.
    """

    @abstractmethod
    def weights(self) -> dict[str, float]:
        """Task -> weight in force at the present step."""

    @abstractmethod
    def update(self, losses: Mapping[str, Tensor]) -> None:
        """Look at this step's losses and decide the weights of the next step. Must leave ``.grad`` alone."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - one without state needs nothing
        """Go on where another balancer of this kind stopped."""
