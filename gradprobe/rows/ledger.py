"""The rows of the loss ledger: what one update did to the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradprobe.measures import Array
from gradprobe.rows.table import (
    MEASURED,
    SOURCE,
    WHOSE_UPDATE,
    Table,
    common_fields,
    field,
    overhead_field,
    status_field,
)

LEDGER = Table(
    "ledger",
    "ledger",
    (
        *common_fields(WHOSE_UPDATE),
        field("burst", "step", "<i4", "of which burst of neighbouring steps the row is, from 0"),
        field(
            "term",
            "step layer task source",
            "<f4",
            "change of the task's unweighted loss by the source's part of the update of the layer: mean of both ends "
            "of the step, corrected; NaN: the task does not reach the layer, or not known",
            "loss",
            finite=True,
            export="ledger_terms",
        ),
        field(
            "alone",
            "step layer task",
            "<f4",
            "what the layer's update would have changed the task's unweighted loss by at this point, had all gradients "
            "so far been the task's own: as term; NaN: as term, or the optimizer's history is not known by task",
            "loss",
            finite=True,
            optional=True,
            export="ledger_alone",
        ),
        field(
            "left",
            "step task source",
            "<f4",
            "the same over all layers, to first order at the left end as it was measured; NaN: not known",
            "loss",
            finite=True,
        ),
        field(
            "correction",
            "step task source",
            "<f4",
            "what left lacks for sharing its batch with the update; NaN: not measured in micro-batches",
            "loss",
            finite=True,
        ),
        field(
            "right",
            "step task source",
            "<f4",
            "the same as left at the right end, of another batch; NaN: no step was measured after",
            "loss",
            finite=True,
        ),
        field(
            "head",
            "step task",
            "<f4",
            "change of the task's unweighted loss by the update of the parameters that it has for itself; NaN: not "
            "known",
            "loss",
            finite=True,
        ),
        field(
            "loss_change",
            "step task",
            "<f8",
            "change of the task's unweighted loss on the fixed probe batch; NaN: not measured",
            "loss",
            finite=True,
        ),
        field(
            "drift",
            "step task",
            "<f8",
            "part of loss_change by what the losses detach, through which no gradient flows (YOLOv5's objectness "
            "targets); NaN: not measured",
            "loss",
            finite=True,
        ),
        overhead_field("on"),
        status_field("the row counts"),
    ),
    names=(SOURCE,),
)


@dataclass(frozen=True)
class LedgerRow:
    """What one update did to the losses, by the S sources that an ``UpdateRow`` has too. What is not known is NaN.

    Attributes:
        step, epoch, time, overhead: As in :class:`gradprobe.rows.Row`.
        status: ``MEASURED``, or the reason why the row does not count.
        burst: Of which burst of neighbouring steps the row is.
        term: (L, T, S) change of each task's unweighted loss by each part of the update of each layer: the mean of both
            ends of the step, corrected.
        alone: (L, T) as the task's own part in ``term``, of the update that the same gradients of its own would have
            made without those of others: another one under Adam alone, whose second moment all tasks share.
        left, correction, right: (T, S) over all layers: to first order at the left end as it was measured; what that
            lacks for sharing its batch with the update; at the right end. ``term`` is half their sum.
        head: (T,) as ``term``, by the whole update of what the task has for itself.
        loss_change: (T,) as it was measured on the fixed probe batch.
        drift: (T,) the part of ``loss_change`` that is no part of any gradient: by what the losses detach, such as
            targets made of the present predictions.
    """

    table: ClassVar[Table] = LEDGER
    by_layer: ClassVar = ("term", "alone")
    brings: ClassVar = (LEDGER.name, LEDGER.path("alone"))

    step: int
    epoch: int
    time: float
    burst: int
    term: Array
    left: Array
    correction: Array
    right: Array
    head: Array
    loss_change: Array
    drift: Array
    alone: Array
    overhead: float = 0.0
    status: str = MEASURED
