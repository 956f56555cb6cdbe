"""The rows of task gradients at the features that the heads share: a bound, and no measurement of the parameters'."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from gradprobe import measures
from gradprobe.measures import Array
from gradprobe.rows.layers import stacked
from gradprobe.rows.table import (
    COSINE,
    FEATURE,
    LENGTH,
    MEASURED_BEFORE,
    RowBatch,
    Table,
    common_fields,
    field,
    overhead_field,
)


class _Features(RowBatch):
    """Feature rows."""

    @cached_property
    def gram(self) -> Array:
        """(n, F, T, T)."""
        shape = (len(self.header.feature_names), self.tasks, self.tasks)
        found: Array = stacked([row.gram for row in self.rows], shape)
        return found


FEATURES = Table(
    "features",
    "features",
    (
        *common_fields(MEASURED_BEFORE),
        field(
            "grad_norm",
            "step feature task",
            "<f4",
            "Euclidean norm of the gradient of the unweighted loss at the feature: a bound on the parameters' and no "
            "measurement of it; 0: exactly zero; NaN: none, weight 0, or not finite",
            "loss per unit of feature",
            of=lambda batch: measures.norm(batch.gram),
            export="features",
            **LENGTH,
        ),
        field(
            "cosine",
            "step feature pair",
            "<f4",
            "cosine of the angle between two tasks' gradients at the feature, not on parameters; NaN: one of them is "
            "zero, missing or not finite",
            of=lambda batch: measures.pair_cosine(batch.gram),
            export="feature_cosines",
            **COSINE,
        ),
        overhead_field(),
    ),
    _Features,
    names=(FEATURE,),
)

FEATURE_SIZE = field("feature_size", "feature", "<i8", "numbers that the feature had for the first batch")


@dataclass(frozen=True)
class FeatureRow:
    """The task gradients at the features that the heads share, at one step.

    A bound on what :class:`gradprobe.rows.Row` holds, and no measurement of it: see
    ``gradprobe.probes.feature_gradients``.

    Attributes:
        step, epoch, time, overhead: As in :class:`gradprobe.rows.Row`.
        gram: (F, T, T) float64, of the gradients of the unweighted losses with respect to the features; NaN where a
            task does not enter at a feature, its weight is 0, or its gradient is not finite.
    """

    table: ClassVar[Table] = FEATURES
    by_layer: ClassVar = ()
    brings: ClassVar = (FEATURES.name,)

    step: int
    epoch: int
    time: float
    gram: Array
    overhead: float = 0.0
