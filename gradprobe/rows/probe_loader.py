"""The rows of task gradients on independent samples, which claims rest on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from gradprobe.measures import Array
from gradprobe.rows.status import MEASURED
from gradprobe.rows.steps import GRAD_NORM, GRAM_NOISE, LAYER_COSINE, MICRO_BATCHES
from gradprobe.rows.table import MEASURED_BEFORE, Table, common, field, overhead, status

PROBE_LOADER = Table(
    "probe_loader",
    "probe_loader",
    (
        *common(MEASURED_BEFORE),
        field("loss", "step task", "<f4", "unweighted loss, mean over the samples; NaN: it was NaN"),
        replace(GRAD_NORM, export="probe_loader_layers"),
        replace(LAYER_COSINE, export="probe_loader_cosines"),
        replace(GRAM_NOISE, export="probe_loader_noise", optional=False),
        replace(MICRO_BATCHES, optional=False),
        field("batch_size", "step", "<i4", "samples of all micro-batches together, drawn with replacement"),
        overhead(),
        status("measured"),
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
