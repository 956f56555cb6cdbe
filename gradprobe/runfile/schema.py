"""The run file, version 1: what it holds beside the rows, whose tables are :data:`gradprobe.rows.TABLES`.

The writer, the reader and the documentation all go by these.
"""

from __future__ import annotations

import numpy as np

from gradprobe.rows import FEATURE_SIZE, FEATURES, GRAM_NOISE, LEDGER, PROBE_LOADER, ROWS, TABLES, UPDATES, Field, Table
from gradprobe.rows.table import EPOCH, FEATURE, LAYER, OTHER_TASK, PAIR, SOURCE, STEP, TASK, TEXT, Holds, field

__all__ = [
    "EPOCH",
    "FEATURE",
    "FEATURES",
    "FEATURE_SIZE",
    "GRAM_NOISE",
    "LAYER",
    "LEDGER",
    "OTHER_TASK",
    "PAIR",
    "PROBE_LOADER",
    "ROWS",
    "SOURCE",
    "STEP",
    "TABLES",
    "TASK",
    "TEXT",
    "UPDATES",
    "Field",
    "Holds",
    "Table",
]

ENCODING_TYPE = "gradprobe-run"
ENCODING_VERSION = "1.0"
PARTS_SUFFIX = ".parts"

REACH = "reach"
BASIS, BY_EFFECT = "basis", "gradients"
"""Attribute of ``reach`` and its value: reach and sums over shared layers go by what gradients were measured."""

CHUNK_ROWS = 4096
"""Rows in a chunk, and in a piece of a run that is copied."""

HEADER_FIELDS: tuple[Field, ...] = (
    field("layer_size", "layer", "<i8", "number of parameters of the layer"),
    field(
        "reach",
        "layer task",
        "|u1",
        "1: the task has had a gradient other than 0 on the layer (of a task without any: its graph reaches the layer)",
    ),
)

REACH_BY_GRAPH = "1: the task's graph reaches the layer"
"""What ``reach`` is in files of earlier versions."""

TEST = Table(
    "test",
    "test",
    (
        field(
            "cluster",
            "cluster",
            "O",
            "what images of the test split belong together: a clip or patient, or an image alone",
        ),
        field(
            "metric", "metric", "O", "names of the metrics; their values on all of the test split are provenance test.*"
        ),
        field("size", "cluster", "<i8", "images of the cluster", least=1),
        field(
            "without",
            "cluster metric",
            "<f8",
            "metric on the test split with the cluster left out; NaN: undefined there",
            finite=True,
        ),
    ),
    names=("cluster", "metric"),
)
"""Metrics of the test split with one cluster of images left out."""

AUDIT = Table(
    "audit",
    "audit",
    (
        field("step", "step", "<i8", "training step, from 0; compared after the step's update"),
        field(
            "displacement",
            "step",
            "<f8",
            "distance of the other tasks' parameters from the training without the task, relative to how far they "
            "came; 0: bitwise equal; NaN: not finite",
        ),
        field("ulp", "step", "<f8", "the largest difference of a parameter in units of rounding"),
        field("door", "door", "O", "names of the doors"),
        field("state", "door", "O", "open, shut or not tested"),
        field("evidence", "door", "O", "where the difference shows first"),
        field("how_to_shut", "door", "O", "how to shut it for good"),
        field(
            "contribution",
            "door",
            "<f8",
            "displacement with every other open door held shut; NaN: not measured, or not finite",
        ),
        field("left_when_shut", "door", "<f8", "displacement that is left when this door alone is held shut"),
    ),
    names=("door",),
)
"""An audit: a run without rows."""

WHOLE = (TEST, AUDIT)
"""Tables that are written at once, and have axes of their own alone."""


def row_field(name: str) -> tuple[Table, Field] | None:
    """The table and field of a dataset that has a value per row; None for any other.

    >>> row_field("features/cosine")[1].axes, row_field("reach")
    (('step', 'feature', 'pair'), None)
    """
    found = ((table, field) for table in TABLES for field in table.fields if table.path(field.name) == name)
    return next(found, None)


MEANINGS = {
    "layer": "names of the shared layers, in the order in which the forward runs them",
    "task": "names of the tasks",
    OTHER_TASK: "names of the tasks, along the second of two axes of tasks",
    "pair": "two task names joined by |",
    "feature": "names of the layers that make the features at which tasks part",
    "source": "what an update comes from: the tasks, weight decay, and momentum from steps that were not taken apart",
}
"""Of the names along the axes."""


def chunk_shape(field: Field, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Chunks of a merged file: long in steps and narrow in layers, so that one layer's series is cheap to read.

    None (contiguous) where the dataset is too small for chunks to matter, or empty.
    """
    if 0 in shape or int(np.prod(shape)) * field.dtype.itemsize < 1 << 20:
        return None
    limit = {STEP: CHUNK_ROWS, LAYER: 8}
    return tuple(min(size, limit.get(axis, size)) for axis, size in zip(field.axes, shape, strict=True))
