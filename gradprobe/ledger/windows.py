"""What a window of a ledger says: sums, the part of its progress a task lost to another, and whether to believe it.

Pure functions on what a run file holds. Nothing here is a mean of ratios: sums over the window first, ratios last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.measures import Array
from gradprobe.messages import Message

__all__ = ["Gate", "Window", "window"]


_RESIDUAL_LIMIT = 0.10
"""How much of the sum of |terms| the residual may be."""

_EARLIER_LIMIT = 0.01
"""How much of the sum of |terms| momentum from before the burst may be."""

_RESOLVED = 1.96
"""How many of its standard errors a task's own progress is to be above 0."""

_LEAST_ROWS = 8
"""Rows without which a window has no standard errors, and says nothing."""


_MATTERS = 0.10
"""Less of its lone progress is no loss to speak of."""


@dataclass(frozen=True)
class Gate:
    """A condition without which a number supports no claim.

    Attributes:
        name: Such as "residual", "earlier momentum", "own progress" or "rows".
        passed: False also where what it needs is not in the files.
        value: What was found, of the worst run; NaN: not there, or no number.
        limit: What it is held against.
        sentence: What was found, what is asked for, and what to do.
    """

    name: str
    passed: bool
    value: float
    limit: float
    sentence: Message


@dataclass(frozen=True)
class Window:
    """Sums of a ledger over the rows that count.

    Attributes:
        rows: (k,) which rows counted, by their place.
        left_out: How many rows of the window did not: reason -> how many.
        term: (T, S) change of each task's loss by each source's part of the updates of the layers, in units of loss.
        head: (T,) by the updates of what is not shared.
        change: (T,) as it was measured on the probe batch.
        drift: (T,) the part of ``change`` by what the losses detach, which no term can explain.
        residual: (T,) sum of all terms and ``drift`` minus ``change``.
        size: (T,) sum of |terms|: what the residual is held against.
        residual_error: (T,) standard error of ``residual`` from the rows' noise; NaN: too few rows. A residual of
            less than two of them may be noise: longer windows, larger batches. One of more is none: curvature.
        own: (T,) what each task's own part of the updates of the layers took off its loss.
        own_error: (T,) its standard error.
        interference: (T, T) C: the part of row i's own progress that column j cancelled (> 0) or added (< 0); -1 on
            the diagonal. NaN where one of the task's gates is shut.
        gates: (T) of each task, four each.
        alone: (T,) what the same gradients of its own would have taken off each task's loss without those of others,
            over the rows that tell. Under SGD the same as ``own``.
        shrunk: (T,) 1 - own / alone over these rows: the part of its lone progress that a task does not make itself.
            Under Adam all tasks share one second moment, so that a larger gradient of another task shortens its steps.
            0: its steps are as long as alone; 0.5 for a task beside its own copy, which makes the other half.
            NaN: no eight rows tell, ``alone`` is less than 1.96 of its standard errors above 0, or a gate other than
            that of own progress is shut.
        shrunk_error: (T,) its standard error from the rows' noise.
        lost: (T,) the part of its lone progress that it does not make with what others do to it: with C summed over
            all others ``1 - (1 - shrunk) (1 - C)``. Below 0: together it makes more. NaN: as ``shrunk``.
    """

    rows: NDArray[np.int64]
    left_out: Mapping[str, int]
    term: Array
    head: Array
    change: Array
    drift: Array
    residual: Array
    size: Array
    residual_error: Array
    own: Array
    own_error: Array
    interference: Array
    gates: Sequence[Sequence[Gate]]
    alone: Array
    shrunk: Array
    shrunk_error: Array
    lost: Array

    def passed(self, task: int) -> bool:
        """Whether what the window says of a task can be believed."""
        return all(gate.passed for gate in self.gates[task])

    def cancelled(self, task: int) -> float:
        """Of its lone progress, what all others' parts of the updates take: ``lost`` less ``shrunk``."""
        return float(self.lost[task] - self.shrunk[task])

    def dominated(self, task: int, margin: float = _MATTERS) -> bool:
        """Whether a task loses more than ``margin`` of its lone progress, and more by shorter steps than by what others
        cancel.
        """
        return bool(self.lost[task] > margin and self.shrunk[task] > self.cancelled(task))


