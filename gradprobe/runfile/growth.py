"""Layers that join a run after its start: where rows of fewer, or of other, layers go along the file's layer axis.

Layers only ever join at the end, so that the layers of each file of a run begin with those of the file before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.rows import BY_LAYER, FeatureRow, Header, LedgerRow, ProbeLoaderRow, Row, UpdateRow

AnyRow = Row | FeatureRow | UpdateRow | LedgerRow | ProbeLoaderRow


def begins_with(longer: Sequence[str], shorter: Sequence[str]) -> bool:
    """Whether layers are those of an earlier moment, and maybe some that joined."""
    return list(longer[: len(shorter)]) == list(shorter)


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


def moved(row: AnyRow, places: NDArray[np.intp]) -> AnyRow:
    """A row whose layers are put where they are in the file; layers between are missing."""
    if isinstance(row, FeatureRow):
        return row
    changes: dict[str, Any] = {}
    for field in fields(row):
        values = getattr(row, field.name)
        if field.name not in BY_LAYER or values is None:
            continue
        own = places[: len(values)]
        wide = widened(np.asarray(values)[:0], int(own.max(initial=-1)) + 1)
        wide[own] = values
        changes[field.name] = wide
    return replace(row, **changes)


def widened(values: NDArray[Any], layers: int, axis: int = 0, fill: Any = None) -> NDArray[Any]:
    """An array with so many layers on one axis; those that it lacks hold ``fill`` (truth: False, numbers: NaN)."""
    if fill is None:
        fill = False if values.dtype == bool else np.nan
    wide = np.full((*values.shape[:axis], layers, *values.shape[axis + 1 :]), fill, dtype=values.dtype)
    wide[(slice(None),) * axis + (slice(values.shape[axis]),)] = values
    return wide


def stacked(rows: Sequence[NDArray[Any] | None], shape: tuple[int, ...], fill: Any = np.nan) -> NDArray[Any]:
    """(n, L, ...) of one array (up to L, ...) a row; None, and layers that a row lacks, are ``fill``.

    Args:
        rows: n of them.
        shape: (L, ...).
        fill: Its type is that of the result.
    """
    found = np.full((len(rows), *shape), fill)
    for place, values in enumerate(rows):
        if values is not None and np.size(values):
            own = np.asarray(values).reshape(-1, *shape[1:])
            found[place, : len(own)] = own
    return found
