"""What drawings have in common, whoever draws them: names that fit, and scales. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_WIDE = 30.0
"""Positive values that span more than this factor go on a logarithmic axis, so that small ones stay visible."""


def logarithmic(values: ArrayLike) -> bool:
    """Whether values go on a logarithmic axis; those that are not finite do not count.

    >>> logarithmic([1, 40]), logarithmic([0, 40]), logarithmic([1, 20, float("inf")])
    (True, False, False)
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return bool(known.size and known.min() > 0 and known.max() > _WIDE * known.min())


def short(names: Sequence[str], limit: int = 30) -> list[str]:
    """Names of layers, short enough for an axis: from long ones the common beginning goes, then the middle.

    >>> short(["net.stem", "net.head"], limit=7)
    ['…stem', '…head']
    """
    if max(map(len, names), default=0) <= limit:
        return list(names)
    parts = [name.split(".") for name in names]
    common = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    cut = ["…" * (common > 0) + ".".join(part[common:]) for part in parts]
    half = limit // 2
    return [name if len(name) <= limit else f"{name[: half - 1]}…{name[-half:]}" for name in cut]
