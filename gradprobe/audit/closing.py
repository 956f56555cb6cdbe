"""What it is to hold a door shut: a place in the step for every kind of intervention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from gradprobe.audit.arm import Arm


class Closing:
    """One door held shut in one arm; does nothing by itself.

    Attributes:
        acted: In how many places of the training it changed something. A closing that never acted in either arm says
            that there was nothing to shut.
    """

    acted = 0

    def around(self, arm: Arm) -> AbstractContextManager[Any]:
        """Is entered around each step, the fetching of its batch included."""
        return nullcontext()

    def batch(self, arm: Arm, batch: Any) -> Any:
        """The batch that the step function gets."""
        return batch

    def losses(self, arm: Arm, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses that the step function goes on with."""
        return losses

    def after_backward(self, arm: Arm) -> None:
        """``.grad`` may be changed; called after each backward, and before the optimizer where there was none."""

    def before_optimizer(self, arm: Arm, optimizer: Optimizer) -> None:
        """``.grad`` may be changed, after clipping and unscaling."""

    def optimize(self, arm: Arm, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
        """Make the optimizer's step, or another."""
        return step()

    def clear(self, arm: Arm, zero_grad: Callable[[], Any]) -> Any:
        """Clear the gradients, or not."""
        return zero_grad()

    def decide(self, arm: Arm, name: str, value: bool) -> bool:
        """The decision to follow."""
        return value

    def finish(self, arm: Arm) -> None:
        """The step function has returned."""


@dataclass(frozen=True)
class Door:
    """A way by which a task can change another.

    Attributes:
        name: One word or two, for programs.
        title: What happens, in a few words.
        remedy: How to shut it for good.
        close: Makes a closing for one arm.
        stages: Those in which a difference that it makes is seen first. A closing may hide another door's difference
            (in BatchNorm's evaluation mode gradients may be too small to be clipped); where it shows tells them apart.
        intrusive: Whether holding it shut makes another training of it. Such a door is opened again first.
        others: More ways to hold it shut, which have to take a difference away too: in a training of other random
            numbers another door's difference may happen not to show.
    """

    name: str
    title: str
    remedy: str
    close: Callable[[], Closing]
    stages: tuple[str, ...]
    intrusive: bool = False
    others: tuple[Callable[[], Closing], ...] = ()
