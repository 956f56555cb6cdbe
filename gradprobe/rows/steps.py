"""The rows of measured steps, per task losses, weights and gradients; and those of independent samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.measures import Array, by_several, over_layers
from gradprobe.rows.layers import widened
from gradprobe.rows.table import (
    COSINE,
    LENGTH,
    MEASURED,
    MEASURED_BEFORE,
    UNKNOWN_GRADIENT,
    RowBatch,
    Table,
    common_fields,
    field,
    overhead_field,
    status_field,
)


class _Steps(RowBatch):
    """Rows of measured steps."""

    @cached_property
    def norms(self) -> NDArray[np.float32]:
        """(n, L, T)."""
        with np.errstate(over="ignore"):
            return np.asarray(measures.norm(self.gram), dtype=np.float32)

    @cached_property
    def shared(self) -> tuple[Array, Array]:
        """Norms (n, T) and cosines (n, P) over what counts at each row."""
        return over_layers(self.gram, self.counts)

    @property
    def counts(self) -> NDArray[np.bool_]:
        """(n, L, T): whose gradient counts where in sums over shared layers, as rows say it, or else their norms."""
        unknown = [row.status in UNKNOWN_GRADIENT for row in self.rows]
        before = None if self.seen is None else widened(self.seen, self.layers)
        counts = measures.counted(self.norms, before, unknown)
        for place, row in enumerate(self.rows):
            if row.reach is not None:
                counts[place] = widened(np.asarray(row.reach, dtype=bool), self.layers)
        return counts


_GRAD_NORM = field(
    "grad_norm",
    "step layer task",
    "<f4",
    "Euclidean norm of the gradient of the unweighted loss; 0: exactly zero; NaN: none or not finite",
    "loss per unit of parameter",
    of=lambda batch: measures.norm(batch.gram),
    export="layers",
    **LENGTH,
)
_LAYER_COSINE = field(
    "cosine",
    "step layer pair",
    "<f4",
    "cosine of the angle between two tasks' gradients; NaN: one of them is zero, missing or not finite",
    of=lambda batch: measures.pair_cosine(batch.gram),
    export="cosines",
    **COSINE,
)
GRAM_NOISE = field(
    "gram_noise",
    "step layer task other_task",
    "<f4",
    "noise part of the inner product of two tasks' gradients, which norms and cosine have in them; NaN: not known, or "
    "one of them is missing or not finite",
    "(loss per unit of parameter)^2",
    of=lambda batch: batch.stacked("gram_noise", batch.tasks, batch.tasks),
    finite=True,
    optional=True,
    export="noise",
)
_MICRO_BATCHES = field(
    "micro_batches",
    "step",
    "<i4",
    "micro-batches in which the step was measured; 1: as a whole",
    missing=1,
    optional=True,
)

ROWS = Table(
    "rows",
    "",
    (
        *common_fields(MEASURED_BEFORE),
        field("loss", "step task", "<f4", "unweighted loss; NaN: it was NaN"),
        field("weight", "step task", "<f4", "weight in force at this step"),
        _GRAD_NORM,
        _LAYER_COSINE,
        field(
            "shared_grad_norm",
            "step task",
            "<f4",
            "grad_norm over all layers that the task shares with another at that row",
            "loss per unit of parameter",
            of=lambda batch: batch.shared[0],
            **LENGTH,
        ),
        field(
            "shared_cosine",
            "step pair",
            "<f4",
            "cosine over all layers that both tasks reach at that row",
            of=lambda batch: batch.shared[1],
            **COSINE,
        ),
        field("lr", "step", "<f8", "learning rate of the optimizer's first group; NaN: unknown"),
        overhead_field(),
        field("batch_size", "step", "<i4", "samples in the batch; 0: unknown"),
        status_field("measured", ""),
        GRAM_NOISE,
        _MICRO_BATCHES,
    ),
    _Steps,
)
"""One row per measured step, at the root of the file."""


@dataclass(frozen=True)
class Row:
    """One measured step.

    Attributes:
        step: Training step, counted from 0; the parameters are those *before* this step's update.
        epoch: Counted from 0.
        time: Seconds since the start.
        loss: (T,) unweighted losses.
        weight: (T,) weights in force at this step.
        gram: (L, T, T) float64; NaN where a task does not reach a layer or its gradient is not finite. L may have grown
            since the first row, see :class:`gradprobe.rows.GrowingSink`.
        lr: Learning rate of the optimizer's first group; NaN where the probe knows no optimizer.
        overhead: Seconds spent on measuring this row.
        batch_size: Samples in the batch; 0 where the probe was not told.
        status: :data:`MEASURED`, or the reason why the row holds less than a measurement.
        gram_noise: (L, T, T) float64: the noise part of ``gram``, see :func:`gradprobe.statistics.noise_part`; NaN
            where it is not known. None: the run is not measured in micro-batches.
        micro_batches: In how many the step was measured, over all processes; 1: as a whole.
        reach: (L, T) bool: whose gradient counts on which layer in sums over the shared layers of this row, see
            :func:`gradprobe.measures.counted`. None: the run file goes by its rows so far, displays by the header.
    """

    table: ClassVar[Table] = ROWS
    by_layer: ClassVar = ("gram", "gram_noise", "reach")

    step: int
    epoch: int
    time: float
    loss: Array
    weight: Array
    gram: Array
    lr: float = float("nan")
    overhead: float = 0.0
    batch_size: int = 0
    status: str = MEASURED
    gram_noise: Array | None = None
    micro_batches: int = 1
    reach: NDArray[np.bool_] | None = None

    @property
    def brings(self) -> tuple[str, ...]:
        """What the file has from this row on."""
        return () if self.gram_noise is None else (GRAM_NOISE.name, _MICRO_BATCHES.name)

    def shared(self, reach: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Norms (T,) and pair cosines (P,) over all shared layers together; ``reach`` of the header, (L, T)."""
        return over_layers(self.gram, self.counts(reach))

    def counts(self, reach: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whose gradient counts on which of the layers that the row has; ``reach`` of the header, (L, T)."""
        return by_several(np.asarray(reach)[: len(self.gram)]) if self.reach is None else np.asarray(self.reach)


# ---- independent samples, which claims rest on

PROBE_LOADER = Table(
    "probe_loader",
    "probe_loader",
    (
        *common_fields(MEASURED_BEFORE),
        field("loss", "step task", "<f4", "unweighted loss, mean over the samples; NaN: it was NaN"),
        replace(_GRAD_NORM, export="probe_loader_layers"),
        replace(_LAYER_COSINE, export="probe_loader_cosines"),
        replace(GRAM_NOISE, export="probe_loader_noise", optional=False),
        replace(_MICRO_BATCHES, optional=False),
        field("batch_size", "step", "<i4", "samples of all micro-batches together, drawn with replacement"),
        overhead_field(),
        status_field("measured"),
    ),
)


@dataclass(frozen=True)
class ProbeLoaderRow:
    """One measurement on independent samples, with the parameters as they are at a step.

    Attributes:
        step, epoch, time, overhead, status: As in :class:`gradprobe.rows.Row`.
        loss: (T,) unweighted, means over the samples.
        gram, gram_noise: (L, T, T), as in :class:`gradprobe.rows.Row`.
        micro_batches, batch_size: In how many it was measured, and of how many samples together.
    """

    table: ClassVar[Table] = PROBE_LOADER
    by_layer: ClassVar = ("gram", "gram_noise")
    brings: ClassVar = (PROBE_LOADER.name,)

    step: int
    epoch: int
    time: float
    loss: Array
    gram: Array
    gram_noise: Array
    micro_batches: int
    batch_size: int
    overhead: float = 0.0
    status: str = MEASURED
