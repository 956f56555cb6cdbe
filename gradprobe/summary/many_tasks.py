"""Many tasks in one run: which of them pull together, in which order they are shown, and in how few words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe.measures import Array, pair_index
from gradprobe.messages import Message

__all__ = ["NAMED", "clustered", "lowest", "many", "matrix", "spread"]


_MANY = 8
"""Up to so many tasks have a colour each, and are described one by one and pair by pair."""

LOWEST = 10
"""Of the pairs of more tasks, so many with the lowest medians are listed."""

NAMED = 3


def many(tasks: Collection[str]) -> bool:
    """Whether there are too many tasks to show every pair of them."""
    return len(tasks) > _MANY


def matrix(pairs: ArrayLike, tasks: int) -> Array:
    """One value per pair as a symmetric matrix.

    Args:
        pairs: (P,), in the order of :func:`gradprobe.measures.pairs`.
        tasks: T.

    Returns:
        (T, T), with NaN on the diagonal: a task is no pair with itself.

    >>> matrix([0.5], 2)
    array([[nan, 0.5],
           [0.5, nan]])
    """
    first, second = pair_index(tasks)
    result = np.full((tasks, tasks), np.nan)
    result[first, second] = result[second, first] = np.asarray(pairs, dtype=np.float64)
    return result


def clustered(cosines: ArrayLike) -> NDArray[np.intp]:
    """An order of the tasks in which those that pull together stand together.

    Average linkage of the distances ``1 - cosine``, its leaves turned so that neighbours are as near as they can be.
    A pair without a cosine counts as orthogonal.

    Args:
        cosines: (T, T), symmetric.

    Returns:
        (T,), every task once. The first task of the run stands in the first half, so that equal runs give equal orders.

    Source: Bar-Joseph et al., "Fast optimal leaf ordering for hierarchical clustering", 2001.

    >>> clustered([[1, -1, 0.9, -1], [-1, 1, -1, 0.9], [0.9, -1, 1, -1], [-1, 0.9, -1, 1]]) % 2
    array([0, 0, 1, 1])
    """
    values = np.asarray(cosines, dtype=np.float64)
    count = len(values)
    if count < 3:
        return np.arange(count)
    from scipy.cluster.hierarchy import leaves_list, linkage

    distance = 1 - np.nan_to_num(values[pair_index(count)], nan=0.0)
    order: NDArray[np.intp] = leaves_list(linkage(distance, "average", optimal_ordering=True)).astype(np.intp)
    return order[::-1].copy() if int(np.flatnonzero(order == 0)[0]) >= (count + 1) // 2 else order


def lowest(medians: Mapping[str, float | None], count: int = LOWEST) -> list[str]:
    """Names of the pairs with the lowest medians, lowest first; those without a value are none."""
    known = {name: value for name, value in medians.items() if value is not None}
    return sorted(known, key=known.__getitem__)[:count]


def counted(names: Sequence[str]) -> Message:
    """How many tasks there are, and the first of them."""
    return Message("summary.many_tasks", n=len(names), tasks=names[:NAMED])


def spread(values: Mapping[str, float | None], *, shares: bool = False) -> Message | None:
    """The middle of one value per task, and the tasks at both ends; None where none is known.

    >>> str(spread({"a": 1.0, "b": 2.0, "c": 9.0}))
    'median 2, from 1 (a) to 9 (c)'
    """
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return None
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    return Message(
        "crowd.spread_share" if shares else "crowd.spread",
        median=float(np.median(list(known.values()))),
        low=known[low],
        lowest=low,
        high=known[high],
        highest=high,
    )


def moved(ends: Mapping[str, tuple[float | None, float | None]]) -> Message:
    """Of values that went from one to another: how many fell, rose and stayed, and which rose most.

    >>> str(moved({"a": (1.0, 0.5), "b": (1.0, 2.0), "c": (1.0, 1.0)}))
    'fell for 1 of 3 tasks, rose for 1 (b), stayed for 1'
    """
    known = {name: (a, b) for name, (a, b) in ends.items() if a is not None and b is not None}
    rises = {name: b - a for name, (a, b) in known.items()}
    up = sorted((name for name, rise in rises.items() if rise > 0), key=lambda name: -rises[name])
    if known and not any(rises.values()):
        return Message("crowd.stayed", n=len(known))
    same = sum(rise == 0 for rise in rises.values())
    parts = [Message("crowd.fell", n=len(known) - len(up) - same, of=len(known))]
    if up:
        parts.append(Message("crowd.rose", n=len(up), names=[*up[:NAMED], *["..."][: len(up) > NAMED]]))
    if same:
        parts.append(Message("crowd.same", n=same))
    return Message("crowd.moved", parts=parts)
