"""What a method would have done at the recorded steps: weights, each task's first-order progress, and harm.

At the recorded parameters, from the recorded Gramians alone. What the training would have become with other weights is
not in them: that takes a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradprobe import measures
from gradprobe.measures import Array

__all__ = ["Method", "Replayed", "medians_by_task"]


Method = Callable[[int], "Array | None"]
"""Row -> weights (T,), or None where the method has no answer; asked for rows in order."""


@dataclass(frozen=True)
class Replayed:
    """One method on n rows with T tasks.

    Attributes:
        method: Its name.
        weight: (n, T); NaN where it has no answer.
        progress: (n, T): first-order fall of each loss under a plain step, over the fall that the task's own part of
            the joint step (static weights) would make. 1: as if the others were absent; below 0: the step harms the
            task. NaN: no answer, or a task without a gradient.
        length: (n,): of the combined gradient, over the joint step's.
    """

    method: str
    weight: Array
    progress: Array
    length: Array

    @property
    def harmed(self) -> Array:
        """(T,): share of the rows with progress known in which it is below 0; NaN where none is."""
        known = np.isfinite(self.progress)
        with np.errstate(invalid="ignore"):
            result: Array = (known & (self.progress < 0)).sum(axis=0) / known.sum(axis=0)
        return result


def replay(name: str, gram: Array, static: Array, method: Method) -> Replayed:
    """Ask a method for its weights at every row.

    Args:
        name: For the table.
        gram: (n, T, T) over all shared layers.
        static: (T,) weights of the joint step that the others are measured by.
        method: See :data:`Method`.
    """
    none = np.full(len(static), np.nan)
    answers = [method(row) for row in range(len(gram))]
    weight = np.array([none if w is None else w for w in answers], dtype=np.float64).reshape(len(gram), len(static))
    return effect(name, gram, static, weight)


def effect(name: str, gram: Array, static: Array, weight: Array) -> Replayed:
    """The same for weights that are known: (n, T)."""
    own = static * np.diagonal(gram, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        progress = np.where(own == 0, np.nan, measures.progress(gram, weight) / own)
        length = measures.step_norm(gram, weight) / measures.step_norm(gram, np.broadcast_to(static, weight.shape))
    return Replayed(name, weight, progress, length)


def medians_by_task(replayed: list[Replayed], tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """One entry per method and task: medians over rows, and shares; None where there is nothing."""
    base = next(r for r in replayed if r.method == "joint")
    rows = []
    for one in replayed:
        with np.errstate(invalid="ignore"):
            change = one.progress - base.progress
        for t, task in enumerate(tasks):
            known = np.isfinite(one.weight[:, t])
            rows.append(
                {
                    "method": one.method,
                    "task": task,
                    "rows": int(known.sum()),
                    "weight": _median(one.weight[:, t]),
                    "progress": _median(one.progress[:, t]),
                    "change": _quartiles(change[:, t]),
                    "harmed": measures.known(one.harmed[t]),
                    "length": _median(one.length),
                }
            )
    return rows


def _median(values: Array) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _quartiles(values: Array) -> dict[str, float | None]:
    finite = values[np.isfinite(values)]
    found = np.quantile(finite, [0.25, 0.5, 0.75]) if len(finite) else [None] * 3
    return dict(zip(("q25", "median", "q75"), (None if v is None else float(v) for v in found), strict=True))
