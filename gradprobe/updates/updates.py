"""Put beside a probe, it records what the optimizer makes of the gradients that the probe measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.errors import ProbeError
from gradprobe.ledger.update_parts import why_not
from gradprobe.measures import Array
from gradprobe.probes.graph import SharedLayers
from gradprobe.probes.level import Level
from gradprobe.probes.measuring import Measuring
from gradprobe.probes.meter import Meter
from gradprobe.probes.passes import Gradients
from gradprobe.probes.stopwatch import Stopwatch
from gradprobe.rows import EARLIER_SOURCES, MEASURED, UpdateRow
from gradprobe.updates.clip import Limit, norms, scale_without
from gradprobe.updates.drift import Drift
from gradprobe.updates.parameters import everything, private, squares
from gradprobe.updates.taking_apart import WHOLE, Before, Kept, look_after, look_before

T = TypeVar("T")

NO_GRADIENT = "the optimizer was given no gradient, so the step changed nothing"
SEVERAL_CALLS = "the update came from several calls of the probe: accumulated, or after a step that was skipped"
FOREIGN_GRADIENT = "the optimizer's gradient is no multiple of the weighted sum of the tasks' gradients"
FOREIGN_UPDATE = "the update is not the sum of its parts: something else than the optimizer's own rule made it"
NOTHING_SHARED = "the tasks share no layer, so there is no update that both have a part in"
NOT_KEPT = "the tasks' gradients of this step were not kept"
CLOSURE = "the optimizer's step makes its own gradient (a closure), which cannot be seen before the step"
SCALED_INSIDE = "a fused optimizer takes the loss scale off within its step, where it cannot be seen"


@dataclass
class Pending:
    """A step that was measured, and whose update is to come."""

    row: UpdateRow
    weights: Array
    gram: Array
    gradients: list[Gradients] | None
    private: list[list[nn.Parameter]]


class Updates:
    """What the optimizer makes of the gradients, at the steps at which a probe measures them.

    Clipping and each task's part in it; steps that changed nothing; how far BatchNorm's running statistics moved; and
    the update that was really made, after momentum and preconditioning, taken apart by task: each task's share of it,
    the cosine between the tasks' parts, and what each part changes each task's loss by, to first order.

    The update can be taken apart for SGD, Adam and AdamW in their common forms; of others everything else is recorded.
    Momentum from steps that were not measured is a part of its own: at ``every=1`` it dies away after the first steps;
    measured every k-th step, with momentum m, tasks explain about (1 - m) / (1 - m^k) of the moment.

    It costs no backward pass: the probe's gradients are kept until the optimizer's step, with T + 2 first moments and
    one copy of the shared parameters. Nothing of the training changes.

    Example:
        >>> probe = attach(model, ("det", "cls"), "run.h5", optimizer=optimizer, updates=True)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._measuring: Measuring | None = None
        self._pending: Pending | None = None
        self._before: Before | None = None
        self._kept: Kept = {}
        self._private: list[list[nn.Parameter]] | None = None
        self._limit = Limit()
        self._calls = self._skipped = 0
        self._passed = 0  # updates since the last one that was taken apart
        self._scale: float | None = None
        self._closure = False

    # ---- called by the probe

    def check(self, tasks: Sequence[str], level: Level, optimizer: Optimizer | None, meter: Meter) -> None:
        """Whether it can belong to a probe.

        Raises:
            ProbeError: It belongs to one already, or what it needs is not there.
        """
        if self._measuring is not None:
            raise ProbeError("these Updates belong to another probe; make them anew for each.")
        if optimizer is None:
            raise ProbeError("updates= looks at what the optimizer does: pass optimizer= too.")
        if not level.parameters:
            raise ProbeError("updates= needs gradients on parameters: attach with level='parameters' or 'both'.")
        if clash := [name for name in EARLIER_SOURCES if name in tasks]:
            raise ProbeError(f"updates=: a task cannot be called {clash[0]!r}, as a part of an update is.")
        meter.keep()

    def open(self, measuring: Measuring, model: nn.Module) -> None:
        """Belong to a probe."""
        assert measuring.optimizer is not None
        self._measuring, self._model, self._optimizer = measuring, model, measuring.optimizer
        self._drift = Drift(model)
        measuring.clock.around(self._optimizer, self._before_step, self._after_step)

    def measured(self, losses: Sequence[Tensor], weights: Array, gram: Array, status: str) -> None:
        """A step was measured: its update will be looked at."""
        watch = Stopwatch(self._now.meter.device)
        with watch.running():
            self._pending, _ = self._guarded(lambda: self._begun(losses, weights, gram, status))
        if self._pending is not None:
            self._pending.row = replace(self._pending.row, overhead=watch.seconds)

    def called(self) -> None:
        """A call of the probe is over; a loss scale that has fallen since the last one tells of a skipped step."""
        self._calls += 1
        factor = self._now.scale.factor
        if self._scale is not None and factor < self._scale:
            self._skipped += 1
        self._scale = factor

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "skipped": self._skipped,
            "passed": self._passed,
            "kept": [[list(places), moments] for places, moments in self._kept.items()],
            "limit": self._limit.state_dict(),
            "drift": self._drift.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped."""
        device = self._now.meter.device
        self._skipped, self._passed = state["skipped"], state["passed"]
        self._kept = {tuple(places): [m.to(device) for m in moments] for places, moments in state["kept"]}
        self._limit.load_state_dict(state["limit"])
        self._drift.load_state_dict(state["drift"])
        self._pending = self._before = None
        self._calls, self._scale = 0, None

    # ---- one step

    def _begun(self, losses: Sequence[Tensor], weights: Array, gram: Array, status: str) -> Pending:
        measuring, shared = self._now, self._shared
        kept = measuring.meter.kept if status == MEASURED else None
        factor = measuring.scale.factor
        gradients = None
        if kept:
            gradients = [[None if g is None or factor == 1 else g / factor for g in task] for task in kept]
            gradients = kept if factor == 1 else gradients
            measuring.meter.keep()  # the list is ours now
        if self._private is None and status == MEASURED:
            self._private = private(self._model, shared, losses)
        row = self._empty(status)
        mean, variance, batches = self._drift.look(row.step)
        row = replace(row, bn_mean_drift=mean, bn_variance_drift=variance, bn_batches=batches)
        return Pending(row, weights, gram, gradients, self._private or [])

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        self._closure = any(given is not None for given in (*args[1:2], options.get("closure")))
        if self._closure:
            return
        idle = self._counted()
        if self._pending is not None:
            self._follow(self._pending, lambda pending: self._look(pending, idle))

    def _counted(self) -> bool:
        """Count the step that is made; whether it has no gradient."""
        idle = all(p.grad is None for group in self._optimizer.param_groups for p in group["params"])
        self._skipped += idle
        self._passed += not idle
        calls, self._calls = self._calls, 0
        if self._pending is not None:
            self._pending.row = replace(self._pending.row, calls=calls, skipped=self._skipped)
        return idle

    def _after_step(self, *_: Any) -> None:
        if self._closure:  # by now it has been called, and with it the probe
            self._counted()
            if self._pending is not None and self._pending.row.status == MEASURED:
                self._pending.row = replace(self._pending.row, status=CLOSURE)
        pending, before = self._pending, self._before
        self._pending = self._before = None
        if pending is None:
            return
        if before is not None:
            self._follow(pending, lambda pending: self._take_apart(pending, before))
        self._now.report.updates(pending.row)
        self._now.clock.schedule.spent(pending.row.overhead)

    def _follow(self, pending: Pending, look: Callable[[Pending], UpdateRow]) -> None:
        """Go on with a row; where that fails, it says so."""
        watch = Stopwatch(self._now.meter.device)
        with watch.running():
            row, status = self._guarded(lambda: look(pending))
        row = row or replace(pending.row, status=status)
        pending.row = replace(row, overhead=row.overhead + watch.seconds)

    def _look(self, pending: Pending, idle: bool) -> UpdateRow:
        """At the gradient that the optimizer is given."""
        row, gradients = pending.row, pending.gradients
        if row.status != MEASURED:
            return row
        if not self._shared.layers:
            return replace(row, status=NOTHING_SHARED)
        if gradients is None:
            return replace(row, status=NOT_KEPT)
        if idle:
            return replace(row, status=NO_GRADIENT)
        if row.calls > 1:
            return replace(row, status=SEVERAL_CALLS)
        if getattr(self._optimizer, "grad_scale", None) is not None:
            return replace(row, status=SCALED_INSIDE)
        foreign, shared = why_not(self._optimizer), self._shared.parameters
        before = look_before(self._optimizer, shared, gradients, pending.weights, self._kept, self._passed - 1, foreign)
        if not before.unexplained <= WHOLE:
            return replace(row, status=FOREIGN_GRADIENT)
        self._before = None if foreign else before
        return replace(self._clipped(pending, before.scale), status=foreign or MEASURED)

    def _clipped(self, pending: Pending, scale: float) -> UpdateRow:
        """What was done to the gradient since the backward."""
        square, *heads = squares([everything(self._model), *pending.private])
        found = norms(scale, square, pending.gram, pending.weights, np.array(heads))
        self._limit.look(found.joint, scale)
        return replace(
            pending.row,
            joint_norm=found.joint,
            clip_scale=scale if scale > 0 else math.nan,
            clip_share=found.share,
            clip_scale_without=scale_without(found, scale, self._limit.value),
        )

    def _take_apart(self, pending: Pending, before: Before) -> UpdateRow:
        assert pending.gradients is not None
        with torch.no_grad():
            found = look_after(self._optimizer, self._shared, before, pending.gradients, pending.weights)
        if not found.missing <= WHOLE:
            self._kept = {}
            return replace(pending.row, status=FOREIGN_UPDATE)
        self._kept, self._passed = found.kept, 0
        return replace(pending.row, parts=found.parts, effect=found.effect)

    # ---- what it knows

    @property
    def _now(self) -> Measuring:
        assert self._measuring is not None, "Updates are used by the probe that they were given to"
        return self._measuring

    def _guarded(self, look: Callable[[], T]) -> tuple[T | None, str]:
        return self._now.report.guarded(self._now.clock.step, look)

    @property
    def _shared(self) -> SharedLayers:
        return self._now.meter.shared or SharedLayers((), ())

    def _empty(self, status: str) -> UpdateRow:
        measuring, layers, tasks = self._now, len(self._shared.layers), len(self._now.tasks)
        sources = tasks + len(EARLIER_SOURCES)
        return UpdateRow(
            step=measuring.clock.step,
            epoch=measuring.epoch,
            time=measuring.now(),
            joint_norm=math.nan,
            clip_scale=math.nan,
            clip_share=np.full(tasks, np.nan),
            clip_scale_without=np.full(tasks, np.nan),
            calls=0,
            skipped=self._skipped,
            bn_mean_drift=math.nan,
            bn_variance_drift=math.nan,
            bn_batches=math.nan,
            parts=np.full((layers, sources, sources), np.nan),
            effect=np.full((layers, tasks, sources), np.nan),
            status=status,
        )
