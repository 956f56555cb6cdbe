"""What in recorded numbers misleads: batches of another size, losses that are sums over a batch, training losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe.measures import Array
from gradprobe.messages import Message
from gradprobe.verdict.conditions import Group
from gradprobe.verdict.evidence import Evidence

_NOTABLE = 0.10
"""A difference of training losses that somebody might offer as evidence."""


@dataclass(frozen=True)
class Scaled:
    """A loss at batches that hold fewer samples than the others.

    Attributes:
        rows: (k,) their places.
        size, full: (k,) samples in them, and in a full batch.
        loss, usual: (k,) the loss there, and the median of the full rows near it.
        is_sum: Whether their size explains the difference: the loss is multiplied with it.
    """

    rows: NDArray[np.intp]
    size: NDArray[np.int64]
    full: int
    loss: Array
    usual: Array
    is_sum: bool

    @property
    def corrected(self) -> Array:
        """(k,) the loss as it would be in a full batch, if it is multiplied with the size."""
        result: Array = self.loss * self.full / self.size
        return result


def partial(loss: ArrayLike, batch_size: ArrayLike, near: int = 5) -> Scaled | None:
    """Look at the rows with smaller batches; None: there are none, or sizes are not known.

    Args:
        loss: (n,) of one task.
        batch_size: (n,); 0: not known.
        near: How many full rows before and after give the usual loss.

    A loss that is multiplied with the batch size falls with it. It is taken for one where, over all such rows, the
    loss of its own size is further (in logarithms) from the usual than the corrected one.
    """
    loss, size = np.asarray(loss, dtype=np.float64), np.asarray(batch_size, dtype=np.int64)
    known = size > 0
    if not known.any():
        return None
    full = int(size.max())
    rows = np.flatnonzero(known & (size < full) & np.isfinite(loss) & (loss > 0))
    whole = np.flatnonzero((size == full) & np.isfinite(loss) & (loss > 0))
    if not len(rows) or not len(whole):
        return None
    usual = np.array([_near(loss, whole, int(row), near) for row in rows])
    found = Scaled(rows, size[rows], full, loss[rows], usual, False)
    raw, corrected = (np.abs(np.log(x / usual)).sum() for x in (found.loss, found.corrected))
    return Scaled(rows, size[rows], full, loss[rows], usual, bool(corrected < raw))


def _near(loss: Array, whole: NDArray[np.intp], row: int, near: int) -> float:
    before, after = whole[whole < row][-near:], whole[whole > row][:near]
    return float(np.median(loss[np.concatenate([before, after])]))


def of_runs(baseline: Group | None, arms: Sequence[Group], evidence: Sequence[Evidence]) -> list[Message]:
    """Warnings by name of the file, or the arm."""
    found = [said for run in evidence for said in _batches(run)]
    if baseline is not None:
        found += [said for arm in arms for said in _training_losses(baseline, arm)]
    return found


def _batches(run: Evidence) -> Iterator[Message]:
    for place, task in enumerate(run.tasks):
        found = partial(run.loss[:, place], run.batch_size) if len(run.step) else None
        if found is None:
            continue
        if place == 0:
            count, smallest = len(found.rows), int(found.size.min())
            yield Message("misleading.partial", file=run.file, n=count, size=smallest, full=found.full)
        if found.is_sum:
            yield Message("misleading.scaled", file=run.file, task=task)


def _training_losses(baseline: Group, arm: Group) -> Iterator[Message]:
    """Where training losses differ so much that somebody might offer them."""
    for task in next(iter(baseline.runs.values())).tasks:
        ends = [[_end(run, task) for run in group.runs.values()] for group in (baseline, arm)]
        if not all(map(len, ends)) or not np.isfinite(ends[0] + ends[1]).all():
            continue
        one, other = (float(np.mean(values)) for values in ends)
        if one > 0 and abs(other / one - 1) > _NOTABLE:
            change = other / one - 1
            key = "misleading.lower" if change < 0 else "misleading.higher"
            yield Message(key, arm=arm.name, task=task, part=abs(change), baseline=baseline.name)


def _end(run: Evidence, task: str) -> float:
    """Median over the last tenth of the rows."""
    if task not in run.tasks or not len(run.step):
        return math.nan
    last = run.loss[-max(1, len(run.step) // 10) :, run.tasks.index(task)]
    return float(np.median(last)) if np.isfinite(last).all() else math.nan
