"""Series as one line of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable

_SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Iterable[float | None], low: float | None = -1.0, high: float | None = 1.0) -> str:
    """A series between two bounds; what is missing is a space.

    Args:
        values: NaN and None are missing.
        low, high: The lowest and the highest block; None: the least and the greatest value.

    >>> sparkline([-1.0, 0.0, 1.0, None])
    '▁▅█ '
    >>> sparkline([5.0, 5.0], None, None)
    '▅▅'
    """
    series = [math.nan if value is None else value for value in values]
    known = [value for value in series if math.isfinite(value)]
    if not known:
        return " " * len(series)
    bottom, top = min(known) if low is None else low, max(known) if high is None else high
    return "".join(_block(value, bottom, top) if math.isfinite(value) else " " for value in series)


def _block(value: float, low: float, high: float) -> str:
    place = (value - low) / (high - low) if high > low else 0.5
    return _SPARKS[min(max(int(place * 8), 0), 7)]