def window(
    ledger: Mapping[str, NDArray[Any]],
    tasks: Sequence[str],
    *,
    start: float = -math.inf,
    stop: float = math.inf,
    layers: Sequence[int] | None = None,
) -> Window:
    """The sums of a ledger, its measure C and the gates of both.

    Args:
        ledger: ``run.ledger``: ``step``, ``burst`` (n,), ``term`` (n, L, T, S), ``alone`` (n, L, T; missing: unknown),
            ``head``, ``loss_change``, ``drift`` (n, T; where it is missing nothing drifts) and ``status`` (n,); 0 is a
            row that counts.
        tasks: (T,) names.
        start, stop: Steps ``start <= step < stop``.
        layers: Over which C is; None: all that two tasks reach, by the terms. A layer that one task has for itself is
            a head: nobody can cancel what it gains there. The residual is over all of them always, as the loss is.
    """
    term = np.asarray(ledger["term"], dtype=np.float64)
    layers = _shared(term) if layers is None else list(layers)
    head, change = (np.asarray(ledger[name], dtype=np.float64) for name in ("head", "loss_change"))
    drift = np.asarray(ledger["drift"], dtype=np.float64) if "drift" in ledger else np.zeros_like(change)
    step = np.asarray(ledger["step"])
    inside = (step >= start) & (step < stop)
    measured = np.asarray(ledger["status"]) == 0
    known = _known(term, head, change - drift)
    whole = np.nansum(term, axis=1)
    settled = _settled(whole, head, np.asarray(ledger["burst"]), inside & measured & known)
    left_out = {
        "not measured, or not to be counted": inside & ~measured,
        "an end, the correction or the change of the loss is unknown": inside & measured & ~known,
        "momentum from before the burst is in it": inside & measured & known & ~settled,
    }
    rows = np.flatnonzero(settled)
    chosen = whole if len(layers) == term.shape[1] else np.nansum(term[:, layers], axis=1)
    counts = {reason: int(which.sum()) for reason, which in left_out.items() if which.any()}
    found = _summed(whole[rows], chosen[rows], head[rows], change[rows], drift[rows], tasks, rows, counts)
    alone = np.asarray(ledger.get("alone", np.full(term.shape[:3], np.nan)), dtype=np.float64)
    return _held_against_alone(found, term[rows][:, layers], alone[rows][:, layers])


def _shared(term: Array) -> list[int]:
    """Which layers two tasks have had a gradient on; all of them where there is one task."""
    reached = np.any(np.isfinite(term) & (term != 0), axis=(0, 3)).sum(axis=1)
    return [int(layer) for layer in np.flatnonzero(reached >= min(2, term.shape[2]))]


def _known(term: Array, head: Array, change: Array) -> NDArray[np.bool_]:
    """(n,): a layer that a task does not reach is NaN in all rows, and one that joined later in those before: no reason
    to leave any out.
    """
    finite = np.isfinite(term)
    reached: NDArray[np.bool_] = np.any(finite, axis=(0, 3))  # (L, T)
    begun = np.logical_or.accumulate(finite.any(axis=(2, 3)), axis=0)[:, :, None, None]
    needed = reached[None, :, :, None] & begun
    there: NDArray[np.bool_] = np.all(finite | ~needed, axis=(1, 2, 3))
    some: NDArray[np.bool_] = np.any(finite, axis=(1, 3))  # (n, T)
    there &= np.all(some | ~reached.any(axis=0), axis=1)
    any_term = bool(reached.any()) or not term.shape[1]  # where nothing is shared there are heads alone
    found: NDArray[np.bool_] = there & np.isfinite(head).all(axis=1) & np.isfinite(change).all(axis=1)
    return found & any_term


