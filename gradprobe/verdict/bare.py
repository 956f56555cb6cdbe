"""A bare table of losses and weights, as a report prints it: what it lacks, and what in its numbers misleads.

No such table can say anything of interference, whatever it holds: the verdict is known before it is read.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradprobe.errors import DataError
from gradprobe.measures import Array, known
from gradprobe.messages import Message
from gradprobe.verdict.answers import INCONCLUSIVE
from gradprobe.verdict.misleading import Scaled, partial

LOSS, WEIGHT = "loss_", "weight_"
_LEARNED = 0.05
"""A loss that fell by less of itself has not been learned, as far as single batches tell."""

MISSING = (
    Message("bare.no_gradient"),
    Message("bare.no_control"),
    Message("bare.one_run"),
    Message("bare.no_metrics"),
    Message("bare.no_ledger"),
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
    headline: Message
    missing: Sequence[Message]
    misleading: Sequence[Message]
    tasks: Mapping[str, Mapping[str, float | None]]


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
        Message("bare.headline"),
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


def _losses(ends: Mapping[str, Mapping[str, float]]) -> Iterator[Message]:
    fell = [task for task, end in ends.items() if end["fall"] > 0]
    if fell:
        falls = [Message("bare.fall", task=task, first=ends[task]["first"], last=ends[task]["last"]) for task in fell]
        yield Message("bare.falling", falls=falls)
    for task, end in ends.items():
        if end["fall"] < _LEARNED:
            change = 0.0 - end["fall"]  # no -0 %
            yield Message("bare.not_learned", task=task, first=end["first"], last=end["last"], change=change)


def _batches(
    table: Table, scaled: Sequence[Scaled | None], ends: Mapping[str, Mapping[str, float]]
) -> Iterator[Message]:
    held = table.in_batch
    for row in np.flatnonzero((held > 0) & (held < held.max())):
        yield Message("bare.partial", step=int(table.step[row]), n=int(held[row]), of=int(held.max()))
    for t, task in enumerate(table.tasks):
        found = scaled[t]
        if found is not None and found.is_sum:
            yield _multiplied(table, task, found)
            if found.rows[-1] == np.flatnonzero(np.isfinite(table.loss[:, t]))[-1]:
                raw, corrected = (ends[task][name] for name in ("fall", "fall_corrected"))
                yield Message("bare.corrected", task=task, raw=raw, corrected=corrected)


def _multiplied(table: Table, task: str, found: Scaled) -> Message:
    return Message(
        "bare.multiplied",
        task=task,
        step=int(table.step[found.rows[-1]]),
        loss=float(found.loss[-1]),
        corrected=float(found.corrected[-1]),
        times=found.full / int(found.size[-1]),
        usual=float(found.usual[-1]),
    )


def _weights(table: Table) -> Iterator[Message]:
    total, count = table.weight.sum(axis=1), len(table.tasks)
    settled = total[1:][np.isfinite(total[1:])]
    if len(settled) and count > 1 and np.allclose(settled, count**2, rtol=0.01):
        yield Message("bare.too_long", total=float(settled.mean()), count=count)
    elif len(settled) and np.ptp(settled) > 0.05 * abs(settled.mean()):
        yield Message("bare.unsteady", low=float(settled.min()), high=float(settled.max()))
    if np.isfinite(table.weight).any():
        yield Message("bare.angle")
