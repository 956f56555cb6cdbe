"""What the optimizer makes of the gradients that a probe measures: clipping by task, and the update that was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.task_gradients import TaskGradients
from gradprobe.rows import EARLIER_SOURCES, UpdateRow
from gradprobe.updates.drift import Drift
from gradprobe.updates.heads import all_parameters, gradient_squares
from gradprobe.updates.optimizer_watch import MeasuredStep, OptimizerWatch, Reader
from gradprobe.updates.taking_apart import TakenApart, UpdateBefore

_UNCLIPPED = 1e-4
"""A scale so near 1 is that of rounding."""

_SAME_LIMIT, _SIGHTINGS = 1e-4, 3
"""How far norms after clipping may be apart, relatively, and how many are needed, to be one limit."""

_UNEXPLAINED = 1e-2
"""How much of the squared norm the tasks' parts may leave out, beyond which they are unknown."""


@dataclass(frozen=True)
class _JointNorms:
    """The joint gradient before it was clipped.

    Attributes:
        joint: Its Euclidean norm over all of the model's parameters, in loss per unit of parameter.
        share: (T,) <w_i g_i, g> / <g, g>: a task's part in the square of ``joint``. They sum to 1.
        own: (T,) squared norms of the weighted task gradients.
    """

    joint: float
    share: Array
    own: Array


def _joint_norms(scale: float, square: float, gram: Array, weight: Array, private: Array) -> _JointNorms:
    """The norm of the joint gradient, and each task's part in it.

    Args:
        scale: What the gradient was multiplied with since the backward, all of it alike.
        square: Squared norm of ``.grad`` over all parameters, as the optimizer finds it.
        gram: (L, T, T) of the unweighted task gradients; NaN where a task does not reach a layer.
        weight: (T,).
        private: (T,) squared norm of ``.grad`` on what a task alone reaches.

    Returns:
        The parts are NaN where they do not explain the norm: something else has a gradient too.
    """
    tasks = len(weight)
    if not (scale > 0 and math.isfinite(square)):
        return _JointNorms(math.nan, np.full(tasks, np.nan), np.full(tasks, np.nan))
    joint = square / scale**2
    weighted = np.nansum(gram, axis=0).reshape(tasks, tasks) * np.outer(weight, weight)
    heads = np.asarray(private, dtype=np.float64) / scale**2
    own = np.diagonal(weighted) + heads
    share = (weighted.sum(axis=1) + heads) / joint if joint else np.full(tasks, np.nan)
    if not abs(share.sum() - 1) <= _UNEXPLAINED:
        share = own = np.full(tasks, np.nan)
    return _JointNorms(math.sqrt(joint), share, own)


def _scale_without(norms: _JointNorms, scale: float, limit: float | None) -> Array:
    """What the scale would have been had each task been absent: (T,).

    Args:
        norms: From :func:`_joint_norms`.
        scale: That was.
        limit: Beyond which norms are clipped; None: unknown.

    Returns:
        In [0, 1]; NaN where it is unknown.
    """
    with np.errstate(invalid="ignore"):
        rest = np.sqrt(np.maximum(norms.joint**2 * (1 - 2 * norms.share) + norms.own, 0.0))
    if limit is None:
        fits = (scale > 1 - _UNCLIPPED) & (rest <= norms.joint)
        return np.where(fits, 1.0, np.nan)
    with np.errstate(divide="ignore"):
        return np.where(np.isnan(rest), np.nan, np.minimum(1.0, limit / rest))


class _ClipLimit:
    """Finds out at which norm a training clips: the norm after clipping, where it is the same at three clipped steps.

    A scale below 1 may have other reasons, such as a mean over tasks, under which that norm changes from step to step.

    Attributes:
        value: The limit; None: none is known.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self._seen: list[float] = []

    def look(self, norm: float, scale: float) -> None:
        """At one step's norm before clipping, and its scale."""
        clipped = norm * scale
        if not math.isfinite(clipped) or scale > 1 - _UNCLIPPED:
            return
        self._seen = [*self._seen[1 - _SIGHTINGS :], clipped]
        same = len(self._seen) == _SIGHTINGS and max(self._seen) - min(self._seen) <= _SAME_LIMIT * clipped
        self.value = clipped if same else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "seen": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self._seen = state["value"], list(state["seen"])


