"""Arrays by layer, where rows have fewer layers than the run: layers only ever join at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["begins_with", "moved", "shortened", "widened"]


def begins_with(longer: Sequence[str], shorter: Sequence[str]) -> bool:
    """Whether layers are those of an earlier moment, and maybe some that joined."""
    return list(longer[: len(shorter)]) == list(shorter)


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
            if own.dtype.kind == "c":
                raise TypeError("complex numbers: only their real parts would be kept")
            found[place, : len(own)] = own
    return found


def moved(row: Any, places: NDArray[np.intp]) -> Any:
    """A row whose layers are put at these places among more; layers between are missing."""
    changes: dict[str, Any] = {}
    for name in row.by_layer:
        if (values := getattr(row, name)) is not None:
            own = places[: len(values)]
            wide = widened(np.asarray(values)[:0], int(own.max(initial=-1)) + 1)
            wide[own] = values
            changes[name] = wide
    return replace(row, **changes)


def shortened(row: Any, count: int) -> Any:
    """A row of as many layers as there were at first; the others joined at the end."""
    longer = [name for name in row.by_layer if getattr(row, name) is not None and len(getattr(row, name)) > count]
    return replace(row, **{name: getattr(row, name)[:count] for name in longer}) if longer else row
