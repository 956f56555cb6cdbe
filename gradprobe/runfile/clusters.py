"""The group ``test/``: metrics of the test split with one cluster of images left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gradprobe.rows import TestClusters
from gradprobe.runfile import schema
from gradprobe.runfile.attributes import printable

if TYPE_CHECKING:
    from gradprobe.runfile.pieces import Piece

GROUP = schema.TEST
CLUSTER, METRIC = "cluster", "metric"
AXES = (CLUSTER, METRIC)

FIELDS: dict[str, tuple[tuple[str, ...], np.dtype[Any], str]] = {
    "size": ((CLUSTER,), np.dtype("<i8"), "images of the cluster"),
    "without": (AXES, np.dtype("<f8"), "metric on the test split with the cluster left out; NaN: undefined there"),
}
"""Axes, type and meaning of the numbers."""

NAMES = {
    CLUSTER: "what images of the test split belong together: a clip or patient, or an image alone",
    METRIC: "names of the metrics; their values on all of the test split are provenance test.*",
}


def write(file: h5py.File, found: TestClusters) -> None:
    """Write the group into a file that is being made."""
    group = file.create_group(GROUP)
    text = h5py.string_dtype("utf-8")
    for name, values in ((CLUSTER, found.clusters), (METRIC, found.metrics)):
        dataset = group.create_dataset(name, data=np.array(values, dtype=object), dtype=text, track_times=False)
        dataset.attrs["long_name"] = NAMES[name]
        dataset.make_scale(name)
    for name, (axes, dtype, meaning) in FIELDS.items():
        data = np.asarray(getattr(found, name), dtype=dtype)
        dataset = group.create_dataset(name, data=data, track_times=False)
        dataset.attrs["long_name"] = meaning
        for index, axis in enumerate(axes):
            dataset.dims[index].attach_scale(group[axis])
            dataset.dims[index].label = axis


def read(piece: Piece) -> dict[str, NDArray[Any]]:
    """What a file says, by name; empty where it has no such group.

    Raises:
        RunFileError: It is damaged.
    """
    if f"{GROUP}/{CLUSTER}" not in piece:
        return {}
    with piece.reading():
        group = piece.file[GROUP]
        names = {axis: np.array([printable(str(n)) for n in group[axis].asstr()[()]], dtype=object) for axis in AXES}
        return {**names, **{name: group[name][()] for name in FIELDS}}


def load(piece: Piece) -> TestClusters | None:
    """The same as it was written; None where there is none."""
    found = read(piece)
    if not found:
        return None
    return TestClusters(tuple(found[CLUSTER]), found["size"], tuple(found[METRIC]), found["without"])
