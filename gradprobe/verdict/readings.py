"""The measures of one run: what a comparison takes the difference of. Pure functions on :class:`Evidence`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gradprobe.ledger.windows import Window, window
from gradprobe.measures import Array, first_settled_step, over_counted
from gradprobe.statistics import Estimate, Mean, pooled, pooled_ratio
from gradprobe.verdict.evidence import Evidence, Rows

Span = tuple[int, int] | None
"""Training steps that count, from the first up to before the second; None: all."""


@dataclass(frozen=True)
class Pair:
    """An ordered pair of tasks: what ``by`` does to ``task``."""

    task: str
    by: str

    @property
    def name(self) -> str:
        """``cls>det``: what cls does to det."""
        return f"{self.by}>{self.task}"

    @property
    def unordered(self) -> str:
        """``det|cls`` is the same pair for the cosine."""
        return f"{self.task}|{self.by}"


def shared_layers(run: Evidence, tasks: Sequence[str]) -> set[str]:
    """Layers that all of these tasks reach."""
    if run.single or not all(task in run.tasks for task in tasks):
        return set()
    columns = [run.tasks.index(task) for task in tasks]
    return {name for name, reached in zip(run.layers, run.reach[:, columns], strict=True) if reached.all()}


def places(run: Evidence, layers: Sequence[str]) -> NDArray[np.intp]:
    """Where layers are in a run, in its order."""
    wanted = set(layers)
    return np.array([i for i, name in enumerate(run.layers) if name in wanted], dtype=np.intp)


def stream(run: Evidence) -> Rows | None:
    """The rows that a claim on gradients may rest on: of the probe loader, else of the training with their noise."""
    return run.probed if run.probed is not None else run.training


def estimate(
    run: Evidence, layers: Sequence[str], tasks: Sequence[str], span: Span = None, *, apart: bool = False
) -> Estimate | None:
    """The pooled estimate of some tasks over some layers together; None: nothing was recorded in micro-batches.

    Args:
        run: One run.
        layers: Names; those that it has.
        tasks: Names, in the order of the estimate.
        span: Which steps count.
        apart: Each layer by itself, in the run's order, instead of all together.
    """
    return _estimate(run, tuple(layers), tuple(tasks), span, apart)


@lru_cache(maxsize=1024)  # several questions and gates ask for the same
def _estimate(
    run: Evidence, layers: tuple[str, ...], tasks: tuple[str, ...], span: Span, apart: bool
) -> Estimate | None:
    rows = stream(run)
    if rows is None:
        return None
    gram, noise, chosen = _over(run, rows, layers, tasks, span, apart)
    size = rows.batch_size[chosen].astype(np.float64)
    return pooled(gram, noise, np.where(size > 0, size, math.nan))


def _over(
    run: Evidence, rows: Rows, layers: Sequence[str], tasks: Sequence[str], span: Span, apart: bool
) -> tuple[Array, Array, NDArray[np.bool_]]:
    chosen = inside(rows.step, span)
    columns = np.array([run.tasks.index(task) for task in tasks], dtype=np.intp)
    given, there = np.flatnonzero(chosen), places(run, layers)
    where = np.ix_(given, there, columns, columns)
    gram, noise = (np.asarray(one[where], dtype=np.float64) for one in (rows.gram, rows.noise))
    if not apart:
        counts = (
            np.ones(gram.shape[:-1], dtype=bool) if rows.counts is None else rows.counts[np.ix_(given, there, columns)]
        )
        every = np.broadcast_to(counts.all(axis=-1, keepdims=True), counts.shape)  # what all of them reach at that row
        gram, noise = over_counted(gram, every), over_counted(noise, every)
    return gram, noise, chosen


def inside(step: NDArray[np.int64], span: Span) -> NDArray[np.bool_]:
    """(n,): which steps count."""
    if span is None:
        return np.ones(len(step), dtype=bool)
    found: NDArray[np.bool_] = (step >= span[0]) & (step < span[1])
    return found


@dataclass(frozen=True)
class Dominance:
    """Who decides the update.

    Attributes:
        share: (T,) of the summed squared lengths of the weighted gradients, less their noise; NaN: a gradient cannot
            be distinguished from noise.
        largest: The largest of them.
    """

    share: Array
    largest: float


def dominance(run: Evidence, layers: Sequence[str], span: Span = None) -> Dominance | None:
    """The shares of all tasks over some layers; None: nothing was recorded in micro-batches."""
    rows = stream(run)
    found = estimate(run, layers, run.tasks, span)
    if rows is None or found is None:
        return None
    gram, noise, chosen = _over(run, rows, layers, run.tasks, span, apart=False)
    weight = run.weights_at(rows.step[chosen])
    square = np.diagonal(gram - noise, axis1=1, axis2=2) * np.square(weight)
    known = np.isfinite(square).all(axis=1)
    total = square[known].sum(axis=0)
    if not known.any() or not found.square_resolved.all() or total.sum() <= 0:
        return Dominance(np.full(len(run.tasks), math.nan), math.nan)
    share = total / total.sum()
    return Dominance(share, float(share.max()))


def direct(baseline: Evidence, arm: Evidence, pair: Pair, layers: Sequence[str], span: Span = None) -> Mean | None:
    """What an arm's weights would do at the baseline's own checkpoints: ``-sum w_j U_ij / sum w_i U_ii``.

    On the scale of C: above 0, ``by`` cancels progress of ``task``. With ``arm`` the baseline itself, that of its own
    weights. None: nothing was recorded in micro-batches, or the arm has no weights. NaN: the gradient of ``task``
    cannot be distinguished from noise, so that what is divided by may be 0.
    """
    rows = stream(baseline)
    if rows is None or not len(arm.step):
        return None
    gram, noise, chosen = _over(baseline, rows, layers, (pair.task, pair.by), span, apart=False)
    true = gram - noise
    weight = arm.weights_at(rows.step[chosen])
    own, other = (weight[:, arm.tasks.index(task)] for task in (pair.task, pair.by))
    resolved = estimate(baseline, layers, (pair.task, pair.by), span)
    known = resolved is not None and bool(resolved.square_resolved[0])
    return pooled_ratio(-other * true[:, 0, 1], own * true[:, 0, 0] if known else np.full(len(own), math.nan))


def ledger(run: Evidence, layers: Sequence[str], span: Span = None) -> Window | None:
    """The window sums of a run's ledger, with C over these layers; None: there is no ledger.

    The first steps of Adam are left out, and those of an optimizer that the file does not name.
    """
    return _ledger(run, tuple(layers), span)


@lru_cache(maxsize=1024)
def _ledger(run: Evidence, layers: tuple[str, ...], span: Span) -> Window | None:
    if not run.ledger:
        return None
    start, stop = span if span is not None else (0, np.inf)
    start = max(start, first_settled_step(str(run.setting.get("optimizer", ""))))
    return window(run.ledger, run.tasks, start=start, stop=stop, layers=[int(i) for i in places(run, layers)])


def ledger_by_layer(run: Evidence, found: Window, pair: Pair, layers: Sequence[str]) -> Array:
    """Each layer's part of C, (L',) in the order of ``layers``; they sum to C."""
    i, j = run.tasks.index(pair.task), run.tasks.index(pair.by)
    order = [run.layers.index(name) for name in layers]
    term = np.asarray(run.ledger["term"], dtype=np.float64)[found.rows][:, order, i, j]
    result: Array = np.nansum(term, axis=0) / found.own[i]  # a layer that joined later is in no row before
    return result
