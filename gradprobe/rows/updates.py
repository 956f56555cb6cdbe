"""The rows of what the optimizer made of the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.measures import Array
from gradprobe.rows.layers import stacked
from gradprobe.rows.table import (
    COSINE,
    EARLIER_SOURCES,
    LENGTH,
    MEASURED,
    SOURCE,
    WHOSE_UPDATE,
    RowBatch,
    Table,
    common_fields,
    field,
    overhead_field,
    status_field,
)


class _Updates(RowBatch):
    """Rows on updates, by S sources: the tasks, then :data:`EARLIER_SOURCES`."""

    @cached_property
    def parts(self) -> Array:
        """(n, L, S, S)."""
        sources = self.tasks + len(EARLIER_SOURCES)
        return self.stacked("parts", sources, sources)

    @cached_property
    def none(self) -> NDArray[np.bool_]:
        """(n, L, S): the source has no part on the layer."""
        measured = np.array([row.status == MEASURED for row in self.rows], dtype=bool)
        lacks: NDArray[np.bool_] = np.isnan(np.diagonal(self.parts, axis1=2, axis2=3)) & measured[:, None, None]
        return lacks

    @cached_property
    def reached(self) -> NDArray[np.bool_]:
        """(n, L, T)."""
        held = stacked([self.reach[: len(row.parts)] for row in self.rows], (self.layers, self.tasks), fill=False)
        return np.asarray(held & ~self.none[..., : self.tasks])

    @cached_property
    def own(self) -> Array:
        """(n, L, T, T) of the tasks' parts; NaN where a task does not reach the layer."""
        reach, tasks = self.reached, self.tasks
        return np.where(reach[..., :, None] & reach[..., None, :], self.parts[..., :tasks, :tasks], np.nan)

    @cached_property
    def shared(self) -> tuple[Array, Array]:
        """Norms (n, T) and cosines (n, P) over the layers that several tasks reach."""
        return measures.over_layers(self.own, measures.by_several(self.reached))

    @property
    def together(self) -> Array:
        """Parts over those layers: (n, S, S).

        A source that has no part on some of them adds nothing there; NaN where it has one on none of them, and where
        there is no such layer.
        """
        layers: NDArray[np.bool_] = np.any(measures.by_several(self.reached), axis=-1)
        some: NDArray[np.bool_] = np.any(~self.none & layers[..., None], axis=1)
        nothing = self.none & some[:, None]
        counted = np.where(nothing[..., :, None] | nothing[..., None, :], 0.0, self.parts)
        total = np.where(layers[..., None, None], counted, 0.0).sum(axis=1)
        return np.where(np.any(layers, axis=1)[:, None, None], total, np.nan)


UPDATES = Table(
    "updates",
    "update",
    (
        *common_fields(WHOSE_UPDATE),
        field(
            "joint_norm",
            "step",
            "<f4",
            "Euclidean norm of the weighted joint gradient over all that is trained, before clipping; NaN: unknown",
            "loss per unit of parameter",
            **LENGTH,
        ),
        field("clip_scale", "step", "<f4", "what the gradient was multiplied with before the update; 1: not clipped"),
        field(
            "clip_share",
            "step task",
            "<f4",
            "the task's part in the square of joint_norm; sums to 1; below 0: it made the norm smaller; NaN: unknown",
        ),
        field(
            "clip_scale_without", "step task", "<f4", "what clip_scale would have been without the task; NaN: unknown"
        ),
        field("calls", "step", "<i4", "calls of the probe that this update followed; 0: none"),
        field("skipped", "step", "<i4", "steps of the run so far that changed nothing"),
        field(
            "bn_mean_drift",
            "step",
            "<f4",
            "root mean square change of BatchNorm's running means since the row before, in running standard deviations",
        ),
        field(
            "bn_variance_drift",
            "step",
            "<f4",
            "root mean square change of the logarithm of BatchNorm's running variances since the row before",
        ),
        field("bn_batches", "step", "<f4", "most batches per step that one BatchNorm averaged since the row before"),
        field(
            "update_norm",
            "step layer task",
            "<f4",
            "Euclidean norm of the task's part of the update; 0: exactly zero; NaN: none or not told apart",
            "unit of parameter",
            of=lambda batch: measures.norm(batch.own),
            export="update_layers",
            **LENGTH,
        ),
        field(
            "cosine",
            "step layer pair",
            "<f4",
            "cosine of the angle between two tasks' parts of the update; NaN: one is zero, missing or not told apart",
            of=lambda batch: measures.pair_cosine(batch.own),
            export="update_cosines",
            **COSINE,
        ),
        field(
            "shared_update_norm",
            "step task",
            "<f4",
            "update_norm over all layers that the task reaches",
            "unit of parameter",
            of=lambda batch: batch.shared[0],
            **LENGTH,
        ),
        field(
            "shared_cosine",
            "step pair",
            "<f4",
            "cosine over all layers that both tasks reach",
            of=lambda batch: batch.shared[1],
            **COSINE,
        ),
        field(
            "share",
            "step layer source",
            "<f4",
            "inner product of a part of the update with all of it, over the square of all of it; sums to 1",
            of=lambda batch: measures.share(batch.parts),
            export="update_shares",
        ),
        field(
            "shared_share",
            "step source",
            "<f4",
            "share over all shared layers together",
            of=lambda batch: measures.share(batch.together),
        ),
        field(
            "effect",
            "step layer task source",
            "<f4",
            "change of the task's unweighted loss that the part of the update on the layer makes, to first order; NaN: "
            "the task does not reach the layer, or not told apart",
            "loss",
            export="update_effects",
        ),
        overhead_field(),
        status_field("taken apart"),
    ),
    _Updates,
    names=(SOURCE,),
)


@dataclass(frozen=True)
class UpdateRow:
    """What the optimizer made of the gradients of one step.

    The update is taken apart by S sources: the tasks, then :data:`gradprobe.rows.EARLIER_SOURCES`. What is not known is
    NaN.

    Attributes:
        step, epoch, time, overhead: As in :class:`gradprobe.rows.Row`.
        status: ``MEASURED``, or the reason why the update is not taken apart.
        joint_norm: Norm of the joint gradient over all that the optimizer trains, before it was clipped.
        clip_scale: By what the gradient was multiplied between the backward and the optimizer; 1: not clipped.
        clip_share: (T,) each task's part in the square of ``joint_norm``; they sum to 1.
        clip_scale_without: (T,) what ``clip_scale`` would have been had the task been absent.
        calls: Of the probe, for this update.
        skipped: Steps so far that changed nothing.
        bn_mean_drift, bn_variance_drift, bn_batches: Of running statistics since the row before; see
            :mod:`gradprobe.updates.drift`.
        parts: (L, S, S) inner products of the parts of the update, in (unit of parameter)^2.
        effect: (L, T, S) inner products of each unweighted task gradient with each part: what the part changes the
            task's loss by, to first order.
    """

    table: ClassVar[Table] = UPDATES
    by_layer: ClassVar = ("parts", "effect")
    brings: ClassVar = (UPDATES.name,)

    step: int
    epoch: int
    time: float
    joint_norm: float
    clip_scale: float
    clip_share: Array
    clip_scale_without: Array
    calls: int
    skipped: int
    bn_mean_drift: float
    bn_variance_drift: float
    bn_batches: float
    parts: Array
    effect: Array
    overhead: float = 0.0
    status: str = MEASURED
