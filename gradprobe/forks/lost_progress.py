"""How much of a task's own progress another task takes: R, from the losses of branches. Pure functions on arrays.

Checkpoints of one training are measures of one thing, not replicates: a training gives one number, and intervals are
over trainings of several seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe.forks.branches import ForkedTraining, direction_name, step_name, without_name
from gradprobe.statistics import t_interval

_Array = NDArray[np.float64]

_DIGITS = 1e-6
"""Progress below this part of the loss is rounding."""


def lost_part(start: ArrayLike, with_it: ArrayLike, without: ArrayLike) -> float:
    """The part of a task's own progress that another task takes: ``sum(with - without) / sum(start - without)``.

    Args:
        start: (K,) the task's losses at the checkpoints.
        with_it: (K,) after the steps of a branch with the other task.
        without: (K,) after those of a branch without it.

    Returns:
        Dimensionless. 0: takes nothing; 1: takes all; above 1: the loss rises; below 0: the other task helps. NaN:
        a loss is not finite, or the task makes no progress of its own.

    >>> lost_part([1.0, 0.75], [0.75, 0.5], [0.5, 0.25])
    0.5
    """
    start, with_it, without = (np.asarray(v, dtype=np.float64) for v in (start, with_it, without))
    own = float((start - without).sum())
    if not own > _DIGITS * float(np.abs(start).sum()):
        return math.nan
    return float((with_it - without).sum()) / own


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
        given_back: Arm -> R of the training less R of the arm.
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

    R is undefined for a pair, in all seeds, where the task's own progress is not above its noise: where Student's 95 %
    interval of it over the seeds reaches 0, or one seed has none. With one seed it has to be above 0 alone.
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
    place = trainings[0].tasks.index(task)
    start, joint = (np.array([getattr(t, name)[:, place] for t in trainings]) for name in ("start", "joint"))
    ends = {name: np.array([t.branches[name][:, place] for t in trainings]) for name in trainings[0].branches}
    without = ends[without_name(by)]

    def part(worse: _Array, better: _Array) -> _Array:
        """Of the task's own progress, what lies between two branches."""
        return np.array([lost_part(s, w + b - r, w) for s, b, r, w in zip(start, worse, better, without, strict=True)])

    own = (start - without).mean(axis=1)
    undefined = _undefined(start, own)
    known = np.nan if undefined else 1.0
    controls = direction_name(by) in ends
    arms = [name for name in ends if name in trainings[0].arms]
    return LostProgress(
        task=task,
        by=by,
        own=own,
        cost=(joint - without).mean(axis=1),
        lost=known * part(joint, without),
        given_back={name: known * part(joint, ends[name]) for name in arms},
        by_direction=known * part(joint, ends[direction_name(by)]) if controls else None,
        by_direction_alone=known * part(ends[step_name(by)], without) if controls else None,
        undefined=undefined,
    )


def _undefined(start: _Array, own: _Array) -> str:
    """Why R of (S, K) losses and the own progress (S,) is undefined."""
    if not np.isfinite(own).all():
        return "a loss of a branch is not finite"
    mean, low, _ = (float(v) for v in t_interval(own))
    if none := int((own <= _DIGITS * np.abs(start).mean(axis=1)).sum()):
        return f"it makes no progress of its own in {none} of {len(own)} seeds ({mean:.3g} per checkpoint on average)"
    if low <= 0:
        return f"its own progress is not above its noise ({mean:.3g} per checkpoint, 95 % from {low:.3g})"
    return ""