def _settled(whole: Array, head: Array, burst: NDArray[Any], usable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(n,): from that row of each burst on from which momentum from before it is small in the rest, for every task."""
    found = np.zeros(len(whole), dtype=bool)
    earlier = np.abs(whole[..., -1])
    size = np.abs(whole).sum(axis=2) + np.abs(head)
    for number in np.unique(burst[usable]):
        places = np.flatnonzero((burst == number) & usable)
        rest, rest_size = (_sums_to_the_end(values[places]) for values in (earlier, size))
        small = (rest <= _EARLIER_LIMIT * rest_size).all(axis=1)
        if small.any():
            found[places[int(np.argmax(small)) :]] = True
    return found


def _sums_to_the_end(values: Array) -> Array:
    total: Array = values[::-1].cumsum(axis=0)[::-1]
    return total


def _summed(
    whole: Array,
    chosen: Array,
    head: Array,
    change: Array,
    drift: Array,
    tasks: Sequence[str],
    rows: NDArray[np.int64],
    left_out: Mapping[str, int],
) -> Window:
    count = len(tasks)
    term, heads, changed = whole.sum(axis=0), head.sum(axis=0), change.sum(axis=0)
    rest = whole.sum(axis=2) + head + drift - change  # (n, T)
    size = np.abs(term).sum(axis=1) + np.abs(heads)
    progress = -np.diagonal(chosen[..., :count], axis1=1, axis2=2)  # (n, T)
    own, own_error = progress.sum(axis=0), standard_error(progress)
    found = Window(
        rows=rows,
        left_out=left_out,
        term=term,
        head=heads,
        change=changed,
        drift=drift.sum(axis=0),
        residual=rest.sum(axis=0),
        size=size,
        residual_error=standard_error(rest),
        own=own,
        own_error=own_error,
        interference=np.full((count, count), np.nan),
        gates=(),
        **{name: np.full(count, np.nan) for name in ("alone", "shrunk", "shrunk_error", "lost")},
    )
    gates = [_gates(found, index, task) for index, task in enumerate(tasks)]
    shut = np.array([not all(gate.passed for gate in each) for each in gates])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = chosen.sum(axis=0)[:, :count] / own[:, None]
    return replace(found, interference=np.where(shut[:, None], np.nan, ratio), gates=gates)


def _held_against_alone(w: Window, term: Array, alone: Array) -> Window:
    """With what every task would have done alone; (k, L', T, S) and (k, L', T) of the rows that counted."""
    numbers = np.full((4, len(w.own)), np.nan)
    for task in range(len(w.own)):
        reached = np.isfinite(term[:, :, task, task])  # a layer that it does not reach adds nothing
        would = -np.where(reached, alone[:, :, task], 0.0).sum(axis=1)
        rows = np.isfinite(would)
        if rows.sum() < _LEAST_ROWS:
            continue
        would, made = would[rows], -np.nansum(term[rows][:, :, task, : len(w.own)], axis=1)
        total, own, all_tasks = would.sum(), made[:, task].sum(), made.sum()
        numbers[0, task] = total
        gates = [gate for gate in w.gates[task] if gate.name != "own progress"]
        if all(gate.passed for gate in gates) and total > 0 and total >= _RESOLVED * standard_error(would):
            error = standard_error(made[:, task] - own / total * would) / total
            numbers[1:, task] = 1 - own / total, error, 1 - all_tasks / total
    return replace(w, alone=numbers[0], shrunk=numbers[1], shrunk_error=numbers[2], lost=numbers[3])


def _gates(w: Window, index: int, task: str) -> list[Gate]:
    residual, error, size = abs(w.residual[index]), w.residual_error[index], w.size[index]
    part = _over(residual, size)
    kind = "gate.residual" if residual > _RESOLVED * error else "gate.residual_noise"
    earlier, own = _over(abs(w.term[index, -1]), size), _over(w.own[index], w.own_error[index])
    count = len(w.rows)
    said = {
        "rows": Message("gate.rows", n=count),
        "residual": Message(kind, task=task, part=part),
        "earlier": Message("gate.earlier", task=task, part=earlier),
        "own": Message("gate.own", task=task, ratio=own),
    }
    found = [
        Gate("rows", count >= _LEAST_ROWS, float(count), _LEAST_ROWS, said["rows"]),
        Gate("residual", part <= _RESIDUAL_LIMIT, part, _RESIDUAL_LIMIT, said["residual"]),
        Gate("earlier momentum", earlier <= _EARLIER_LIMIT, earlier, _EARLIER_LIMIT, said["earlier"]),
        Gate("own progress", own >= _RESOLVED, own, _RESOLVED, said["own"]),
    ]
    # with too few rows there may be nothing to say of the others
    return found if found[0].passed else [gate for gate in found if not math.isnan(gate.value)]


def _over(a: float, b: float) -> float:
    """NaN for 0 / 0, without a warning."""
    return float(a / b) if b else (math.nan if not a else math.copysign(math.inf, a))


def standard_error(rows: Array) -> Array:
    """Standard error of the sum of consecutive rows: (n, ...) -> (...).

    Neighbours share a gradient, and momentum spreads one over many: Newey and West's estimate with Bartlett weights,
    over about 1.5 sqrt(n) neighbours. What rows change by smoothly, as progress does that slows down, is no noise:
    their quadratic trend is taken off first. That takes some slow noise along, which a factor gives back: it is exact
    for independent rows. NaN with too few rows.

    Source: Newey and West, "A Simple, Positive Semi-Definite, Heteroskedasticity and Autocorrelation Consistent
    Covariance Matrix", 1987.
    """
    count = len(rows)
    if count < _LEAST_ROWS:
        return np.full(rows.shape[1:], np.nan)
    place = np.linspace(-1, 1, count)
    trend = np.linalg.qr(np.stack([np.ones(count), place, place**2], axis=1))[0]
    apart = rows - np.tensordot(trend, np.tensordot(trend, rows, (0, 0)), (1, 0))
    reach = max(min(math.ceil(1.5 * math.sqrt(count)), count // 6 - 1), 1)
    total = np.square(apart).sum(axis=0)
    for lag in range(1, min(reach, count - 1) + 1):
        total = total + 2 * (1 - lag / (reach + 1)) * (apart[lag:] * apart[:-lag]).sum(axis=0)
    taken = 3 * (reach + 1)  # of count: three trends, each over as many weights as the neighbours' sum to
    result: Array = np.sqrt(np.maximum(total, 0.0) * count / (count - taken))
    return result
