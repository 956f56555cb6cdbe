"""How much of a task's own progress another task takes: R, from the losses of branches. Pure functions on arrays.

Checkpoints of one training are measures of one thing, not replicates: a training gives one number, and intervals are
over trainings of several seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe.forks.branches import ForkedTraining, direction_name, step_name, without_name
from gradprobe.statistics import t_interval

_Array = NDArray[np.float64]

_DIGITS = 1e-6
"""Progress below this part of the loss is rounding."""


def lost_part(lost: ArrayLike, own: ArrayLike) -> _Array:
    """The part of a task's own progress that it loses: R, ``mean lost / mean own`` over S trainings; what each adds.

    The divisor is a mean over trainings, so that one of them that makes hardly any progress of its own does no harm.

    Args:
        lost: (S,) in units of the task's loss, such as ``L_joint - L_without``.
        own: (S,) the progress ``L_start - L_without``.

    Returns:
        (S,) dimensionless: values whose mean is R, ``R + (lost - R own) / mean own``; of one training R itself. To the
        first order R depends on a training as their mean does. R is 0 where nothing is lost, 1 where all is, above 1
        where the loss rises, below 0 where the other task helps. NaN: there is no progress, or a loss is not finite.

    >>> lost_part([1.0, 0.5], [2.0, 1.0])
    array([0.5, 0.5])
    """
    lost, own = np.asarray(lost, dtype=np.float64), np.asarray(own, dtype=np.float64)
    if not own.mean() > 0:
        return np.full(own.shape, np.nan)
    ratio = lost.mean() / own.mean()
    result: _Array = ratio + (lost - ratio * own) / own.mean()
    return result


@dataclass(frozen=True)
class LostProgress:
    """What one task takes of another's progress, over S seeds. Arrays have one entry per seed, (S,).

    The parts by direction and by step sum to ``lost``, and there are two ways to part it: in the order in which j's
    second moment goes last, and in that in which it goes first. Far from each other they say that both act together.

    Attributes:
        task: Whose progress; i.
        by: Who takes it; j.
        own: Mean over the checkpoints of ``L_start - L_without``, in units of task i's loss.
        cost: Mean over the checkpoints of ``L_joint - L_without``, in the same units.
        lost: R, see :func:`lost_part`; NaN: undefined.
        given_back: Arm -> R of the training less R of the arm, in such values.
        by_direction: What is lost where steps are as long as j's second moment makes them; the rest of ``lost`` is
            lost by shorter steps. None without controls.
        by_direction_alone: What is lost where j has no part in the second moment. None without controls.
        undefined: Why R is; empty: it is defined.
    """

    task: str
    by: str
    own: _Array
    cost: _Array
    lost: _Array
    given_back: dict[str, _Array]
    by_direction: _Array | None
    by_direction_alone: _Array | None
    undefined: str


def over_seeds(trainings: Sequence[ForkedTraining]) -> list[LostProgress]:
    """Every task's loss of progress to every task that a branch did without.

    R is undefined for a pair where the task's own progress is not well above its noise: where Student's 95 % interval
    of it over the seeds reaches below half of it. With one seed it has to be above 0 alone.
    """
    first = trainings[0]
    return [
        _lost_to(trainings, task, by)
        for by in first.tasks
        if without_name(by) in first.branches
        for task in first.tasks
        if task != by
    ]


def _lost_to(trainings: Sequence[ForkedTraining], task: str, by: str) -> LostProgress:
    first, place = trainings[0], trainings[0].tasks.index(task)

    def mean(of: Callable[[ForkedTraining], _Array]) -> _Array:
        """(S,) of the task's losses over the checkpoints."""
        return np.array([of(training)[:, place].mean() for training in trainings])

    start, joint = mean(lambda training: training.start), mean(lambda training: training.joint)
    ends = {name: mean(lambda training, name=name: training.branches[name]) for name in first.branches}  # type: ignore[misc]
    without = ends[without_name(by)]
    own = start - without
    undefined = _undefined(start, own)

    def part(lost: _Array) -> _Array:
        return np.full(own.shape, np.nan) if undefined else lost_part(lost, own)

    controls = direction_name(by) in ends
    return LostProgress(
        task=task,
        by=by,
        own=own,
        cost=joint - without,
        lost=part(joint - without),
        given_back={name: part(joint - ends[name]) for name in first.arms},
        by_direction=part(joint - ends[direction_name(by)]) if controls else None,
        by_direction_alone=part(ends[step_name(by)] - without) if controls else None,
        undefined=undefined,
    )


def _undefined(start: _Array, own: _Array) -> str:
    """Why R of (S,) losses and own progress is undefined."""
    if not np.isfinite(own).all():
        return "a loss of a branch is not finite"
    mean, low, _ = (float(v) for v in t_interval(own))
    if not mean > _DIGITS * float(np.abs(start).mean()):
        return f"it makes no progress of its own in these steps ({mean:.3g} per checkpoint)"
    if low < mean / 2:
        return f"its own progress is not well above its noise ({mean:.3g} per checkpoint, 95 % from {low:.3g})"
    return ""
