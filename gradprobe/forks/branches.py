"""The branches that are taken from checkpoints of a training, and the losses at which they ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]
Weights = Mapping[str, float]


@dataclass(frozen=True)
class ForkOptions:
    """What to do.

    Attributes:
        steps: Of the training.
        checkpoints: From how many of its states branches are taken; spread evenly.
        horizon: Steps of a branch. Branches of two checkpoints do not overlap.
        without: Tasks that a branch is to do without, one at a time; empty: every one.
        arms: Name -> static weights of all tasks, each a branch.
        controls: Whether to take the two branches per task that exchange Adam's second moments.
    """

    steps: int = 200
    checkpoints: int = 4
    horizon: int = 20
    without: Sequence[str] = ()
    arms: Mapping[str, Weights] = field(default_factory=dict)
    controls: bool = False

    def places(self) -> list[int]:
        """The steps before which branches are taken.

        >>> ForkOptions(steps=100, checkpoints=4, horizon=20).places()
        [10, 30, 50, 70]
        """
        room = self.steps - self.horizon
        return [int((k + 0.5) * room / self.checkpoints) for k in range(self.checkpoints)]


@dataclass(frozen=True)
class Branch:
    """A way to go on from a checkpoint.

    Attributes:
        name: See :func:`without_name` and its like; of an arm, that of the arm.
        weights: Of the gradients, and of the history.
        second: Of the gradients that make Adam's second moment, before and within the branch, where they are others.
    """

    name: str
    weights: Weights
    second: Weights | None = None


def without_name(task: str) -> str:
    """The branch in which a task has weight 0.

    >>> without_name("cls")
    'without cls'
    """
    return f"without {task}"


def direction_name(task: str) -> str:
    """The branch without a task's gradient, in which steps stay as long as its second moment makes them."""
    return f"without {task}, second moment with it"


def step_name(task: str) -> str:
    """The branch with all gradients, in which a task has no part in the second moment."""
    return f"joint, second moment without {task}"


@dataclass
class ForkedTraining:
    """What one training and its branches came to. K checkpoints, T tasks; losses are of the fixed held-out samples.

    Attributes:
        tasks, weights: T names; of the training.
        places: (K,) steps made before each checkpoint.
        horizon: Steps of a branch.
        start: (K, T) losses at the checkpoints.
        joint: (K, T) after ``horizon`` more steps of the training as it is.
        branches: Name -> (K, T), after as many on the same batches.
        arms: Names of the branches with other weights.
        shadow_cost: Time of a step that keeps shadow moments over that of a plain one, a ratio of medians.
        state_error: How far the shadows' state at the training's own weights was from the optimizer's, see
            :meth:`gradprobe.forks.shadow_moments.ShadowMoments.error`; the largest of all checkpoints.
        same_twice: The largest difference of a loss between the training as it is and a branch of it, over how much
            that loss moved; 0 where nothing but the named state decides a step.
    """

    tasks: tuple[str, ...]
    weights: dict[str, float]
    places: list[int]
    horizon: int
    start: Losses
    joint: Losses
    branches: dict[str, Losses]
    arms: tuple[str, ...]
    shadow_cost: float
    state_error: float
    same_twice: float
