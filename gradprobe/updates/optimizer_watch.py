"""Follows each measured step from the backward to what the optimizer makes of it, for all who read off that.

One of these stands beside a probe. It keeps the probe's gradients until the optimizer's step, finds out what that was
given, and takes the update apart once; its readers make rows of it: :class:`gradprobe.Updates` of what became of the
gradients, :class:`gradprobe.Ledger` of what that did to the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.errors import ProbeError
from gradprobe.ledger.update_parts import Alone, why_not
from gradprobe.measures import Array
from gradprobe.probes.clock import Stopwatch
from gradprobe.probes.feature_gradients import GradientLevel
from gradprobe.probes.passes import Gradients
from gradprobe.probes.recorder import Recorder
from gradprobe.probes.shared_layers import Layer, SharedLayers
from gradprobe.probes.task_gradients import TaskGradients
from gradprobe.rows import EARLIER_SOURCES, MEASURED
from gradprobe.updates.heads import private_parameters
from gradprobe.updates.taking_apart import (
    MOST_MISSING,
    Kept,
    KeptMoments,
    TakenApart,
    UpdateBefore,
    look_after,
    look_before,
)

_T = TypeVar("_T")

NO_GRADIENT = "the optimizer was given no gradient, so the step changed nothing"
SEVERAL_CALLS = "the update came from several calls of the probe: accumulated, or after a step that was skipped"
FOREIGN_GRADIENT = "the optimizer's gradient is no multiple of the weighted sum of the tasks' gradients"
FOREIGN_UPDATE = "the update is not the sum of its parts: something else than the optimizer's own rule made it"
NOTHING_SHARED = "the tasks share no layer, so there is no update that both have a part in"
_NOT_KEPT = "the tasks' gradients of this step were not kept"
UNSEEN = "the step was made within the backward, or without its closure: its gradient could not be seen before"
_SCALED_INSIDE = "a fused optimizer takes the loss scale off within its step, where it cannot be seen"


@dataclass
class MeasuredStep:
    """A step that was measured, and whose update is to come.

    Attributes:
        step, epoch, time: Of its row.
        status: Of its measurement; later why the update is not taken apart.
        weights: (T,) in force.
        gram: (L, T, T).
        gradients: (T) of the unweighted tasks; None: not there.
        micro: (m) of (T) of each micro-batch; empty: measured as a whole, or nobody wants them.
        shares: (m,) of the micro-batches.
        private: (T) parameters that a task alone reaches.
        calls: Of the probe, for this update.
        skipped: Steps so far that changed nothing.
        failed: Name of a reader -> why its row says nothing.
    """

    step: int
    epoch: int
    time: float
    status: str
    weights: Array
    gram: Array
    gradients: list[Gradients] | None
    micro: list[list[Gradients]]
    shares: list[float]
    private: list[list[nn.Parameter]]
    failed: dict[str, str]
    calls: int = 0
    skipped: int = 0


class Reader:
    """Makes rows of what a :class:`OptimizerWatch` follows; what it does not care for it leaves as it is here.

    Every method is called with the clock running and guarded: an exception makes its row say so.
    """

    name = ""
    """Of the argument that it is given by."""

    @property
    def about(self) -> object:
        """What the file says of it."""
        return True

    keeps = False
    """Whether it wants the parts of an update themselves."""

    seconds = 0.0
    """Spent on the present step."""

    def together(self, readers: Sequence[Reader]) -> OptimizerWatch:
        """What is put beside a probe, for all of these."""
        return OptimizerWatch(readers)

    def check(self, tasks: Sequence[str], gradients: TaskGradients) -> None:
        """Raise a ``ProbeError`` where it cannot belong to this probe."""

    def open(self, watch: OptimizerWatch, model: nn.Module) -> None:
        """Belong to it; called once."""

    def wants(self, step: int) -> bool:
        """Whether a step is to be measured for its sake."""
        return False

    def layers_joined(self) -> None:
        """Layers have joined: what is known of parameters by their places is of other places now."""

    def losses_known(self, losses: Sequence[Sequence[Tensor]]) -> None:
        """A step will be measured: (m) of (T,) scaled losses while their graphs are alive, one per micro-batch."""

    def step_measured(self, at: MeasuredStep) -> None:
        """It was measured."""

    def before_update(self, at: MeasuredStep, before: UpdateBefore | None) -> None:
        """The optimizer is about to step; None: there is nothing to be taken apart."""

    def after_update(self, at: MeasuredStep, taken: TakenApart | None) -> None:
        """It has; None: the tasks share no layer. Not called where the update cannot be taken apart."""

    def step_over(self, at: MeasuredStep, status: str) -> None:
        """Nothing more will come of this step; ``status`` says how far it came."""

    def close(self) -> None:
        """Nothing more will come at all."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped."""


