"""One task alone: the control that defines interference, which is what the other task changes.

The other task's loss has weight 0. In the bundled trainer that is the same as its absence: there is one forward,
BatchNorm sees the same batches, nothing is drawn from a shared random stream, a zero gradient moves only the other's
own head, and a loss that is not finite ends the training instead of turning into 0 times infinity. The probe still
sees what the other task would have asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gradprobe.trainers.balancer import Balancer, Setup
from gradprobe.trainers.joint import Joint


class Single(Joint):
    """Weight 1 for one task, 0 for the others.

    Args:
        tasks: All of them.
        task: The one that is trained.
    """

    def __init__(self, tasks: Sequence[str], task: str) -> None:
        super().__init__({name: float(name == task) for name in tasks})

    @classmethod
    def create(cls, model: nn.Module, setup: Setup) -> Balancer:
        """With ``--task``."""
        return cls(setup.tasks, setup.settings.task)
