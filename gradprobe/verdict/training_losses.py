"""What training losses and weights cannot show, and where they mislead: in runs, and in a bare table of a report.

No table of losses and weights says anything of interference, whatever it holds: the verdict is known before it is read.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe.errors import DataError
from gradprobe.measures import Array, known
from gradprobe.messages import Message
from gradprobe.verdict.answers import INCONCLUSIVE
from gradprobe.verdict.conditions import ArmRuns
from gradprobe.verdict.evidence import Evidence

__all__ = ["judge_table", "parse_table"]


_NOTABLE = 0.10
"""A difference of training losses that somebody might offer as evidence."""


@dataclass(frozen=True)
class _PartialBatches:
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


def partial_batches(loss: ArrayLike, batch_size: ArrayLike, near: int = 5) -> _PartialBatches | None:
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
    found = _PartialBatches(rows, size[rows], full, loss[rows], usual, False)
    raw, corrected = (np.abs(np.log(x / usual)).sum() for x in (found.loss, found.corrected))
    return _PartialBatches(rows, size[rows], full, loss[rows], usual, bool(corrected < raw))


def _near(loss: Array, whole: NDArray[np.intp], row: int, near: int) -> float:
    before, after = whole[whole < row][-near:], whole[whole > row][:near]
    return float(np.median(loss[np.concatenate([before, after])]))


def misleading(baseline: ArmRuns | None, arms: Sequence[ArmRuns], evidence: Sequence[Evidence]) -> list[Message]:
    """Warnings by name of the file, or the arm."""
    found = [message for run in evidence for message in _batches(run)]
    if baseline is not None:
        found += [message for arm in arms for message in _training_losses(baseline, arm)]
    return found


def _batches(run: Evidence) -> Iterator[Message]:
    for place, task in enumerate(run.tasks):
        found = partial_batches(run.loss[:, place], run.batch_size) if len(run.step) else None
        if found is None:
            continue
        if place == 0:
            count, smallest = len(found.rows), int(found.size.min())
            yield Message("misleading.partial", file=run.file, n=count, size=smallest, full=found.full)
        if found.is_sum:
            yield Message("misleading.scaled", file=run.file, task=task)


def _training_losses(baseline: ArmRuns, arm: ArmRuns) -> Iterator[Message]:
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


_LOSS, _WEIGHT = "loss_", "weight_"
_LEARNED = 0.05
"""A loss that fell by less of itself has not been learned, as far as single batches tell."""

_MISSING = (
    Message("bare.no_gradient"),
    Message("bare.no_control"),
    Message("bare.one_run"),
    Message("bare.no_metrics"),
    Message("bare.no_ledger"),
)


@dataclass(frozen=True)
class _LossTable:
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
class _TableVerdict:
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


def parse_table(text: str, name: str = "the table") -> _LossTable:
    """Read CSV with columns ``step``, ``loss_TASK``, ``weight_TASK`` and perhaps ``batch_size`` and ``samples``.

    Raises:
        DataError: A column is missing, or a cell is no number; says which line.
    """
    reader = csv.DictReader(io.StringIO(text.lstrip("\ufeff")), skipinitialspace=True)
    columns = [column.strip() for column in reader.fieldnames or ()]
    reader.fieldnames = columns
    tasks = tuple(column.removeprefix(_LOSS) for column in columns if column.startswith(_LOSS))
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

    return _LossTable(
        tasks,
        column("step", math.nan),
        np.stack([column(_LOSS + task, math.nan) for task in tasks], axis=1),
        np.stack([column(_WEIGHT + task, math.nan) for task in tasks], axis=1),
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


def judge_table(table: _LossTable) -> _TableVerdict:
    """Say what such a table lacks, and what in it misleads."""
    scaled = [partial_batches(table.loss[:, t], table.in_batch) for t in range(len(table.tasks))]
    ends = {task: _ends(table, t, scaled[t]) for t, task in enumerate(table.tasks)}
    return _TableVerdict(
        INCONCLUSIVE,
        Message("bare.headline"),
        _MISSING,
        [*_losses(ends), *_table_batches(table, scaled, ends), *_weights(table)],
        {task: {name: known(value) for name, value in values.items()} for task, values in ends.items()},
    )


def _ends(table: _LossTable, t: int, scaled: _PartialBatches | None) -> dict[str, float]:
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


def _table_batches(
    table: _LossTable, scaled: Sequence[_PartialBatches | None], ends: Mapping[str, Mapping[str, float]]
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


def _multiplied(table: _LossTable, task: str, found: _PartialBatches) -> Message:
    return Message(
        "bare.multiplied",
        task=task,
        step=int(table.step[found.rows[-1]]),
        loss=float(found.loss[-1]),
        corrected=float(found.corrected[-1]),
        times=found.full / int(found.size[-1]),
        usual=float(found.usual[-1]),
    )


def _weights(table: _LossTable) -> Iterator[Message]:
    total, count = table.weight.sum(axis=1), len(table.tasks)
    settled = total[1:][np.isfinite(total[1:])]
    if len(settled) and count > 1 and np.allclose(settled, count**2, rtol=0.01):
        yield Message("bare.too_long", total=float(settled.mean()), count=count)
    elif len(settled) and np.ptp(settled) > 0.05 * abs(settled.mean()):
        yield Message("bare.unsteady", low=float(settled.min()), high=float(settled.max()))
    if np.isfinite(table.weight).any():
        yield Message("bare.angle")
