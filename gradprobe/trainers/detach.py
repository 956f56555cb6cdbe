"""The classification head learns from a detached trunk, which detection alone shapes.

No gradient can interfere, by construction: a control for what the second task's gradients do to the first. The tasks
share no layer then, and the run file holds none: interference is not applicable, which is not the same as 0.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gradprobe.trainers.balancer import Setup
from gradprobe.trainers.joint import Joint
from gradprobe.trainers.settings import Settings


class Detach(Joint):
    """Static weights, on a model whose classification head sends no gradient into the trunk."""

    @classmethod
    def divides(cls, settings: Settings) -> bool:
        """Always."""
        return True

    @classmethod
    def prepare(cls, model: Any, setup: Setup) -> nn.Module:
        """The same model, its classification head detached."""
        model.detached = True
        return model  # type: ignore[no-any-return]
