"""Put beside a probe, it values each part of the updates that were made in units of every task's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor, nn

from gradprobe.errors import ProbeError
from gradprobe.ledger.terms import correction, effects, in_float64, noise_products, own_effects, term
from gradprobe.ledger.update_parts import rules
from gradprobe.measures import Array
from gradprobe.probes.calls import is_present
from gradprobe.probes.clock import whole
from gradprobe.probes.passes import Gradients
from gradprobe.probes.task_gradients import TaskGradients
from gradprobe.rows import EARLIER_SOURCES, MEASURED, LedgerRow
from gradprobe.updates import heads
from gradprobe.updates.optimizer_watch import NOTHING_SHARED, MeasuredStep, OptimizerWatch, Reader
from gradprobe.updates.probe_batch import HeldLosses, ProbeBatch, ProbeBatchValue, value_probe_batch
from gradprobe.updates.taking_apart import TakenApart, UpdateBefore, UpdateParts, numbers_by_layer, side_by_side

_ENDS = ("batch", "probe")

_NO_RIGHT_END = "no step was measured after it, whose batch would value the right end"
NO_MICRO = "not measured in micro-batches: what the batch's own noise adds to the left end is unknown"
YOUNG_ADAM = "one of Adam's first steps, whose second moment depends too much on the present batch"
_FOREIGN_HEAD = "a private parameter was given something else than a multiple of its task's gradient"
_COMMON_HEAD = "tasks share parameters that are not measured; leave shared= out"


@dataclass
class _OpenRow:
    """A row whose right end is to come.

    Attributes:
        row: All else.
        left: (L, T, S) of each layer, with its correction.
        alone: (L, T) the same of what each task alone would have made.
        head: (T,) the same of the private parameters.
        pieces: The parts of the update.
        moved: (T) the update of the private parameters.
    """

    row: LedgerRow
    left: Array
    alone: Array
    head: Array
    pieces: Sequence[UpdateParts]
    moved: heads.ByTask


class Ledger(Reader):
    """The loss ledger: what each task's part of the updates that were really made did to every task's loss.

    Each update is taken apart by source (the tasks, weight decay, momentum from before), and each part is valued by the
    mean of the task gradients at both ends of the step: the Shapley value of the change of the loss, up to terms of
    third order. The change itself is measured on one fixed probe batch; what the terms leave of it is the residual,
    without which none of them means anything: :func:`gradprobe.ledger.windows.window` sums, judges and gives C.

    Whose gradients value the parts is ``ends``:

    - ``"batch"``: the training's own. The left end shares the batch with the update, which is corrected where the step
      was measured in micro-batches (``micro=`` of the probe's calls); the right end is the next step's batch. No passes
      more, but the noise of every batch is in every term: where a step's progress is small against it, a window's
      residual is noise and its gate stays shut.
    - ``"probe"``: those of the probe batch. Nothing to be corrected, and no noise between terms and measured change; C
      is then of the probe batch's loss, and says as much of other data as its samples do. One forward and T backward
      passes through the probe batch at each step, and no micro-batches needed.

    It needs every task's gradient at every step: of the whole run, or of bursts. A burst's momentum from before it is a
    column of its own, and its rows count from where that is less than 1 % of the terms: with momentum 0.9 some 45 steps
    after its beginning. A first step of Adam is valued but does not count.

    It keeps T + 2 first moments and T + 2 parts of the update, and with ``ends="batch"`` T x m gradients of
    micro-batches until after the optimizer's step: all as large as the shared parameters. Nothing of the training
    changes.

    Args:
        probe: Makes the losses of one fixed probe batch, the same samples at each call: a mapping of task to loss, or
            such mappings one after the other for its micro-batches, of equal size and as large as the training's where
            there is BatchNorm. It leaves parameters alone, and may change modes and buffers, which are put back; what
            it draws is the same each time. None: the change of the losses is not measured, and no gate opens.
        ends: "batch" or "probe".
        burst: How many steps to measure of every ``every``; None: all of them.
        every: From the beginning of a burst to that of the next.
        samples: Of the probe batch, for the file; 0: unknown.

    Raises:
        ProbeError: An argument out of its range.

    Example:
        >>> fixed = lambda: losses_of(model.train(), probe_batch)  # doctest: +SKIP
        >>> ledger = Ledger(fixed, ends="probe")  # doctest: +SKIP
        >>> probe = attach(model, ("det", "cls"), "run.h5", optimizer=optimizer, ledger=ledger)  # doctest: +SKIP
    """

    name = "ledger"
    keeps = True

    def __init__(
        self,
        probe: ProbeBatch | None = None,
        *,
        ends: str = "batch",
        burst: int | None = None,
        every: int | None = None,
        samples: int = 0,
    ) -> None:
        if ends not in _ENDS:
            raise ProbeError(f"ends={ends!r}: there are {' and '.join(map(repr, _ENDS))}.")
        if ends == "probe" and probe is None:
            raise ProbeError("ends='probe' values the parts on the probe batch: give what makes its losses.")
        if (burst is None) != (every is None):
            raise ProbeError(f"burst={burst} and every={every} go together: so many steps of every so many.")
        self.burst = whole("burst", burst) if burst is not None else None
        self.every = whole("every", every) if every is not None else None
        if self.burst is not None and self.every is not None and self.burst > self.every:
            raise ProbeError(f"burst={burst} is longer than every={every}: leave both out to measure all steps.")
        self.ends, self.samples, self._probe = ends, whole("samples", samples, least=0), probe
        self._watch: OptimizerWatch | None = None
        self._held = HeldLosses()
        # Of the present step, and of the one whose right end is to come.
        self._open: _OpenRow | None = None
        self._row: LedgerRow | None = None
        self._heads: heads.Heads | None = None
        self._micro: list[heads.ByTask] = []
        self._mean: heads.ByTask = []
        self._valued: ProbeBatchValue | None = None
        self._point: tuple[int, int] | None = None
        self._young = self._common = False

    @property
    def about(self) -> dict[str, Any]:
        """As it is stored in the file."""
        return {"ends": self.ends, "burst": self.burst or 0, "every": self.every or 0, "samples": self.samples}

    # ---- called by what follows the steps

    def check(self, tasks: Sequence[str], gradients: TaskGradients) -> None:
        """Whether it can belong to a probe.

        Raises:
            ProbeError: It belongs to one already, or there are several processes.
        """
        if self._watch is not None:
            raise ProbeError("this Ledger belongs to another probe; make one anew for each.")
        if gradients.ranks.size > 1:
            raise ProbeError("ledger= under data parallelism: each process would value its own batch; leave it out.")
        self._tasks = tuple(tasks)
        gradients.keep(micro=self.ends == "batch")

    def open(self, watch: OptimizerWatch, model: nn.Module) -> None:
        self._watch, self._model = watch, model

    def wants(self, step: int) -> bool:
        """All steps, those of bursts, and the one after each, which gives its last row the right end."""
        return self._counts(step) or (self.ends == "batch" and step > 0 and self._counts(step - 1))

    def layers_joined(self) -> None:
        """The last row has no right end, as parts of its update would be looked for in the wrong places."""
        self.close()

    def losses_known(self, losses: Sequence[Sequence[Tensor]]) -> None:
        """Gradients on the private parameters, by passes that end there."""
        self._row, self._heads, self._micro = None, None, []
        if not all(is_present(loss) for one in losses for loss in one):
            return  # a task is absent: the row will say so
        watch = self._now
        own = watch.private(losses[0])
        self._common = heads.common_to_several(self._model, watch.shared, losses[0])
        if self.ends == "batch" and self.wants(watch.now.clock.step):
            self._micro = heads.private_gradients(self._model, losses, own, watch.now.scale.factor)

    def step_measured(self, at: MeasuredStep) -> None:
        """The right end of the step before, and a row of this one."""
        fits = bool(self._micro) and at.status == MEASURED and len(at.shares) == len(self._micro)
        self._mean = heads.mean_of(self._micro, at.shares) if fits else []
        waiting, self._open = self._open, None
        if waiting is not None:
            if waiting.row.step == at.step - 1 and fits:
                self._write(self._right(waiting, at.gradients or []))
            else:
                self._write(replace(waiting.row, status=_NO_RIGHT_END))
        self._row = self._empty(at) if self._counts(at.step) else None

    def before_update(self, at: MeasuredStep, before: UpdateBefore | None) -> None:
        """What the private parameters are, and were given; and the probe batch at the left end."""
        if self._row is None:
            return
        optimizer = self._now.optimizer
        self._heads = heads.look_at_heads(optimizer, at.private)
        known = [*rules(optimizer, self._now.shared.parameters), *chain.from_iterable(self._heads.known)]
        self._young = heads.in_first_adam_steps(known)
        if self._probe is not None and self._point != self._where():
            self._valued = self._value(at)

    def after_update(self, at: MeasuredStep, taken: TakenApart | None) -> None:
        """The left end, its correction, and what the probe batch says."""
        if self._row is None or self._heads is None:
            return
        row, left, right = replace(self._row, status=self._doubt()), self._valued, None
        if self._probe is not None and left is not None:
            right = self._value(at, remember=self._held.wants_forwards(left))
            kept = self._held.losses(self._model, self._tasks, self._probe, left, right)
            self._valued, self._point = replace(right, forwards=None), self._where()
            row = replace(row, loss_change=right.losses - left.losses, drift=right.losses - kept)
        pieces, moved = taken.pieces if taken is not None else (), self._heads.moved()
        if self.ends == "batch":
            self._open = self._at_the_batch(at, taken, row, moved)
        elif left is not None and right is not None:
            row = self._at_the_probe(row, left, right, pieces, moved)
        self._row = row

    def step_over(self, at: MeasuredStep, status: str) -> None:
        """Hand the row on, unless its right end is to come."""
        row, self._row, self._heads = self._row, None, None
        if self._open is not None and self._open.row.step == at.step and status in (MEASURED, NOTHING_SHARED):
            self._open.row = replace(self._open.row, overhead=self.seconds)
        elif self._counts(at.step):
            self._open = None
            row = row or self._empty(at)
            told = row.status if status in (MEASURED, NOTHING_SHARED) else status
            self._write(replace(row, status=told, overhead=self.seconds))

    def close(self) -> None:
        """The last row has no right end."""
        if self._open is not None:
            self._write(replace(self._open.row, status=_NO_RIGHT_END))
        self._reset()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept beyond a step: the row before loses its right end, and is left out."""
        self._reset()

    # ---- both ends

    def _at_the_batch(
        self, at: MeasuredStep, taken: TakenApart | None, row: LedgerRow, moved: heads.ByTask
    ) -> _OpenRow:
        assert self._heads is not None
        left = self._nothing() if taken is None else taken.effect
        added, added_alone = self._nothing(), _own(self._nothing())
        if taken is not None:
            added, added_alone = self._correction(at, taken)
        pieces = taken.pieces if taken is not None else ()
        alone = self._alone_at_the_left(at.gradients or [], pieces, left) + added_alone
        head = heads.private_effects(self._mean, moved)
        head += self._heads.correction(self._now.optimizer, self._micro, at.shares, self._mean)
        status = row.status
        if len(self._micro) < 2:
            status = NO_MICRO
        elif status == MEASURED and not np.isfinite(head).all():
            status = _FOREIGN_HEAD
        row = replace(row, left=_over_layers(left), correction=_over_layers(added), status=status)
        return _OpenRow(row, left + added, alone, head, pieces, moved)

    def _right(self, waiting: _OpenRow, gradients: Sequence[Gradients]) -> LedgerRow:
        ((right, alone),) = self._effects([gradients], waiting.pieces)
        return replace(
            waiting.row,
            right=_over_layers(right),
            term=term(waiting.left, np.zeros_like(right), right),
            alone=0.5 * (waiting.alone + alone),
            head=0.5 * (waiting.head + heads.private_effects(self._mean, waiting.moved)),
        )

    def _at_the_probe(
        self,
        row: LedgerRow,
        left: ProbeBatchValue,
        right: ProbeBatchValue,
        pieces: Sequence[UpdateParts],
        moved: heads.ByTask,
    ) -> LedgerRow:
        (begin, alone), (end, alone_after) = self._effects([left.gradients or [], right.gradients or []], pieces)
        first, last = (heads.private_effects(value.private or [], moved) for value in (left, right))
        nothing = np.zeros_like(begin)
        return replace(
            row,
            left=_over_layers(begin),
            correction=_over_layers(nothing),
            right=_over_layers(end),
            term=term(begin, nothing, end),
            alone=0.5 * (alone + alone_after),
            head=0.5 * (first + last),
        )

    def _effects(self, ends: Sequence[Sequence[Gradients]], pieces: Sequence[UpdateParts]) -> list[tuple[Array, Array]]:
        """At each end (L, T, S) of the parts, and (L, T) of what each task alone would have made.

        NaN where a task does not reach a layer.
        """
        shared = self._now.shared
        found = [(self._nothing(), _own(self._nothing())) for _ in ends]
        for piece in pieces:
            sizes = numbers_by_layer(shared, piece.places)
            layers, counts, made = list(sizes), list(sizes.values()), in_float64(piece.made)
            for gradients, (effect, alone) in zip(ends, found, strict=True):
                rows = in_float64(side_by_side(gradients, shared.parameters, piece.places))
                added = effects(rows, made, counts)
                effect[layers] += added
                alone[layers] += _own(added) if piece.alone is None else own_effects(rows, piece.alone, counts)
        reach = np.array(shared.reach, dtype=bool).reshape(len(shared.layers), len(self._tasks))
        return [
            (np.where(reach[:, :, None], effect, np.nan), np.where(reach, alone, np.nan)) for effect, alone in found
        ]

    def _alone_at_the_left(self, gradients: Sequence[Gradients], pieces: Sequence[UpdateParts], made: Array) -> Array:
        """(L, T) of what each task alone would have made; ``made``: (L, T, S) of the parts, which are known there."""
        if all(piece.alone is None for piece in pieces):
            return _own(made)
        ((_, found),) = self._effects([gradients], pieces)
        return found

    def _correction(self, at: MeasuredStep, taken: TakenApart) -> tuple[Array, Array]:
        """(L, T, S), and (L, T) of what each task alone would have made."""
        shared, tasks = self._now.shared, len(self._tasks)
        noise = np.zeros((len(shared.layers), tasks, tasks))
        alone = _own(noise)
        for piece in taken.pieces:
            layers, sizes = zip(*numbers_by_layer(shared, piece.places).items(), strict=True)
            every = [at.gradients or [], *at.micro]
            mean, *micro = (side_by_side(tasks_, shared.parameters, piece.places) for tasks_ in every)
            added = noise_products(mean, micro, at.shares, sizes, piece.factor)
            noise[list(layers)] += added
            if piece.alone_factor is None:
                alone[list(layers)] += _own(added)
                continue
            for task, factor in enumerate(piece.alone_factor):
                rows = [one[task : task + 1] for one in (mean, *micro)]
                alone[list(layers), task] += noise_products(rows[0], rows[1:], at.shares, sizes, factor)[:, 0, 0]
        found = correction(noise, at.weights, taken.scale, tasks + len(EARLIER_SOURCES))
        return found, alone * (taken.scale * at.weights)

    def _value(self, at: MeasuredStep, *, remember: bool = False) -> ProbeBatchValue:
        assert self._probe is not None
        shared = self._now.shared.parameters if self.ends == "probe" else None
        return value_probe_batch(self._model, self._tasks, self._probe, shared, at.private, remember=remember)

    def _where(self) -> tuple[int, int]:
        """Changes with the parameters, and with the step."""
        return self._now.now.clock.step, sum(p._version for p in self._model.parameters())

    # ---- what it knows

    @property
    def _now(self) -> OptimizerWatch:
        assert self._watch is not None, "a Ledger is used by the probe that it was given to"
        return self._watch

    def _reset(self) -> None:
        self._open = self._row = self._heads = self._valued = self._point = None
        self._micro, self._mean = [], []
        self._young = self._common = False

    def _counts(self, step: int) -> bool:
        """Whether a step has a row."""
        return self.burst is None or self.every is None or step % self.every < self.burst

    def _doubt(self) -> str:
        """Why a row does not count though it is known."""
        if self._common:
            return _COMMON_HEAD
        return YOUNG_ADAM if self._young else MEASURED

    def _write(self, row: LedgerRow) -> None:
        self._now.now.report.row(row)

    def _nothing(self) -> Array:
        tasks = len(self._tasks)
        return np.zeros((len(self._now.shared.layers), tasks, tasks + len(EARLIER_SOURCES)))

    def _empty(self, at: MeasuredStep) -> LedgerRow:
        unknown, tasks = np.full_like(self._nothing(), np.nan), len(self._tasks)
        return LedgerRow(
            step=at.step,
            epoch=at.epoch,
            time=at.time,
            burst=at.step // self.every if self.every is not None else 0,
            term=unknown,
            left=np.full(unknown.shape[1:], np.nan),
            correction=np.full(unknown.shape[1:], np.nan),
            right=np.full(unknown.shape[1:], np.nan),
            head=np.full(tasks, np.nan),
            alone=_own(unknown),
            loss_change=np.full(tasks, np.nan),
            drift=np.full(tasks, np.nan),
            status=at.status,
        )


def _own(values: Array) -> Array:
    """(L, T) from (L, T, S): of each task, what its own source did."""
    return np.diagonal(values[..., : values.shape[1]], axis1=1, axis2=2).copy()


def _over_layers(values: Array) -> Array:
    """(T, S) from (L, T, S); a layer that a task does not reach adds nothing. NaN: unknown on every layer."""
    if not len(values):
        return np.zeros(values.shape[1:])
    return np.where(np.isnan(values).all(axis=0), np.nan, np.nansum(values, axis=0))