class Updates(Reader):
    """What the optimizer makes of the gradients, at the steps at which a probe measures them.

    Clipping and each task's part in it; steps that changed nothing; how far BatchNorm's running statistics moved; and
    the update that was really made, after momentum and preconditioning, taken apart by task: each task's share of it,
    the cosine between the tasks' parts, and what each part changes each task's loss by, to first order.

    The update can be taken apart for SGD, Adam and AdamW in their common forms; of others everything else is recorded.
    Momentum from steps that were not measured is a part of its own: at ``every=1`` it dies away after the first steps;
    measured every k-th step, with momentum m, tasks explain about (1 - m) / (1 - m^k) of the moment.

    It costs no backward pass: the probe's gradients are kept until the optimizer's step, with T + 2 first moments and
    one copy of the shared parameters. Nothing of the training changes.

    Example:
        >>> probe = attach(model, ("det", "cls"), "run.h5", optimizer=optimizer, updates=True)  # doctest: +SKIP
    """

    name = "updates"

    def __init__(self) -> None:
        self._watch: OptimizerWatch | None = None
        self._row: UpdateRow | None = None
        self._limit = _ClipLimit()

    def check(self, tasks: Sequence[str], gradients: TaskGradients) -> None:
        """Whether it can belong to a probe.

        Raises:
            ProbeError: It belongs to one already, or what it needs is not there.
        """
        if self._watch is not None:
            raise ProbeError("these Updates belong to another probe; make them anew for each.")
        gradients.keep()

    def open(self, watch: OptimizerWatch, model: nn.Module) -> None:
        self._watch, self._model, self._drift = watch, model, Drift(model)

    def step_measured(self, at: MeasuredStep) -> None:
        """A row, with what is known before the optimizer's step."""
        mean, variance, batches = self._drift.look(at.step)
        self._row = replace(self._empty(at), bn_mean_drift=mean, bn_variance_drift=variance, bn_batches=batches)

    def before_update(self, at: MeasuredStep, before: UpdateBefore | None) -> None:
        """What was done to the gradient since the backward."""
        if self._row is None or before is None:
            return
        scale = before.scale
        square, *heads = gradient_squares([all_parameters(self._model), *at.private])
        found = _joint_norms(scale, square, at.gram, at.weights, np.array(heads))
        self._limit.look(found.joint, scale)
        self._row = replace(
            self._row,
            joint_norm=found.joint,
            clip_scale=scale if scale > 0 else math.nan,
            clip_share=found.share,
            clip_scale_without=_scale_without(found, scale, self._limit.value),
        )

    def after_update(self, at: MeasuredStep, taken: TakenApart | None) -> None:
        """The update by its sources."""
        if self._row is not None and taken is not None:
            self._row = replace(self._row, parts=taken.parts, effect=taken.effect)

    def step_over(self, at: MeasuredStep, status: str) -> None:
        """Hand the row on."""
        row = self._row or self._empty(at)
        self._row = None
        self._now.now.report.row(replace(row, status=status, calls=at.calls, skipped=at.skipped, overhead=self.seconds))

    def state_dict(self) -> dict[str, Any]:
        return {"limit": self._limit.state_dict(), "drift": self._drift.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "limit" in state:
            self._limit.load_state_dict(state["limit"])
            self._drift.load_state_dict(state["drift"])
        self._row = None

    @property
    def _now(self) -> OptimizerWatch:
        assert self._watch is not None, "Updates are used by the probe that they were given to"
        return self._watch

    def _empty(self, at: MeasuredStep) -> UpdateRow:
        layers, tasks = len(self._now.shared.layers), len(at.weights)
        sources = tasks + len(EARLIER_SOURCES)
        return UpdateRow(
            step=at.step,
            epoch=at.epoch,
            time=at.time,
            joint_norm=math.nan,
            clip_scale=math.nan,
            clip_share=np.full(tasks, np.nan),
            clip_scale_without=np.full(tasks, np.nan),
            calls=0,
            skipped=at.skipped,
            bn_mean_drift=math.nan,
            bn_variance_drift=math.nan,
            bn_batches=math.nan,
            parts=np.full((layers, sources, sources), np.nan),
            effect=np.full((layers, tasks, sources), np.nan),
            status=at.status,
        )
