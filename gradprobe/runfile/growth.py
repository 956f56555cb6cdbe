"""Layers that join a run after its start: where they go along the file's layer axis.

Layers only ever join at the end, so that the layers of each file of a run begin with those of the file before.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradprobe.rows import Header
from gradprobe.rows.layers import begins_with, widened


def joined(known: Header, found: Header) -> tuple[Header, NDArray[np.intp] | None]:
    """The header of a file after its session has found more layers.

    Args:
        known: The file's so far. After a resume it may have layers that this session has not found yet.
        found: The session's.

    Returns:
        The file's, and where the session's layers are in it; None: at its beginning.
    """
    layers = [*known.layers, *(name for name in found.layers if name not in set(known.layers))]
    order = {name: place for place, name in enumerate(layers)}
    places = np.array([order[name] for name in found.layers], dtype=np.intp)
    size = np.zeros(len(layers), np.int64)
    size[: len(known.layers)] = known.layer_size
    size[places] = np.maximum(size[places], found.layer_size)  # a layer may get parameters, and loses none
    reach = widened(np.asarray(known.reach, dtype=bool), len(layers), fill=False)
    reach[places] = found.reach
    header = replace(known, layers=tuple(layers), layer_size=size, reach=reach)
    return header, None if begins_with(layers, found.layers) else places
