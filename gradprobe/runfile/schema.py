"""The run file, version 1: every dataset, its axes and its meaning, in one table.

The writer, the reader and the documentation all go by this table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

ENCODING_TYPE = "gradprobe-run"
ENCODING_VERSION = "1.0"
PARTS_SUFFIX = ".parts"
AUDIT = "audit"
"""The group of what :mod:`gradprobe.runfile.audits` writes."""

TEST = "test"
"""The group of what :mod:`gradprobe.runfile.clusters` writes."""

REACH = "reach"
BASIS, BY_EFFECT = "basis", "gradients"
"""Attribute of ``reach`` and its value: reach and sums over shared layers go by what gradients were measured."""

CHUNK_ROWS = 4096
"""Rows in a chunk, and in a piece of a run that is copied."""

STEP, LAYER, TASK, PAIR, EPOCH, FEATURE = "step", "layer", "task", "pair", "epoch", "feature"
SOURCE = "source"
OTHER_TASK = "other_task"
"""The second of two task axes: tools that select by name need another one for it."""


@dataclass(frozen=True)
class Field:
    """One dataset of the file.

    Attributes:
        missing: What stands for it in rows of a file that lacks it.
    """

    name: str
    axes: tuple[str, ...]
    dtype: np.dtype
    meaning: str
    units: str = ""
    missing: float = math.nan


def _field(name: str, axes: str, dtype: str, meaning: str, units: str = "") -> Field:
    return Field(name, tuple(axes.split()), np.dtype(dtype), meaning, units)


ROW_FIELDS: tuple[Field, ...] = (
    _field("step", "step", "<i8", "training step of the row, from 0; measured before the step's update"),
    _field("epoch", "step", "<i4", "epoch of the row, from 0"),
    _field("time", "step", "<f8", "time since recording started", "s"),
    _field("loss", "step task", "<f4", "unweighted loss; NaN: it was NaN"),
    _field("weight", "step task", "<f4", "weight in force at this step"),
    _field(
        "grad_norm",
        "step layer task",
        "<f4",
        "Euclidean norm of the gradient of the unweighted loss; 0: exactly zero; NaN: none or not finite",
        "loss per unit of parameter",
    ),
    _field(
        "cosine",
        "step layer pair",
        "<f4",
        "cosine of the angle between two tasks' gradients; NaN: one of them is zero, missing or not finite",
    ),
    _field(
        "shared_grad_norm",
        "step task",
        "<f4",
        "grad_norm over all layers that the task shares with another at that row",
        "loss per unit of parameter",
    ),
    _field("shared_cosine", "step pair", "<f4", "cosine over all layers that both tasks reach at that row"),
    _field("lr", "step", "<f8", "learning rate of the optimizer's first group; NaN: unknown"),
    _field("overhead", "step", "<f4", "time spent measuring this row", "s"),
    _field("batch_size", "step", "<i4", "samples in the batch; 0: unknown"),
    _field("status", "step", "|u1", "0: measured; else an index into the attribute status_names"),
)

GRAM_NOISE = _field(
    "gram_noise",
    "step layer task other_task",
    "<f4",
    "noise part of the inner product of two tasks' gradients, which norms and cosine have in them; NaN: not known, or "
    "one of them is missing or not finite",
    "(loss per unit of parameter)^2",
)
MICRO_BATCHES = replace(
    _field("micro_batches", "step", "<i4", "micro-batches in which the step was measured; 1: as a whole"), missing=1
)

NOISE_FIELDS: tuple[Field, ...] = (GRAM_NOISE, MICRO_BATCHES)
"""In files of runs that were measured in micro-batches."""

PROBE_LOADER_FIELDS: tuple[Field, ...] = (
    _field("step", "step", "<i8", "training step of the row, from 0; measured before the step's update"),
    _field("epoch", "step", "<i4", "epoch of the row, from 0"),
    _field("time", "step", "<f8", "time since recording started", "s"),
    _field("loss", "step task", "<f4", "unweighted loss, mean over the samples; NaN: it was NaN"),
    *(field for field in ROW_FIELDS if field.name in ("grad_norm", "cosine")),
    GRAM_NOISE,
    MICRO_BATCHES,
    _field("batch_size", "step", "<i4", "samples of all micro-batches together, drawn with replacement"),
    _field("overhead", "step", "<f4", "time spent measuring this row", "s"),
    _field("status", "step", "|u1", "0: measured; else an index into the attribute status_names of /status"),
)

HEADER_FIELDS: tuple[Field, ...] = (
    _field("layer_size", "layer", "<i8", "number of parameters of the layer"),
    _field(
        "reach",
        "layer task",
        "|u1",
        "1: the task has had a gradient other than 0 on the layer (of a task without any: its graph reaches the layer)",
    ),
)

REACH_BY_GRAPH = "1: the task's graph reaches the layer"
"""What ``reach`` is in files of earlier versions."""

FEATURE_FIELDS: tuple[Field, ...] = (
    _field("step", "step", "<i8", "training step of the row, from 0; measured before the step's update"),
    _field("epoch", "step", "<i4", "epoch of the row, from 0"),
    _field("time", "step", "<f8", "time since recording started", "s"),
    _field(
        "grad_norm",
        "step feature task",
        "<f4",
        "Euclidean norm of the gradient of the unweighted loss at the feature: a bound on the parameters' and no "
        "measurement of it; 0: exactly zero; NaN: none, weight 0, or not finite",
        "loss per unit of feature",
    ),
    _field(
        "cosine",
        "step feature pair",
        "<f4",
        "cosine of the angle between two tasks' gradients at the feature, not on parameters; NaN: one of them is zero, "
        "missing or not finite",
    ),
    _field("overhead", "step", "<f4", "time spent measuring this row", "s"),
)

FEATURE_SIZE = _field("feature_size", "feature", "<i8", "numbers that the feature had for the first batch")


UPDATE_FIELDS: tuple[Field, ...] = (
    _field("step", "step", "<i8", "training step whose update this is, from 0"),
    _field("epoch", "step", "<i4", "epoch of the row, from 0"),
    _field("time", "step", "<f8", "time since recording started", "s"),
    _field(
        "joint_norm",
        "step",
        "<f4",
        "Euclidean norm of the weighted joint gradient over all that is trained, before clipping; NaN: unknown",
        "loss per unit of parameter",
    ),
    _field("clip_scale", "step", "<f4", "what the gradient was multiplied with before the update; 1: not clipped"),
    _field(
        "clip_share",
        "step task",
        "<f4",
        "the task's part in the square of joint_norm; sums to 1; below 0: it made the norm smaller; NaN: unknown",
    ),
    _field(
        "clip_scale_without",
        "step task",
        "<f4",
        "what clip_scale would have been without the task; NaN: unknown",
    ),
    _field("calls", "step", "<i4", "calls of the probe that this update followed; 0: none"),
    _field("skipped", "step", "<i4", "steps of the run so far that changed nothing"),
    _field(
        "bn_mean_drift",
        "step",
        "<f4",
        "root mean square change of BatchNorm's running means since the row before, in running standard deviations",
    ),
    _field(
        "bn_variance_drift",
        "step",
        "<f4",
        "root mean square change of the logarithm of BatchNorm's running variances since the row before",
    ),
    _field("bn_batches", "step", "<f4", "most batches per step that one BatchNorm averaged since the row before"),
    _field(
        "update_norm",
        "step layer task",
        "<f4",
        "Euclidean norm of the task's part of the update; 0: exactly zero; NaN: none or not told apart",
        "unit of parameter",
    ),
    _field(
        "cosine",
        "step layer pair",
        "<f4",
        "cosine of the angle between two tasks' parts of the update; NaN: one is zero, missing or not told apart",
    ),
    _field(
        "shared_update_norm",
        "step task",
        "<f4",
        "update_norm over all layers that the task reaches",
        "unit of parameter",
    ),
    _field("shared_cosine", "step pair", "<f4", "cosine over all layers that both tasks reach"),
    _field(
        "share",
        "step layer source",
        "<f4",
        "inner product of a part of the update with all of it, over the square of all of it; sums to 1",
    ),
    _field("shared_share", "step source", "<f4", "share over all shared layers together"),
    _field(
        "effect",
        "step layer task source",
        "<f4",
        "change of the task's unweighted loss that the part of the update on the layer makes, to first order; NaN: the "
        "task does not reach the layer, or not told apart",
        "loss",
    ),
    _field("overhead", "step", "<f4", "time spent measuring this row", "s"),
    _field("status", "step", "|u1", "0: taken apart; else an index into the attribute status_names of /status"),
)


class Holds(Protocol):
    """A file, or a run."""

    def __contains__(self, name: str, /) -> bool:
        """Whether it has a dataset."""


LEDGER_FIELDS: tuple[Field, ...] = (
    _field("step", "step", "<i8", "training step whose update this is, from 0"),
    _field("epoch", "step", "<i4", "epoch of the row, from 0"),
    _field("time", "step", "<f8", "time since recording started", "s"),
    _field("burst", "step", "<i4", "of which burst of neighbouring steps the row is, from 0"),
    _field(
        "term",
        "step layer task source",
        "<f4",
        "change of the task's unweighted loss by the source's part of the update of the layer: mean of both ends of "
        "the step, corrected; NaN: the task does not reach the layer, or not known",
        "loss",
    ),
    _field(
        "left",
        "step task source",
        "<f4",
        "the same over all layers, to first order at the left end as it was measured; NaN: not known",
        "loss",
    ),
    _field(
        "correction",
        "step task source",
        "<f4",
        "what left lacks for sharing its batch with the update; NaN: not measured in micro-batches",
        "loss",
    ),
    _field(
        "right",
        "step task source",
        "<f4",
        "the same as left at the right end, of another batch; NaN: no step was measured after",
        "loss",
    ),
    _field(
        "head",
        "step task",
        "<f4",
        "change of the task's unweighted loss by the update of the parameters that it has for itself; NaN: not known",
        "loss",
    ),
    _field(
        "loss_change",
        "step task",
        "<f8",
        "change of the task's unweighted loss on the fixed probe batch; NaN: not measured",
        "loss",
    ),
    _field(
        "drift",
        "step task",
        "<f8",
        "part of loss_change by what the losses detach, through which no gradient flows (YOLOv5's objectness targets); "
        "NaN: not measured",
        "loss",
    ),
    _field("overhead", "step", "<f4", "time spent on this row", "s"),
    _field("status", "step", "|u1", "0: the row counts; else an index into the attribute status_names of /status"),
)


@dataclass(frozen=True)
class Table:
    """Datasets along one step axis: those at the root, or those of a group that has steps of its own.

    Attributes:
        group: Its name; empty: the root.
        fields: What has a value per row.
        optional: What has too, in some files: all of it or none.
    """

    group: str
    fields: tuple[Field, ...]
    optional: tuple[Field, ...] = ()

    def held(self, file: Holds) -> tuple[Field, ...]:
        """The fields of the table in a file, or a run, that has the table."""
        there = any(self.path(field.name) in file for field in self.optional)
        return (*self.fields, *self.optional) if there else self.fields

    def path(self, name: str) -> str:
        """Where a dataset of it is in the file."""
        return f"{self.group}/{name}" if self.group else name


ROWS, FEATURES = Table("", ROW_FIELDS, NOISE_FIELDS), Table("features", FEATURE_FIELDS)
UPDATES, LEDGER = Table("update", UPDATE_FIELDS), Table("ledger", LEDGER_FIELDS)
PROBE_LOADER = Table("probe_loader", PROBE_LOADER_FIELDS)

TABLES = (ROWS, FEATURES, UPDATES, LEDGER, PROBE_LOADER)
"""All there can be in a file; only the first is in every one."""


def row_field(name: str) -> tuple[Table, Field] | None:
    """The table and field of a dataset that has a value per row; None for any other.

    >>> row_field("features/cosine")[1].axes, row_field("reach")
    (('step', 'feature', 'pair'), None)
    """
    fields = ((table, field) for table in TABLES for field in (*table.fields, *table.optional))
    found = ((table, field) for table, field in fields if table.path(field.name) == name)
    return next(found, None)


MEANINGS = {f.name: f.meaning for f in (*ROW_FIELDS, *NOISE_FIELDS, *HEADER_FIELDS)} | {
    "layer": "names of the shared layers, in the order in which the forward runs them",
    "task": "names of the tasks",
    OTHER_TASK: "names of the tasks, along the second of two axes of tasks",
    "pair": "two task names joined by |",
    "feature": "names of the layers that make the features at which tasks part",
    "source": "what an update comes from: the tasks, weight decay, and momentum from steps that were not taken apart",
}


def chunk_shape(field: Field, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Chunks of a merged file: long in steps and narrow in layers, so that one layer's series is cheap to read.

    None (contiguous) where the dataset is too small for chunks to matter, or empty.
    """
    if 0 in shape or int(np.prod(shape)) * field.dtype.itemsize < 1 << 20:
        return None
    limit = {STEP: CHUNK_ROWS, LAYER: 8}
    return tuple(min(size, limit.get(axis, size)) for axis, size in zip(field.axes, shape, strict=True))
