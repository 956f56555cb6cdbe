"""A bare table of losses and weights, as a report prints it: what it lacks, and what in its numbers misleads.

No such table can say anything of interference, whatever it holds: the verdict is known before it is read.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gradprobe.errors import DataError
from gradprobe.measures import Array, known
from gradprobe.verdict.answers import INCONCLUSIVE
from gradprobe.verdict.misleading import Scaled, partial

LOSS, WEIGHT = "loss_", "weight_"
LEARNED = 0.05
"""A loss that fell by less of itself has not been learned, as far as single batches tell."""

MISSING = (
    "No gradient was measured: without the angle and the length of the tasks' gradients on shared layers nothing is "
    "known of interference. Record with gradprobe.attach or gradprobe record.",
    "There is no control run: the same seed with static weights (--trainer joint), and each task alone (--trainer "
    "single).",
    "There is one run: what another seed gives is not known; at least 3 are needed, 5 to 8 give an answer.",
    "There are no metrics on held-out data: a training loss is no evidence of interference, nor of its absence.",
    "There is no ledger: what each task's part of the real update did to the other's loss is not known (--ledger).",
)


@dataclass(frozen=True)
class Table:
    """The columns of such a report, rows in its order; NaN: an empty cell.

    Attributes:
        tasks: (T,) names.
        step: (n,).
        loss, weight: (n, T).
        batch_size: (n,) 0: not known.
        samples: (n,) in the batch, or in the whole training set where it is larger than a batch; 0: not known.
    """

    tasks: tuple[str, ...]
    step: Array
    loss: Array
    weight: Array
    batch_size: Array
    samples: Array

    @property
    def in_batch(self) -> Array:
        """(n,) samples in the batch of each row; 0: not known.

        Of a training set that is gone through in order, the last batch of an epoch holds what is left.
        """
        whole = (self.samples > self.batch_size) & (self.batch_size > 0)
        size = np.where(whole, self.batch_size, 1)
        per_epoch = np.ceil(self.samples / size)
        left = self.samples - size * (per_epoch - 1)
        last = whole & (self.step % np.where(per_epoch > 0, per_epoch, 1) == per_epoch - 1)
        plain = np.where(self.samples > 0, self.samples, self.batch_size)
        result: Array = np.where(last, left, np.where(whole, self.batch_size, plain))
        return result


@dataclass(frozen=True)
class Bare:
    """What can be said of such a table.

    Attributes:
        verdict: Always INCONCLUSIVE.
        headline: In one sentence.
        missing: What a verdict would need.
        misleading: What in the numbers misleads.
        tasks: Task -> first and last loss, its fall as they are, and its fall with partial batches corrected.
    """

    verdict: str
    headline: str
    missing: Sequence[str]
    misleading: Sequence[str]
    tasks: Mapping[str, Mapping[str, float | None]]

    def as_json(self) -> dict[str, Any]:
        """By the same names."""
        return asdict(self)


def parse(text: str, name: str = "the table") -> Table:
    """Read CSV with columns ``step``, ``loss_TASK``, ``weight_TASK`` and perhaps ``batch_size`` and ``samples``.

    Raises:
        DataError: A column is missing, or a cell is no number; says which line.
    """
    reader = csv.DictReader(io.StringIO(text.lstrip("\ufeff")), skipinitialspace=True)
    columns = [column.strip() for column in reader.fieldnames or ()]
    reader.fieldnames = columns
    tasks = tuple(column.removeprefix(LOSS) for column in columns if column.startswith(LOSS))
    if "step" not in columns or not tasks:
        raise DataError(
            f"{name}: no columns step and loss_TASK (it has: {', '.join(columns) or 'none'}). "
            "Write step,loss_det,loss_cls,weight_det,weight_cls in the first line."
        )
    rows = list(reader)
    if not rows:
        raise DataError(f"{name}: holds no rows.")

    def column(wanted: str, empty: float) -> Array:
        if wanted not in columns:
            return np.full(len(rows), empty)
        return np.array([_number(row[wanted], empty, name, line) for line, row in enumerate(rows, 2)])

    return Table(
        tasks,
        column("step", math.nan),
        np.stack([column(LOSS + task, math.nan) for task in tasks], axis=1),
        np.stack([column(WEIGHT + task, math.nan) for task in tasks], axis=1),
        column("batch_size", 0.0),
        column("samples", 0.0),
    )


def _number(cell: str | None, empty: float, name: str, line: int) -> float:
    text = (cell or "").strip()
    if not text:
        return empty
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{name}, line {line}: {text!r} is not a number.") from None


def judge(table: Table) -> Bare:
    """Say what such a table lacks, and what in it misleads."""
    scaled = [partial(table.loss[:, t], table.in_batch) for t in range(len(table.tasks))]
    ends = {task: _ends(table, t, scaled[t]) for t, task in enumerate(table.tasks)}
    return Bare(
        INCONCLUSIVE,
        "Inconclusive: a table of losses and weights says nothing about interference between tasks.",
        MISSING,
        [*_losses(ends), *_batches(table, scaled, ends), *_weights(table)],
        {task: {name: known(value) for name, value in values.items()} for task, values in ends.items()},
    )


def _ends(table: Table, t: int, scaled: Scaled | None) -> dict[str, float]:
    """First and last known loss; with losses of partial batches scaled up where they are sums."""
    loss = table.loss[:, t].copy()
    there = np.flatnonzero(np.isfinite(loss))
    if not len(there):
        return dict.fromkeys(("first", "last", "last_corrected", "fall", "fall_corrected"), math.nan)
    first, last = float(loss[there[0]]), float(loss[there[-1]])
    if scaled is not None and scaled.is_sum:
        loss[scaled.rows] = scaled.corrected
    corrected = float(loss[there[-1]])
    start = float(loss[there[0]]) if len(there) > 1 else 0.0  # one row neither falls nor stays
    return {
        "first": first,
        "last": last,
        "last_corrected": corrected,
        "fall": 1 - last / first if first and start else math.nan,
        "fall_corrected": 1 - corrected / start if start else math.nan,
    }


def _losses(ends: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    fell = [task for task, end in ends.items() if end["fall"] > 0]
    if fell:
        falls = ", ".join(f"{task} {ends[task]['first']:.4g} to {ends[task]['last']:.4g}" for task in fell)
        yield (
            f"A falling training loss ({falls}) is offered as evidence. Losses fall with and without interference: a "
            "run that interferes more may reach a lower one."
        )
    for task, end in ends.items():
        if end["fall"] < LEARNED:
            change = 0.0 - 100 * end["fall"]  # no -0 %
            yield (
                f"{task} did not learn: its loss went from {end['first']:.4g} to {end['last']:.4g} ({change:+.0f} %). "
                "What another task gained may be what this one lost."
            )


def _batches(table: Table, scaled: Sequence[Scaled | None], ends: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    held = table.in_batch
    for row in np.flatnonzero((held > 0) & (held < held.max())):
        yield (
            f"Step {int(table.step[row])} is a partial batch: it holds {int(held[row])} of {int(held.max())} samples, "
            "and its losses are not comparable with the others."
        )
    for t, task in enumerate(table.tasks):
        found = scaled[t]
        if found is not None and found.is_sum:
            yield _multiplied(table, task, found)
            if found.rows[-1] == np.flatnonzero(np.isfinite(table.loss[:, t]))[-1]:
                raw, corrected = (100 * ends[task][name] for name in ("fall", "fall_corrected"))
                yield f"The fall of {task} by {raw:.1f} % is then one of about {corrected:.0f} %, on one batch."


def _multiplied(table: Table, task: str, found: Scaled) -> str:
    step, size = int(table.step[found.rows[-1]]), int(found.size[-1])
    return (
        f"The loss of {task} goes with the batch size, as one that is multiplied by it does (YOLOv5's is): at step "
        f"{step} it is {found.loss[-1]:.4g} for that alone, and about {found.corrected[-1]:.2f} when corrected (times "
        f"{found.full / size:g}), beside {found.usual[-1]:.2f} in full batches near it."
    )


def _weights(table: Table) -> Iterator[str]:
    total, count = table.weight.sum(axis=1), len(table.tasks)
    settled = total[1:][np.isfinite(total[1:])]
    if len(settled) and count > 1 and np.allclose(settled, count**2, rtol=0.01):
        yield (
            f"The weights sum to {settled.mean():.2f} = T^2 with T = {count} tasks; GradNorm's sum to T = {count}. So "
            "they do where they are renormalised to mean 1 and then multiplied by T: gradients are "
            f"{count} times too long."
        )
    elif len(settled) and np.ptp(settled) > 0.05 * abs(settled.mean()):
        yield (
            f"The weights sum to {settled.min():.3g} at one step and {settled.max():.3g} at another: the size of the "
            "whole update changes with them."
        )
    if np.isfinite(table.weight).any():
        yield (
            "Positive weights cannot change the angle between two gradients at given parameters: weights that moved "
            "show no less conflict."
        )
