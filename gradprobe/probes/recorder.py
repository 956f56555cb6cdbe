"""One step's measurement: from the losses, around the joint backward, to the rows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.errors import GradprobeError, ProbeError
from gradprobe.measures import Array
from gradprobe.probes.accumulation import Accumulation
from gradprobe.probes.calls import (
    Call,
    HandedIn,
    Losses,
    MicroBatches,
    Noise,
    all_losses,
    as_one,
    check_mean,
    finite,
    is_present,
    padded,
    status_of,
)
from gradprobe.probes.clock import StepClock, Stopwatch, UnannouncedSteps
from gradprobe.probes.feature_gradients import Feature, FeatureGradients, GradientLevel, JointFeatures
from gradprobe.probes.gramian import LossScale, scalars, take_along
from gradprobe.probes.graph import free_graph
from gradprobe.probes.guard import OBSERVED, NotMeasured
from gradprobe.probes.optimizer_steps import OptimizerSteps, ParameterSample, learning_rate
from gradprobe.probes.passes import DerivedMeasurement
from gradprobe.probes.probe_samples import ProbeLoader, SeenLosses
from gradprobe.probes.reporter import Reporter
from gradprobe.probes.shared_layers import SharedLayers
from gradprobe.probes.state import undisturbed, walked_once
from gradprobe.probes.task_gradients import SELF_CHECKED, TaskGradients, cosines_with_itself, self_check_fault
from gradprobe.processes import OneProcess
from gradprobe.rows import (
    MEASURED,
    NONFINITE_GRADIENT,
    OVERFLOWED,
    FeatureRow,
    ProbeLoaderRow,
    Row,
)
from gradprobe.statistics import noise_part

__all__ = ["Recorder"]


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


@dataclass
class Recorder:
    """The parts of a probe, and what they do at a step. Knows nothing of the probe, which may so be let go of.

    Attributes:
        tasks: (T,) names, in the order of every array.
        gradients: Measures on parameters.
        features: Measures at features.
        optimizer: Whose learning rate the rows carry; another from when on another one steps.
        ranks: The processes that train together.
        loader: What is measured besides, on samples of its own.
        epoch: Of the rows to come.
        observer: Looks at what the optimizer makes of what was measured.
        self_checked: Whether the probe has looked at itself, see :func:`cosines_with_itself`.
        accumulation: Of the calls of the present step; None: every call is a step.
    """

    tasks: tuple[str, ...]
    level: GradientLevel
    clock: StepClock
    report: Reporter
    gradients: TaskGradients
    features: FeatureGradients
    scale: LossScale
    optimizer: Optimizer | None
    ranks: OneProcess
    loader: ProbeLoader | None = None
    epoch: int = 0
    observer: Observer | None = None
    self_checked: bool = False

    def __post_init__(self) -> None:
        self.accumulation: Accumulation | None = None
        if self.optimizer is None and self.clock.accumulate == 1:
            return
        several = True if self.clock.accumulate > 1 else None
        known, agree, now = self.optimizer is None, self.ranks.first_says, lambda: self.scale.now
        self.accumulation = Accumulation(
            self.tasks, self.gradients, several, not known, agree, self._emit_calls, now, self.clock.again, self.guarded
        )
        if self.optimizer is not None:  # count its steps, and those of whichever updates the same parameters
            steps = OptimizerSteps(self.optimizer, self._shared_parameters, self._stepped, self._warn)
            steps.finish.append(self._finish)
            steps.followed_by.append(self._follow)
            self.clock.steps = steps
        points = ParameterSample(self._moving)
        self.clock.unannounced = UnannouncedSteps(self.clock, points, self._finish, self._warn)

    def _follow(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def _stepped(self, steps: int) -> None:
        assert self.clock.unannounced is not None
        self.clock.unannounced.stepped()
        self.clock.stepped(steps)

    def _warn(self, reason: str) -> None:
        self.report.warn(self.clock.step, reason)

    def _shared_parameters(self) -> Sequence[Tensor]:
        """One list as long as they are the same; none before they are found."""
        shared = self.gradients.shared
        return shared.parameters if shared is not None else []

    def _moving(self) -> Sequence[Tensor]:
        """By which it is told whether a step was made; where nothing is shared, all that the optimizer has."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return self._shared_parameters() or [p for group in groups for p in group["params"]]

    # ---- one call

    def backward(self, given: HandedIn) -> None:
        """The joint backward, and on due steps the measurement before, within and after it."""
        total = self.scale.apply(given.joint())
        with self._call(given) as due:
            if due.here and not given.asked and not self._apart(given.micro):
                if given.micro is not None:
                    check_mean(given.losses, given.micro)
                self._around_backward(given, total, due)
                return
            if due.here:
                self._by_passes(given, due)
            total.backward()

    def record(self, given: HandedIn) -> None:
        """The measurement alone, by passes of its own."""
        if self.report.header is None and not given.asked:
            given.check_some()
        with self._call(given) as due:
            if due.here:
                self._by_passes(given, due)

    def note(self, given: HandedIn, status: str) -> None:
        """A row without a measurement."""
        self._finish()  # those before it in its step are measured, and have the step's row
        self.guarded(lambda: self._find(given.losses))
        self._emit_calls([self._made(given, None, status, Stopwatch(_device(given.losses)))], None, None)
        self.gradients.let_go()
        self._called()

    @contextmanager
    def _call(self, given: HandedIn) -> Iterator[_Due]:
        """One call of the probe; within it, what is to be measured is, and what is to be trained."""
        try:
            with self.clock.call() as (first, due), walked_once(self.gradients.model):
                if self.accumulation is not None:
                    due = self.accumulation.due(first, due, given.losses)
                found = self._due(first, due)
                if found.loader:
                    self._on_loader()
                yield found
            self._called()
        finally:
            self.gradients.let_go()

    def _called(self) -> None:
        """A call of the probe is over."""
        several = False
        if self.accumulation is not None:
            if self.clock.ending:
                self.accumulation.finish()
            several = self.accumulation.several
        if self.observer is not None:
            self.observer.called()
        self.clock.called(several=several)

    def due_next(self) -> bool:
        """Whether anything would be measured if the probe were called now."""
        self.clock.look()
        first, due = self.clock.peek()
        if self.accumulation is not None:
            due = self.accumulation.would_be_due(first, due)
        found = self._due(first, due)
        return found.here or found.loader

    def _due(self, first: bool, due: bool) -> _Due:
        loader = first and self.loader is not None and self.loader.due(self.clock.step)
        return _Due(due, self.level.features and (first if self.level.parameters else due), loader)

    def _finish(self) -> None:
        """The present step is complete: hand on its row."""
        if self.accumulation is not None:
            self.accumulation.finish()

    def _settle(self) -> None:
        """Hand on what the present step has so far."""
        if self.accumulation is not None and self.ranks.size == 1:  # others may be elsewhere, and not answer
            self.clock.look()
            self.accumulation.settle()

    def flush(self) -> bool:
        """Make all rows so far safe, that of the present step among them; whether they are."""
        self._settle()
        return self.report.flush()

    def close(self) -> None:
        """Nothing more comes: hand on what the present step has, and let go of the optimizer."""
        with ExitStack() as last:  # each of these, whatever the others say
            if self.observer is not None:
                last.callback(self.observer.close)
            last.callback(self.report.ask_after)
            last.callback(self.gradients.tell)
            last.callback(self.clock.close)
            self._settle()

    # ---- what is measured in it

    def _around_backward(self, given: HandedIn, total: Tensor, due: _Due) -> None:
        """The joint backward of ``total``, which tells a task's gradient, where it can, and those at features."""
        watch, seconds = Stopwatch(total.device), 0.0
        self._let_observe(given, due)
        scaled = self.scale.all(self._ordered(given.losses), along=True)
        plan, status, entering, before = None, MEASURED, None, None
        if due.rows:
            with watch.running():
                plan, status = self.guarded(
                    lambda: self.gradients.begin(self._find(given.losses), scaled, given.weights)
                )
            before = self.gradients.guard.before_backward()
        if due.features:
            feature_watch = Stopwatch(total.device)
            with feature_watch.running():
                entering, _ = self._guarded_together(
                    lambda: JointFeatures(self._find_features(given.losses), given.weights)
                )
        derived = plan if isinstance(plan, DerivedMeasurement) else None
        with ExitStack() as hooks:
            if derived is not None:
                hooks.enter_context(derived.listener)
            if entering is not None:
                hooks.enter_context(entering)
            # The graph is kept until the result is checked: an explicit pass may have to replace it.
            total.backward(retain_graph=derived is not None)
        if before is not None and not self.gradients.guard.moves:
            self.gradients.guard.moves = before.moved()
        if derived is not None:
            watch.add(derived.listener.seconds)
            with watch.running():
                plan, status = self.guarded(lambda: self.gradients.finish(derived, scaled, before))
                self.guarded(lambda: free_graph(derived.graph))
        if entering is not None:
            feature_watch.add(entering.seconds)
            with feature_watch.running():
                gram, _ = self._guarded_together(entering.result)
            self._emit_features(entering.features, gram, feature_watch)
            seconds = feature_watch.seconds
        if due.rows:
            self._emit(given, plan if isinstance(plan, np.ndarray) else None, status, watch, extra=seconds)

    def _by_passes(self, given: HandedIn, due: _Due) -> None:
        """By passes of its own; losses of tasks that are measured alone are made here."""
        if given.micro is not None:
            check_mean(given.losses, given.micro)
        if given.asked:
            given = replace(given, losses=self._asked(given))
        self._let_observe(given, due)
        if self._apart(given.micro):
            self._in_micro_batches(given, given.micro)
            return
        watch, seconds = Stopwatch(_device(given.losses)), 0.0
        scaled = self.scale.all(self._ordered(given.losses), along=True)
        if due.features:
            feature_watch, factors = Stopwatch(_device(given.losses)), np.ones(len(self.tasks))
            with feature_watch.running():
                features, _ = self._guarded_together(lambda: self._find_features(given.losses))
                gram, _ = self._guarded_together(lambda: self.features.explicit(features or [], scaled, factors))
            self._emit_features(features or [], gram, feature_watch)
            seconds = feature_watch.seconds
        if due.rows:
            with watch.running():
                gram, status = self.guarded(
                    lambda: self.gradients.explicit(self._find(given.losses), scaled, given.weights)
                )
            self._emit(given, gram, status, watch, extra=seconds)

    def _asked(self, given: HandedIn) -> Losses:
        """The losses with those of tasks that are measured alone: their forwards are made here, and change nothing."""
        made: dict[str, Any] = {}
        with undisturbed(self.gradients.model):
            for task, ask in given.asked.items():
                with torch.enable_grad():
                    made[task] = ask()
        trained = {task: loss for task, loss in given.losses.items() if is_present(loss)}
        return all_losses(self.tasks, trained | made)

    def _let_observe(self, given: HandedIn, due: _Due) -> None:
        """An observer may need gradients of its own, while the graphs are alive."""
        if self.observer is None or not due.rows:
            return
        self.guarded(lambda: self._find(given.losses))
        pieces = given.micro.losses if self._apart(given.micro) else (given.losses,)
        scaled = [self.scale.all(self._ordered(one)) for one in pieces]
        observer, every = self.observer, [loss for one in scaled for loss in one]
        self.guarded(lambda: self.gradients.guard.passes(every, lambda _: observer.looked(scaled), kind=OBSERVED))

    def _in_micro_batches(self, given: HandedIn, micro: MicroBatches) -> None:
        watch = Stopwatch(_device(given.losses))
        with watch.running():
            scaled = [self.scale.all(self._ordered(one)) for one in micro.losses]
            take_along(self._ordered(given.losses))
            found, status = self.guarded(
                lambda: self.gradients.in_micro_batches(
                    self._find(given.losses), scaled, micro.shares, len(self.tasks), given.weights
                )
            )
            if found is not None:
                self._check_self(micro.losses)
        gram, part = found if found is not None else (None, None)
        self._emit(given, gram, status, watch, Noise(part, len(self.gradients.shares)))

    def _apart(self, micro: MicroBatches | None) -> TypeGuard[MicroBatches]:
        """Whether the micro-batches are measured one by one: in all processes if in one, though it has but one."""
        return micro is not None and (len(micro.losses) > 1 or self.ranks.size > 1)

    def _noise(self, micro: MicroBatches | None, gram: Array | None) -> Noise | None:
        """Of a step that was measured as a whole: the batches of several processes are micro-batches of it."""
        if self.ranks.size == 1:
            return Noise(None, 1) if micro is not None else None
        self.gradients.shares = shares = self.ranks.shares([1.0])
        parts = self.ranks.parts
        if gram is None or parts is None or parts.shape != gram.shape:  # a failure, or tasks that share nothing
            return Noise(None, len(shares))
        return Noise(noise_part(gram, parts, shares), len(shares))

    def _check_self(self, losses: Iterable[Losses]) -> None:
        """Once: measure a task with its own copy and with its negative, on a few micro-batches."""
        if self.self_checked:
            return
        self.self_checked = True

        def check() -> tuple[float, float]:
            few = self.ranks.together(lambda: list(itertools.islice(losses, SELF_CHECKED)))
            return cosines_with_itself(self.gradients, self.scale, self.tasks, few)

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
        self.gradients.check_micro()

    def _find(self, losses: Losses) -> SharedLayers:
        """The shared layers, announced to the sinks when they are first found."""
        shared = self.gradients.find({task: losses[task] for task in self.tasks})
        if self.report.header is None:
            self.report.start(shared)
        if self.gradients.grown:
            self.report.grow(shared)
        return shared

    def _find_features(self, losses: Losses) -> list[Feature]:
        self._find(losses)  # a file begins with its layers
        found = self.features.find(self._ordered(losses))
        if found:
            self.report.start_features([f.name for f in found], [f.size for f in found])
        return found

    def _ordered(self, losses: Losses) -> list[Tensor]:
        """(T,) in the order of the tasks."""
        return [losses[task] for task in self.tasks]

    def guarded(self, measure: Callable[[], T]) -> tuple[T | None, str]:
        """The result and a row's status; a failure is a status, not an exception."""
        try:
            return measure(), MEASURED
        except GradprobeError:
            raise  # a wrong call, or a file that cannot be written: for the user to see
        except NotMeasured as why:
            if why.said:
                self._warn(why.said)
            return None, str(why)
        except Exception as error:
            reason = f"measuring failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            self._warn(reason)
            return None, reason

    def _guarded_together(self, measure: Callable[[], T]) -> tuple[T | None, str]:
        return self.guarded(lambda: self.ranks.together(measure))

    def now(self) -> float:
        """Seconds since recording started."""
        return time.perf_counter() - self.report.started

    # ---- rows

    def _made(
        self, given: HandedIn, gram: Array | None, status: str, watch: Stopwatch, noise: Noise | None = None
    ) -> Call:
        values = np.array(scalars(self._ordered(given.losses)))
        there = np.array([loss.requires_grad for loss in self._ordered(given.losses)])  # no graph: the task is absent
        return Call(
            step=self.clock.step,
            losses=given.losses,
            values=values,
            weights=given.weights,
            gram=gram,
            status=status,
            watch=watch,
            batch_size=given.batch_size,
            noise=noise,
            shares=self.gradients.shares,
            present=there,
        )

    def _emit(
        self,
        given: HandedIn,
        gram: Array | None,
        status: str,
        watch: Stopwatch,
        noise: Noise | None = None,
        *,
        extra: float = 0.0,
    ) -> None:
        """Hand on the row of one call: at once where no optimizer will take its step, else when that is complete.

        Args:
            given: What was measured.
            gram: (L, T, T), as the losses were scaled; None: there is no measurement.
            status: Why not.
            watch: Has counted what it cost.
            noise: Of a measurement in micro-batches.
            extra: Seconds that the call has cost besides.
        """
        if noise is None:
            noise = self._noise(given.micro, gram)
        call = self._made(given, gram, status, watch, noise)
        if self.accumulation is None or not self.accumulation.takes(call, self.scale.factor):
            self._emit_calls([call], gram, noise)
        self.clock.schedule.spent(watch.seconds + extra)

    def _emit_calls(self, calls: Sequence[Call], gram: Array | None, noise: Noise | None) -> None:
        """Hand on the row of a step, and of all processes: the mean of their losses, and all their samples."""
        call = as_one(calls, gram, noise)
        own, known = np.append(call.values, call.batch_size), np.append(call.present, True)
        mean, present = self.ranks.mean_of_present(own, known)
        values, there = mean[:-1], present[:-1]
        self.report.took_part(there)
        header = self.report.header
        if header is None:
            return  # not even the layers could be found; the warning is out
        status, reach = call.status, None
        with call.watch.running():
            if gram is None:
                gram = np.full((len(header.layers), len(self.tasks), len(self.tasks)), np.nan)
            elif status == MEASURED:
                gram = padded(self.scale.off(gram), len(header.layers))
                reach = self.gradients.counted(gram)
                if self.gradients.grown and self.gradients.shared is not None:
                    self.report.grow(self.gradients.shared)
                status = status_of(self.tasks, values, gram, there)
                status = OVERFLOWED if status == NONFINITE_GRADIENT and self.scale.there else status
                status = self._marked(status)
                gram = self.gradients.last_gram = finite(gram)
        if self.observer is not None:
            self.observer.measured(self._ordered(call.losses), call.weights, gram, status)
        if noise is not None:
            part = np.full_like(gram, np.nan) if noise.part is None else self.scale.off(noise.part)
            part = finite(padded(part, len(header.layers)))
        self.report.row(
            Row(
                step=call.step,
                epoch=self.epoch,
                time=self.now(),
                loss=values,
                weight=call.weights,
                gram=gram,
                lr=float("nan") if self.optimizer is None else learning_rate(self.optimizer),
                overhead=call.watch.seconds,
                batch_size=round(mean[-1] * self.ranks.size),
                status=status,
                gram_noise=None if noise is None else part,
                micro_batches=1 if noise is None else noise.batches,
                reach=reach,
            )
        )

    def _marked(self, status: str) -> str:
        """The status of a row of which all else is well; it may be that gradients do not add up."""
        return self.gradients.guard.mark or status if status == MEASURED else status

    def _emit_features(self, features: Sequence[Feature], gram: Array | None, watch: Stopwatch) -> None:
        if gram is not None and self.features.names:
            # The gradient of a mean over processes, at features that each process has for itself.
            gram = self.ranks.mean(self.features.arranged(features, self.scale.off(gram))) / self.ranks.size
            self.report.row(FeatureRow(self.clock.step, self.epoch, self.now(), gram, overhead=watch.seconds))

    # ---- on the probe loader

    def _on_loader(self) -> None:
        """The measurement on the probe loader, micro-batch by micro-batch, which changes nothing.

        Raises:
            ProbeError: The loader's losses are not those of the probe's tasks.
        """
        loader = self.loader
        assert loader is not None
        watch, seen = Stopwatch(self.gradients.device), SeenLosses(self.tasks)
        with self.ranks.equal_shares(), watch.running(), undisturbed(self.gradients.model):
            found, status = self.guarded(lambda: self._passes_on(loader, seen))
            header = self.report.header
            if header is None:  # not even the shared layers could be found
                return
            loss, there = self.ranks.mean_of_present(seen.mean(loader.batches), seen.there)
            gram = noise = np.full((len(header.layers), len(self.tasks), len(self.tasks)), np.nan)
            if found is not None:
                gram, noise = (self.scale.off(part) for part in found)
            if status == MEASURED:
                status = status_of(self.tasks, loss, gram, there)
            if found is not None and not self.self_checked:
                self._check_self(all_losses(self.tasks, one) for one in self._losses_of(loader))
        batches = loader.batches * self.ranks.size
        self.report.row(
            ProbeLoaderRow(
                step=self.clock.step,
                epoch=self.epoch,
                time=self.now(),
                loss=loss,
                gram=finite(gram),
                gram_noise=finite(noise),
                micro_batches=batches,
                batch_size=batches * loader.batch_size,
                overhead=watch.seconds,
                status=self._marked(status),
            )
        )

    def _losses_of(self, loader: ProbeLoader) -> Iterator[Losses]:
        return loader.losses(self.clock.step, self.ranks.rank)

    def _passes_on(self, loader: ProbeLoader, seen: SeenLosses) -> tuple[Array, Array]:
        made = self._losses_of(loader)
        waiting = [self.ranks.together(lambda: seen.add(next(made)))]
        shared = self._find(waiting[0])
        self.gradients.let_go()

        def each() -> Iterator[list[Tensor]]:
            # Popped: the first forward's graph must not live until the last one's is gone.
            for losses in itertools.chain((waiting.pop() for _ in range(1)), map(seen.add, made)):
                yield self.scale.all(self._ordered(losses))

        return self.gradients.in_micro_batches(shared, each(), loader.shares, len(self.tasks), aside=True)

    # ---- going on

    def state_dict(self) -> dict[str, Any]:
        return {
            "clock": self.clock.state_dict(),
            "meter": self.gradients.state_dict(),
            "epoch": self.epoch,
            "last_row": self.report.last_step,
            "last_metrics": self.report.last_metrics,
            "seconds": self.now(),
            **({"updates": self.observer.state_dict()} if self.observer is not None else {}),
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
        self.gradients.load_state_dict(state["meter"])
        self.epoch = state["epoch"]
        self.report.started = time.perf_counter() - state["seconds"]
        if self.observer is not None and "updates" in state:
            self.observer.load_state_dict(state["updates"])
        self.report.rewind(self.clock.first_open, state["last_metrics"])


def _device(losses: Losses) -> torch.device:
    return next(iter(losses.values())).device


class Observer(Protocol):
    """Is told of every call and every measurement; see :mod:`gradprobe.updates.optimizer_watch`."""

    def check(
        self, tasks: Sequence[str], level: GradientLevel, optimizer: Optimizer | None, gradients: TaskGradients
    ) -> None:
        """Raise a ``ProbeError`` where it cannot belong to this probe."""

    def open(self, recorder: Recorder, model: nn.Module) -> None:
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
