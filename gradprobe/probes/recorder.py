"""One step's measurement: from the losses, around the joint backward, to the rows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.accumulation import Accumulation
from gradprobe.probes.calls import (
    Call,
    Losses,
    MicroBatches,
    Noise,
    all_losses,
    is_present,
    latest_losses,
    latest_weights,
    mean_values,
    status_of_calls,
)
from gradprobe.probes.clock import StepClock, Stopwatch, UnannouncedSteps
from gradprobe.probes.feature_gradients import Feature, FeatureGradients, GradientLevel, JointFeatures
from gradprobe.probes.gramian import LossScale, scalars, take_along
from gradprobe.probes.graph import free_graph
from gradprobe.probes.guard import OBSERVED
from gradprobe.probes.optimizer_steps import OptimizerSteps, ParameterSample, learning_rate
from gradprobe.probes.passes import DerivedMeasurement
from gradprobe.probes.probe_samples import ProbeLoader, SeenLosses
from gradprobe.probes.reporter import Reporter, finite, status_of
from gradprobe.probes.shared_layers import SharedLayers, padded
from gradprobe.probes.state import undisturbed, walked_once
from gradprobe.probes.task_gradients import (
    SELF_CHECKED,
    SharedParameters,
    TaskGradients,
    cosines_with_itself,
    self_check_fault,
)
from gradprobe.processes import OneProcess
from gradprobe.rows import MEASURED, NONFINITE_GRADIENT, OVERFLOWED, FeatureRow, ProbeLoaderRow, Row
from gradprobe.statistics import noise_part

T = TypeVar("T")


@dataclass(frozen=True)
class _Due:
    """What is to be measured in one call."""

    rows: bool
    features: bool
    loader: bool

    @property
    def here(self) -> bool:
        """Whether anything of the training's own batch is."""
        return self.rows or self.features

    def __bool__(self) -> bool:
        return self.here or self.loader


