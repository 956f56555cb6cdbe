"""Put beside a probe, it records what the optimizer makes of the gradients that the probe measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from gradprobe.errors import ProbeError
from gradprobe.probes.task_gradients import TaskGradients
from gradprobe.rows import EARLIER_SOURCES, UpdateRow
from gradprobe.updates.clip import Limit, norms, scale_without
from gradprobe.updates.drift import Drift
from gradprobe.updates.optimizer_watch import Measured, OptimizerWatch, Reader
from gradprobe.updates.parameters import everything, squares
from gradprobe.updates.taking_apart import Before, TakenApart


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
        self._following: OptimizerWatch | None = None
        self._row: UpdateRow | None = None
        self._limit = Limit()

    def check(self, tasks: Sequence[str], gradients: TaskGradients) -> None:
        """Whether it can belong to a probe.

        Raises:
            ProbeError: It belongs to one already, or what it needs is not there.
        """
        if self._following is not None:
            raise ProbeError("these Updates belong to another probe; make them anew for each.")
        gradients.keep()

    def open(self, following: OptimizerWatch, model: nn.Module) -> None:
        self._following, self._model, self._drift = following, model, Drift(model)

    def begun(self, at: Measured) -> None:
        """A row, with what is known before the optimizer's step."""
        mean, variance, batches = self._drift.look(at.step)
        self._row = replace(self._empty(at), bn_mean_drift=mean, bn_variance_drift=variance, bn_batches=batches)

    def given(self, at: Measured, before: Before | None) -> None:
        """What was done to the gradient since the backward."""
        if self._row is None or before is None:
            return
        scale = before.scale
        square, *heads = squares([everything(self._model), *at.private])
        found = norms(scale, square, at.gram, at.weights, np.array(heads))
        self._limit.look(found.joint, scale)
        self._row = replace(
            self._row,
            joint_norm=found.joint,
            clip_scale=scale if scale > 0 else math.nan,
            clip_share=found.share,
            clip_scale_without=scale_without(found, scale, self._limit.value),
        )

    def made(self, at: Measured, taken: TakenApart | None) -> None:
        """The update by its sources."""
        if self._row is not None and taken is not None:
            self._row = replace(self._row, parts=taken.parts, effect=taken.effect)

    def done(self, at: Measured, status: str) -> None:
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
        assert self._following is not None, "Updates are used by the probe that they were given to"
        return self._following

    def _empty(self, at: Measured) -> UpdateRow:
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