class OptimizerWatch:
    """See the module.

    Args:
        readers: One or more; what all need is counted as the first one's time.
    """

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = tuple(readers)
        self._recorder: Recorder | None = None
        self._at: MeasuredStep | None = None
        self._failed: dict[str, str] = {}
        self._before: UpdateBefore | None = None
        self._given = False
        self._kept: KeptMoments = {}
        self._private: list[list[nn.Parameter]] | None = None
        self._layers: Sequence[Layer] | None = None  # that the places of parameters are of
        self._calls = self._skipped = 0
        self._passed = 0  # updates since the last one that was taken apart
        self._scale: float | None = None

    # ---- called by the probe

    def check(
        self, tasks: Sequence[str], level: GradientLevel, optimizer: Optimizer | None, gradients: TaskGradients
    ) -> None:
        """Whether it can belong to a probe.

        Raises:
            ProbeError: What it needs is not there, or a reader belongs to another probe.
        """
        for reader in self.readers:
            name = reader.name
            if optimizer is None:
                raise ProbeError(f"{name}= looks at what the optimizer does: pass optimizer= too.")
            if not level.parameters:
                raise ProbeError(f"{name}= needs gradients on parameters: attach with level='parameters' or 'both'.")
            if clash := [source for source in EARLIER_SOURCES if source in tasks]:
                raise ProbeError(f"{name}=: a task cannot be called {clash[0]!r}, as a part of an update is.")
            reader.check(tasks, gradients)

    def open(self, recorder: Recorder, model: nn.Module) -> None:
        assert recorder.optimizer is not None
        self._recorder, self.model, self.optimizer = recorder, model, recorder.optimizer
        for reader in self.readers:
            reader.open(self, model)
        steps = recorder.clock.steps
        assert steps is not None, "without an optimizer nothing is beside a probe"
        steps.followed_by.append(self._follow)
        steps.before.append(self._before_step)
        steps.after.append(self._after_step)

    def wants(self, step: int) -> bool:
        """Whether a reader wants this step to be measured."""
        return any(reader.wants(step) for reader in self.readers)

    def looked(self, losses: Sequence[Sequence[Tensor]]) -> None:
        """A step will be measured, with these scaled losses: (m) of (T,)."""
        self._failed = {}
        for reader in self.readers:
            reader.seconds = 0.0
        layers = self.shared.layers
        if self._layers is not None and layers is not self._layers:
            self._kept, self._private = {}, None
            self._each(lambda reader: reader.layers_joined(), self._failed)
        self._layers = layers
        self._each(lambda reader: reader.losses_known(losses), self._failed)

    def measured(self, losses: Sequence[Tensor], weights: Array, gram: Array, status: str) -> None:
        """A step was measured: its update will be looked at."""
        found, _ = self._common(lambda: self._measured_step(losses, weights, gram, status))
        self._at = found
        if found is not None:
            self._each(lambda reader: reader.step_measured(found), found.failed)

    def called(self) -> None:
        """A call of the probe is over; a loss scale that has fallen since the last one tells of a skipped step."""
        self._calls += 1
        factor = self.now.scale.factor
        if self._scale is not None and factor < self._scale:
            self._skipped += 1
        self._scale = factor

    def close(self) -> None:
        """The probe lets go of the training."""
        if self._recorder is not None:
            self._each(lambda reader: reader.close(), {})

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self._skipped,
            "passed": self._passed,
            "kept": [[list(places), _stored(kept)] for places, kept in self._kept.items()],
            **{key: value for reader in self.readers for key, value in reader.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.now.gradients.device
        self._skipped, self._passed = state["skipped"], state["passed"]
        self._kept = {tuple(places): _restored(kept, device) for places, kept in state["kept"]}
        for reader in self.readers:
            reader.load_state_dict(state)
        self._at = self._before = None
        self._calls, self._scale = 0, None

    # ---- what readers ask

    @property
    def now(self) -> Recorder:
        """The probe's parts."""
        assert self._recorder is not None, "what is beside a probe is used by the probe that it was given to"
        return self._recorder

    @property
    def shared(self) -> SharedLayers:
        """The shared layers; none before they are found."""
        return self.now.gradients.shared or SharedLayers((), ())

    @property
    def _keeps(self) -> bool:
        return any(reader.keeps for reader in self.readers)

    def private(self, losses: Sequence[Tensor]) -> list[list[nn.Parameter]]:
        """(T): what each task alone reaches; looked for once."""
        if self._private is None:
            self._private = private_parameters(self.model, self.shared, losses)
        return self._private

    # ---- one step

    def _measured_step(self, losses: Sequence[Tensor], weights: Array, gram: Array, status: str) -> MeasuredStep:
        recorder = self.now
        source, factor = recorder.gradients, recorder.scale.factor
        kept = source.kept if status == MEASURED else None
        micro = (source.kept_micro or []) if status == MEASURED else []
        if kept:
            source.keep(micro=source.kept_micro is not None)  # the lists are ours now
        return MeasuredStep(
            step=recorder.clock.step,
            epoch=recorder.epoch,
            time=recorder.now(),
            status=status,
            weights=weights,
            gram=gram,
            gradients=_unscaled(kept, factor) if kept else None,
            micro=[_unscaled(tasks, factor) for tasks in micro],
            shares=list(source.shares),
            private=self.private(losses) if status == MEASURED else self._private or [],
            skipped=self._skipped,
            failed=self._failed,
        )

    def _follow(self, optimizer: Optimizer) -> None:
        """Another optimizer steps from here on: what is known of the moments of the one before does not hold."""
        self.optimizer, self._kept = optimizer, {}

    def _before_step(self, _: Optimizer) -> None:
        idle, at = self._counted(), self._at
        self._before, self._given = None, False
        if at is None:
            return
        before, status = self._common(lambda: self._look(at, idle))
        if status != MEASURED:
            at.status = status
        if at.status not in (MEASURED, NOTHING_SHARED):
            return
        self._given = True
        self._each(lambda reader: reader.before_update(at, before), at.failed)
        foreign = why_not(self.optimizer)
        if foreign and at.status == MEASURED:
            at.status, before = foreign, None
        self._before = before

    def _after_step(self, _: Optimizer, seen: bool) -> None:
        if not seen:
            self._counted()
            self._before, self._given = None, False
            if self._at is not None and self._at.status == MEASURED:
                self._at.status = UNSEEN
        self._calls = 0  # those that a closure made since are of this step
        at, before, given = self._at, self._before, self._given
        self._at = self._before = None
        if at is None:
            return
        taken = None
        if before is not None:
            taken, status = self._common(lambda: self._take_apart(at, before))
            if status != MEASURED:
                at.status = status
        if given and at.status in (MEASURED, NOTHING_SHARED):
            self._each(lambda reader: reader.after_update(at, taken), at.failed)
        self._each(lambda reader: reader.step_over(at, at.failed.get(reader.name, at.status)), {})
        self.now.clock.schedule.spent(sum(reader.seconds for reader in self.readers))

    def _counted(self) -> bool:
        """Count the step that is made; whether it has no gradient."""
        idle = all(p.grad is None for group in self.optimizer.param_groups for p in group["params"])
        self._skipped += idle
        self._passed += not idle
        calls, self._calls = self._calls, 0
        if self._at is not None:
            self._at.calls, self._at.skipped = calls, self._skipped
        return idle

    def _look(self, at: MeasuredStep, idle: bool) -> UpdateBefore | None:
        """At the gradient that the optimizer is given; ``at.status`` says why an update cannot be taken apart."""
        at.status = self._reason(at, idle)
        if at.status != MEASURED or at.gradients is None:
            return None
        foreign, parameters = why_not(self.optimizer), self.shared.parameters
        before = look_before(
            self.optimizer,
            parameters,
            at.gradients,
            at.weights,
            self._kept,
            self._passed - 1,
            foreign,
            alone=self._keeps,
        )
        if not before.unexplained <= MOST_MISSING:
            at.status = SEVERAL_CALLS if at.calls > 1 else FOREIGN_GRADIENT
            return None
        return before

    def _reason(self, at: MeasuredStep, idle: bool) -> str:
        """Why a step's gradient is not looked at, or :data:`MEASURED`."""
        if at.status != MEASURED:
            return at.status
        nothing = not self.shared.layers
        if at.gradients is None and not nothing:
            return _NOT_KEPT
        if idle:
            return NO_GRADIENT
        if nothing:
            return NOTHING_SHARED
        return _SCALED_INSIDE if getattr(self.optimizer, "grad_scale", None) is not None else MEASURED

    def _take_apart(self, at: MeasuredStep, before: UpdateBefore) -> TakenApart | None:
        assert at.gradients is not None
        with torch.no_grad():
            found = look_after(self.optimizer, self.shared, before, at.gradients, at.weights, keep=self._keeps)
        if not found.missing <= MOST_MISSING:
            self._kept, at.status = {}, FOREIGN_UPDATE
            return None
        self._kept, self._passed = found.kept, 0
        return found

    # ---- guarded and timed

    def _common(self, work: Callable[[], _T]) -> tuple[_T | None, str]:
        """What all readers need; a failure is a status."""
        watch = Stopwatch(self.now.gradients.device)
        with watch.running():
            found = self.now.guarded(work)
        self.readers[0].seconds += watch.seconds
        return found

    def _each(self, call: Callable[[Reader], None], failed: dict[str, str]) -> None:
        """Every reader that has not failed at this step; why one does is kept."""
        for reader in self.readers:
            if reader.name in failed:
                continue
            watch = Stopwatch(self.now.gradients.device)
            with watch.running():
                _, status = self.now.guarded(partial(call, reader))
            reader.seconds += watch.seconds
            if status != MEASURED:
                failed[reader.name] = status


def _stored(kept: Kept) -> dict[str, Any]:
    alone = kept.alone
    return {"moments": kept.moments, "squares": alone and alone.squares, "weight": alone and alone.weight}


def _restored(state: Any, device: torch.device) -> Kept:
    """Of a list, as files of earlier versions have it: the first moments, and no others."""
    if not isinstance(state, Mapping):
        return Kept([m.to(device) for m in state])
    moments, squares = ([m.to(device) for m in state[name] or ()] for name in ("moments", "squares"))
    return Kept(moments, Alone(squares, state["weight"]) if squares else None)


def _unscaled(tasks: Sequence[Gradients], factor: float) -> list[Gradients]:
    if factor == 1:
        return list(tasks)
    return [[None if g is None else g / factor for g in task] for task in tasks]