@dataclass
class Recorder:
    """The parts of a probe, and what they do at a step. Knows nothing of the probe, which may so be let go of.

    Attributes:
        tasks: (T,) names, in the order of every array.
        optimizer: Whose learning rate the rows carry; another from when on another one steps.
        ranks: The processes that train together.
        epoch: Of the rows to come.
        beside: Looks at what the optimizer makes of what was measured.
        calls: Of the present step, where gradients are accumulated.
        moves: Notices where the present step ended without a sign.
        shared_parameters: Gives those of the shared layers.
        loader: Measured besides.
        self_checked: Whether the probe has looked at itself, see :mod:`gradprobe.probes.task_gradients`.
    """

    tasks: tuple[str, ...]
    level: GradientLevel
    clock: StepClock
    report: Reporter
    meter: TaskGradients
    features: FeatureGradients
    scale: LossScale
    optimizer: Optimizer | None
    ranks: OneProcess
    epoch: int = 0
    beside: Observer | None = None
    loader: OnLoader | None = None
    self_checked: bool = False

    def __post_init__(self) -> None:
        self.shared_parameters = SharedParameters(self.meter)
        several = True if self.clock.accumulate > 1 else None if self.optimizer is not None else False
        known, agree, now = self.optimizer is None, self.ranks.first_says, lambda: self.scale.now
        self.calls = Accumulation(
            self.tasks, self.meter, several, not known, agree, self._emit_calls, now, self.clock.again, self.guarded
        )
        self._hear()
        self.moves = UnannouncedSteps(self.clock, ParameterSample(self.moving), self.calls.finish, self._warn)

    def _hear(self) -> None:
        """Count the steps of the optimizer, and of whichever updates the same parameters."""
        if self.optimizer is None:
            return
        steps = OptimizerSteps(self.optimizer, self.shared_parameters, self._stepped, self._warn)
        steps.finish.append(self.calls.finish)
        steps.followed_by.append(self._follow)
        self.clock.steps = steps

    def _follow(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def _stepped(self, steps: int) -> None:
        self.moves.stepped()
        self.clock.stepped(steps)

    def _warn(self, reason: str) -> None:
        self.report.warn(self.clock.step, reason)

    def moving(self) -> Sequence[Tensor]:
        """By which it is told whether a step was made; where nothing is shared, all that the optimizer has."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return self.shared_parameters() or [p for group in groups for p in group["params"]]

    @contextmanager
    def call(self, losses: Losses) -> Iterator[_Due]:
        """One call of the probe; within it, what is to be measured is, and what is to be trained."""
        self.moves.asked()
        try:
            with self.clock.calling(), walked_once(self.meter.model):
                yield self.due(losses)
            self.called()
        finally:
            self.meter.let_go()

    def called(self) -> None:
        """A call of the probe is over."""
        if self.clock.completing or self.clock.stepped_within:
            self.calls.finish()
        if self.beside is not None:
            self.beside.called()
        self.moves.called(self.calls.several)
        self.clock.called()

    def flush(self) -> bool:
        """Make all rows so far safe, that of the present step among them; whether they are."""
        if self.ranks.size == 1:  # others may be elsewhere, and not answer
            self.moves.asked()
            self.calls.settle()
        return self.report.flush()

    def close(self) -> None:
        """Nothing more comes: hand on what the present step has, and let go of the optimizer."""
        with ExitStack() as last:  # each of these, whatever the others say
            if self.beside is not None:
                last.callback(self.beside.close)
            last.callback(self.report.ask_after)
            last.callback(self.meter.tell, last=True)
            last.callback(self.clock.close)
            if self.ranks.size == 1:  # others may be elsewhere, and not answer
                self.moves.asked()
                self.calls.settle()

    def due(self, losses: Losses) -> _Due:
        """Asked once per call of the probe."""
        first, due = self.clock.ask()
        return self._due(first, self.calls.due(first, due, losses))

    def due_next(self) -> _Due:
        """What :meth:`due` would say if the probe were called now."""
        self.moves.asked()
        first, due = self.clock.peek()
        return self._due(first, self.calls.would_be_due(first, due))

    def backward(
        self,
        losses: Losses,
        weights: Array,
        total: Tensor,
        due: _Due,
        batch_size: int,
        micro: MicroBatches | None = None,
    ) -> None:
        """The joint backward of ``total``, with the measurement around and within it."""
        if due.rows and not self._apart(micro):
            self._look(losses, None)
        if self._apart(micro):
            self.record(losses, weights, due, batch_size, micro)
            total.backward()
            return
        watch, feature_watch = Stopwatch(total.device), Stopwatch(total.device)
        scaled = self._scaled(losses)
        plan, status, entering = None, MEASURED, None
        if due.rows:
            with watch.running():
                plan, status = self.guarded(lambda: self.meter.begin(self.find(losses), scaled, weights))
        if due.features:
            with feature_watch.running():
                entering, _ = self._guarded_together(lambda: JointFeatures(self._find_features(losses), weights))
        derived = plan if isinstance(plan, DerivedMeasurement) else None
        with ExitStack() as hooks:
            if derived is not None:
                hooks.enter_context(derived.listener)
            if entering is not None:
                hooks.enter_context(entering)
            moving = hooks.enter_context(self.meter.guard.moving(due.rows))
            # The graph is kept until the result is checked: an explicit pass may have to replace it.
            total.backward(retain_graph=derived is not None)
        if derived is not None:
            watch.add(derived.listener.seconds)
            with watch.running():
                plan, status = self.guarded(lambda: self.meter.finish(derived, scaled, moving))
                self.guarded(lambda: free_graph(derived.graph))
        if entering is not None:
            feature_watch.add(entering.seconds)
            with feature_watch.running():
                gram, _ = self._guarded_together(entering.result)
            self._emit_features(entering.features, gram, feature_watch)
        if due.rows:
            gram = plan if isinstance(plan, np.ndarray) else None
            self._emit(losses, weights, gram, status, watch, batch_size, self._noise(micro, gram))
            self.clock.schedule.spent(watch.seconds + feature_watch.seconds)

    def record(
        self, losses: Losses, weights: Array, due: _Due, batch_size: int, micro: MicroBatches | None = None
    ) -> None:
        """The measurement alone, by passes of its own."""
        if due.rows:
            self._look(losses, micro)
        if self._apart(micro):
            self._in_micro_batches(losses, weights, batch_size, micro)
            return
        watch, feature_watch = Stopwatch(_device(losses)), Stopwatch(_device(losses))
        scaled = self._scaled(losses)
        if due.features:
            with feature_watch.running():
                features, _ = self._guarded_together(lambda: self._find_features(losses))
                factors = np.ones(len(self.tasks))
                gram, _ = self._guarded_together(lambda: self.features.explicit(features or [], scaled, factors))
            self._emit_features(features or [], gram, feature_watch)
        if due.rows:
            with watch.running():
                gram, status = self.guarded(lambda: self.meter.explicit(self.find(losses), scaled, weights))
            self._emit(losses, weights, gram, status, watch, batch_size, self._noise(micro, gram))
            self.clock.schedule.spent(watch.seconds + feature_watch.seconds)

    def _look(self, losses: Losses, micro: MicroBatches | None) -> None:
        """What stands beside may need gradients of its own, while the graphs are alive."""
        if self.beside is not None:
            self.guarded(lambda: self.find(losses))
            pieces = micro.losses if micro is not None and self._apart(micro) else (losses,)
            scaled = [self.scale.all(self.ordered(one)) for one in pieces]
            beside, every = self.beside, [loss for one in scaled for loss in one]
            self.guarded(lambda: self.meter.guard.passes(every, lambda _: beside.looked(scaled), kind=OBSERVED))

    def _in_micro_batches(self, losses: Losses, weights: Array, batch_size: int, micro: MicroBatches) -> None:
        watch = Stopwatch(_device(losses))
        with watch.running():
            scaled = [self.scale.all(self.ordered(one)) for one in micro.losses]
            take_along(self.ordered(losses))
            found, status = self.guarded(
                lambda: self.meter.in_micro_batches(self.find(losses), scaled, micro.shares, len(self.tasks), weights)
            )
            if found is not None:
                self.check_self(micro.losses)
        gram, part = found if found is not None else (None, None)
        self._emit(losses, weights, gram, status, watch, batch_size, Noise(part, len(self.meter.shares)))
        self.clock.schedule.spent(watch.seconds)

    def _apart(self, micro: MicroBatches | None) -> TypeGuard[MicroBatches]:
        """Whether the micro-batches are measured one by one: in all processes if in one, though it has but one."""
        return micro is not None and (len(micro.losses) > 1 or self.ranks.size > 1)

    def _noise(self, micro: MicroBatches | None, gram: Array | None) -> Noise | None:
        """Of a step that was measured as a whole: the batches of several processes are micro-batches of it."""
        if self.ranks.size == 1:
            return Noise(None, 1) if micro is not None else None
        self.meter.shares = shares = self.ranks.shares([1.0])
        parts = self.ranks.parts
        if gram is None or parts is None or parts.shape != gram.shape:  # a failure, or tasks that share nothing
            return Noise(None, len(shares))
        return Noise(noise_part(gram, parts, shares), len(shares))

    def on_loader(self) -> None:
        """The measurement on the probe loader, which changes nothing."""
        assert self.loader is not None
        with self.ranks.equal_shares():
            row = self.loader.measure(self)
        if row is not None:
            self.report.row(row)

    def check_self(self, losses: Iterable[Losses]) -> None:
        """Once: measure a task with its own copy and with its negative, on a few micro-batches."""
        if self.self_checked:
            return
        self.self_checked = True

        def check() -> tuple[float, float]:
            few = self.ranks.together(lambda: list(itertools.islice(losses, SELF_CHECKED)))
            return cosines_with_itself(self.meter, self.scale, self.tasks, few)

        found, _ = self.guarded(check)
        if found is not None:
            self.report.annotate({"self_check": list(found)})
            if wrong := self_check_fault(found):
                self.report.warn(self.clock.step, wrong)

    def check_micro(self) -> None:
        """Whether it can be measured in micro-batches.

        Raises:
            ProbeError: Not at this level, or not in the way that was chosen.
        """
        if self.level.features:
            raise ProbeError(
                "features are measured on a batch as a whole: with micro=, leave level= and features= out."
            )
        self.meter.check_micro()

    def note(self, losses: Losses, weights: Array, status: str, batch_size: int) -> None:
        """A row without a measurement."""
        self.calls.finish()  # those before it in its step are measured, and have the step's row
        self.guarded(lambda: self.find(losses))
        self._emit(losses, weights, None, status, Stopwatch(_device(losses)), batch_size, at_once=True)
        self.meter.let_go()

    def find(self, losses: Losses) -> SharedLayers:
        """The shared layers, announced to the sinks when they are first found."""
        shared = self.meter.find({task: losses[task] for task in self.tasks})
        self.report.start(shared)
        if self.meter.grown:
            self.report.grow(shared)
        return shared

    def state_dict(self) -> dict[str, Any]:
        return {
            "clock": self.clock.state_dict(),
            "meter": self.meter.state_dict(),
            "epoch": self.epoch,
            "last_row": self.report.last_step,
            "last_metrics": self.report.last_metrics,
            "seconds": self.now(),
            **({"updates": self.beside.state_dict()} if self.beside is not None else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stopped.

        Raises:
            ProbeError: It is the state of something else.
        """
        lacking = [key for key in self.state_dict() if key not in state and key != "updates"]
        if lacking:
            raise ProbeError(f"this is no state of a probe: it lacks {lacking}. Load what probe.state_dict() gave.")
        self.clock.load_state_dict(state["clock"])
        self.meter.load_state_dict(state["meter"])
        self.epoch = state["epoch"]
        self.report.started = time.perf_counter() - state["seconds"]
        if self.beside is not None and "updates" in state:
            self.beside.load_state_dict(state["updates"])
        self.report.rewind(self.clock.first_open, state["last_metrics"])

    def _emit(
        self,
        losses: Losses,
        weights: Array,
        gram: Array | None,
        status: str,
        watch: Stopwatch,
        batch_size: int,
        noise: Noise | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        """Hand on the row of one call: at once where no optimizer will take its step, else when that is complete."""
        values, shares, step = self._values(losses), self.meter.shares, self.clock.step
        there = np.array([is_present(losses[task]) for task in self.tasks])
        call = Call(step, losses, values, weights, gram, status, watch, batch_size, noise, shares, there)
        if at_once or not self.calls.takes(call, self.scale.factor):
            self._emit_calls([call], gram, noise)

    def _emit_calls(self, calls: Sequence[Call], gram: Array | None, noise: Noise | None) -> None:
        """Hand on the row of a step, and of all processes: the mean of their losses, and all their samples."""
        *earlier, last = calls
        watch = last.watch
        for call in earlier:
            watch.add(call.watch.seconds)
        there = np.any([call.tasks for call in calls], axis=0)
        size = sum(call.batch_size for call in calls)
        own, known = np.append(mean_values(calls), size), np.append(there, True)
        mean, present = self.ranks.mean_of_present(own, known)
        total, status, weights = round(mean[-1] * self.ranks.size), status_of_calls(calls), latest_weights(calls)
        losses = latest_losses(calls)
        self._hand_on(losses, mean[:-1], present[:-1], weights, gram, status, watch, total, noise, last.step)

    def _values(self, losses: Losses) -> Array:
        return np.array(scalars(self.ordered(losses)))

    def _scaled(self, losses: Losses) -> list[Tensor]:
        """The losses as they are measured; their values come over with the first products."""
        scaled = self.scale.all(self.ordered(losses))
        take_along([*self.ordered(losses), *self.scale.unread])
        return scaled

    def _hand_on(
        self,
        losses: Losses,
        values: Array,
        there: NDArray[np.bool_],
        weights: Array,
        gram: Array | None,
        status: str,
        watch: Stopwatch,
        batch_size: int,
        noise: Noise | None,
        step: int,
    ) -> None:
        """Hand one row on.

        Args:
            losses: Of this process.
            values: (T,) that are stored; NaN: the task is absent, or its loss is NaN.
            there: (T,) who takes part in the step, in some process.
            weights: (T,).
            gram: (L, T, T) of the gradients as they were scaled; None: there is no measurement; ``status`` says why.
            status: Why not, or :data:`MEASURED`.
            watch: Has counted what the row cost so far.
            batch_size: Stored.
            noise: None: not measured in micro-batches.
            step: Of the training.
        """
        self.report.took_part(there)
        header = self.report.header
        if header is None:
            return  # not even the layers could be found; the warning is out
        reach = None
        with watch.running():
            if gram is None:
                gram = np.full((len(header.layers), len(self.tasks), len(self.tasks)), np.nan)
            elif status == MEASURED:
                gram = padded(self.scale.off(gram), len(header.layers))
                reach = self.meter.counted(gram)
                if self.meter.grown and self.meter.shared is not None:
                    self.report.grow(self.meter.shared)
                status = status_of(self.tasks, values, gram, there)
                status = OVERFLOWED if status == NONFINITE_GRADIENT and self.scale.there else status
                status = self.meter.guard.marked(status)
                gram = self.meter.last_gram = finite(gram)
        if self.beside is not None:
            self.beside.measured(self.ordered(losses), weights, gram, status)
        self.report.row(
            Row(
                step=step,
                epoch=self.epoch,
                time=self.now(),
                loss=values,
                weight=weights,
                gram=gram,
                lr=learning_rate(self.optimizer),
                overhead=watch.seconds,
                batch_size=batch_size,
                status=status,
                gram_noise=None if noise is None else self._noise_part(noise, gram),
                micro_batches=1 if noise is None else noise.batches,
                reach=reach,
            )
        )

    def _noise_part(self, noise: Noise, gram: Array) -> Array:
        """(L, T, T), unscaled; NaN where it is not known."""
        if noise.part is None:
            return np.full_like(gram, np.nan)
        return finite(padded(self.scale.off(noise.part), len(gram)))

    def _due(self, first: bool, due: bool) -> _Due:
        loader = first and self.loader is not None and self.loader.due(self.clock.step)
        return _Due(due, self.level.features and (first if self.level.parameters else due), loader)

    def _emit_features(self, features: Sequence[Feature], gram: Array | None, watch: Stopwatch) -> None:
        if gram is not None and self.features.names:
            # The gradient of a mean over processes, at features that each process has for itself.
            gram = self.ranks.mean(self.features.arranged(features, self.scale.off(gram))) / self.ranks.size
            self.report.row(FeatureRow(self.clock.step, self.epoch, self.now(), gram, overhead=watch.seconds))

    def _find_features(self, losses: Losses) -> list[Feature]:
        self.find(losses)  # a file begins with its layers
        found = self.features.find(self.ordered(losses))
        if found:
            self.report.start_features([f.name for f in found], [f.size for f in found])
        return found

    def ordered(self, losses: Losses) -> list[Tensor]:
        """(T,) in the order of the tasks."""
        return [losses[task] for task in self.tasks]

    def guarded(self, measure: Callable[[], T]) -> tuple[T | None, str]:
        """The result and a row's status; a failure is a status, not an exception."""
        return self.report.guarded(self.clock.step, measure)

    def _guarded_together(self, measure: Callable[[], T]) -> tuple[T | None, str]:
        return self.guarded(lambda: self.ranks.together(measure))

    def now(self) -> float:
        """Seconds since recording started."""
        return time.perf_counter() - self.report.started


def _device(losses: Losses) -> torch.device:
    return next(iter(losses.values())).device


class Observer(Protocol):
    """Is told of every call and every measurement; see :mod:`gradprobe.updates.optimizer_watch`."""

    def check(
        self, tasks: Sequence[str], level: GradientLevel, optimizer: Optimizer | None, meter: TaskGradients
    ) -> None:
        """Raise a ``ProbeError`` where it cannot belong to this probe."""

    def open(self, measuring: Recorder, model: nn.Module) -> None:
        """Belong to a probe; called once."""

    def wants(self, step: int) -> bool:
        """Whether a step is to be measured for its sake, beside those that are due."""

    def looked(self, losses: Sequence[Sequence[Tensor]]) -> None:
        """A step will be measured.

        Args:
            losses: (m) of (T,), one per micro-batch, scaled; their graphs are alive.
        """

    def measured(self, losses: Sequence[Tensor], weights: Array, gram: Array, status: str) -> None:
        """A row has come about.

        Args:
            losses: (T,) whose graphs tell which task reaches what.
            weights: (T,) in force.
            gram: (L, T, T), as in the row.
            status: Of the row.
        """

    def called(self) -> None:
        """A call of the probe is over, measured or not."""

    def close(self) -> None:
        """The probe lets go of the training; called before the sinks are closed."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped."""


class ObserverOption(Protocol):
    """One of several that want to look at the same steps, as ``updates=`` and ``ledger=``."""

    name: str
    """Of the argument."""

    @property
    def about(self) -> object:
        """What the file says of it: a value, or a mapping of names to values."""

    def together(self, readers: Sequence[Any]) -> Observer:
        """What is put beside the probe for all of them."""


class OnLoader:
    """What a probe does with its probe loader.

    Args:
        loader: Gives the losses.
        model: Whose buffers and modes are put back.
    """

    def __init__(self, loader: ProbeLoader, model: nn.Module) -> None:
        self._loader, self._model = loader, model

    def due(self, step: int) -> bool:
        """Whether it is measured at ``step``."""
        return self._loader.due(step)

    def measure(self, probe: Recorder) -> ProbeLoaderRow | None:
        """The row of the present step; None where not even the shared layers could be found.

        Raises:
            ProbeError: The loader's losses are not those of the probe's tasks.
        """
        watch, seen = Stopwatch(probe.meter.device), SeenLosses(probe.tasks)
        with watch.running(), undisturbed(self._model):
            found, status = probe.guarded(lambda: self._passes(probe, seen))
            header = probe.report.header
            if header is None:
                return None
            loss, there = probe.ranks.mean_of_present(seen.mean(self._loader.batches), seen.there)
            gram = noise = np.full((len(header.layers), len(probe.tasks), len(probe.tasks)), np.nan)
            if found is not None:
                gram, noise = (probe.scale.off(part) for part in found)
            if status == MEASURED:
                status = status_of(probe.tasks, loss, gram, there)
            status = probe.meter.guard.marked(status)
            if not probe.self_checked and found is not None:
                probe.check_self(all_losses(probe.tasks, one) for one in self._losses(probe))
        batches = self._loader.batches * probe.ranks.size
        return ProbeLoaderRow(
            step=probe.clock.step,
            epoch=probe.epoch,
            time=probe.now(),
            loss=loss,
            gram=finite(gram),
            gram_noise=finite(noise),
            micro_batches=batches,
            batch_size=batches * self._loader.batch_size,
            overhead=watch.seconds,
            status=status,
        )

    def _losses(self, probe: Recorder) -> Iterator[Losses]:
        return self._loader.losses(probe.clock.step, probe.ranks.rank)

    def _passes(self, probe: Recorder, seen: SeenLosses) -> tuple[Array, Array]:
        made = self._losses(probe)
        waiting = [probe.ranks.together(lambda: seen.add(next(made)))]
        shared = probe.find(waiting[0])
        probe.meter.let_go()

        def each() -> Iterator[list[Tensor]]:
            # Popped: the first forward's graph must not live until the last one's is gone.
            for losses in itertools.chain((waiting.pop() for _ in range(1)), map(seen.add, made)):
                yield probe.scale.all(probe.ordered(losses))

        return probe.meter.in_micro_batches(shared, each(), self._loader.shares, len(probe.tasks), aside=True)
