"""The probe: put into a training loop, it measures task gradients on the shared layers and hands rows on."""

from __future__ import annotations

import atexit
import dis
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from gradprobe.errors import ProbeError, tell
from gradprobe.probes.calls import BatchSize, GivenLosses, HandedIn, Losses, Weights, handed_in, task_names
from gradprobe.probes.clock import AlsoDue, FirstProcessDecides, StepClock, bare, make_schedule, whole
from gradprobe.probes.feature_gradients import FeatureGradients
from gradprobe.probes.gramian import LossScale
from gradprobe.probes.probe_options import ProbeKeywords, ProbeOptions, refuse_unknown, shows_options
from gradprobe.probes.recorder import Recorder
from gradprobe.probes.reporter import Reporter
from gradprobe.probes.shared_layers import Selection, SharedLayers
from gradprobe.probes.task_gradients import TaskGradients
from gradprobe.processes import replicas
from gradprobe.rows import Header, Sink

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GradientProbe", "ending"]


class GradientProbe:
    """Measures the Gramian of the task gradients on every shared layer while a model trains.

    Nothing it does changes the training: parameters, buffers, random numbers and ``.grad`` end as they would have
    without it, which is checked by its effect, see docs/promise.md. A failure in measuring becomes a row that says why;
    only a wrong call raises, and at the first row a model that would not end so. Hooks of your own see its passes too,
    and ``retain_grad()`` on an activation keeps the sum over them.

    Args:
        model: Any module whose tasks share parameters.
        tasks: Names, two or more.
        sinks: Who gets the rows.
        options: The fields of :class:`gradprobe.probes.ProbeOptions`, which says what each means.

    Raises:
        ProbeError: Fewer than two tasks, a model that has a probe already, ``shared`` that names nothing, or an
            argument out of its range.
    """

    @shows_options
    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[str],
        sinks: Sequence[Sink] = (),
        *,
        _caller: FrameType | None = None,
        _open: Callable[[], Sink] | None = None,
        _divided: bool = False,
        **options: Unpack[ProbeKeywords],
    ) -> None:
        refuse_unknown(GradientProbe, options)
        o = ProbeOptions(**options)
        self.tasks = task_names(tasks)
        optimizer = bare(o.optimizer) if o.optimizer is not None else None
        chosen = o.measured
        model, ranks = replicas(model, o.process_group)
        schedule = make_schedule(o.every, o.budget, default=chosen.every)
        if o.budget is not None and ranks.size > 1:
            schedule = FirstProcessDecides(schedule, ranks.first_says)
        readers = [reader for reader in (o.updates, o.ledger) if reader is not None]
        observer = readers[0].together(readers) if readers else None
        if observer is not None:
            schedule = AlsoDue(schedule, observer.wants)
        clock = StepClock(schedule, o.accumulate)
        scale = LossScale(o.scaler)
        selection = Selection(model, o.shared, o.layers, nothing=not chosen.parameters, divided=_divided)
        how = o.about()

        def warn(reason: str) -> None:
            report.warn(clock.step, reason)

        def differs(value: float) -> None:
            report.annotate({"probe.joint_difference.step": clock.step, "probe.joint_difference.value": value})

        gradients = TaskGradients(model, selection, o.memory, warn, ranks, o.size, differs)
        if observer is not None:
            observer.check(self.tasks, chosen, optimizer, gradients)
            how |= {reader.name: reader.about for reader in readers}
        if o.probe_loader is not None:
            gradients.check_micro()
            how["probe_loader"] = True
        # The last that can raise, so that what failed left nothing attached. The file is opened when the old probe of
        # the same variable, which may hold it, is closed.
        _make_room(model, _caller or sys._getframe(1))
        sinks = [*((_open(),) if _open is not None else ()), *sinks] if ranks.first else []
        about = {} if o.probe_loader is None else {"probe_loader": o.probe_loader.about}
        report = Reporter(self.tasks, sinks, {**(o.provenance or {}), "probe": how, **about})
        self._recorder = Recorder(
            tasks=self.tasks,
            level=chosen,
            clock=clock,
            report=report,
            gradients=gradients,
            features=FeatureGradients(model, o.features, warn, gradients.guard),
            scale=scale,
            optimizer=optimizer,
            ranks=ranks,
            loader=o.probe_loader,
        )
        if observer is not None:
            observer.open(self._recorder, model)
            self._recorder.observer = observer
            if self._recorder.accumulation is not None:
                self._recorder.accumulation.stop()
        self._model = model
        _claim(model, self)
        gradients.guard.say_hooks()
        # A probe that is lost without being closed lets go of the optimizer, and completes the file that is its own.
        own = report if _open is not None else None
        self._lost = weakref.finalize(self, _end_lost, self._recorder, own, "not closed")
        self._lost.atexit = False
        if own is not None:  # by a hook of its own: h5py must still work then, and what registers last is called first
            atexit.register(self._lost)

    # ---- in the training loop

    def backward(
        self,
        losses: GivenLosses | None = None,
        weights: Weights | None = None,
        *,
        micro: Sequence[GivenLosses] | None = None,
        batch_size: BatchSize = 0,
    ) -> None:
        """The joint backward, and on due steps the measurement.

        On steps where a task is derived, the graph is kept until the result is checked, and freed then.

        ``.grad`` ends bit for bit as after ``sum(w[t] * losses[t] for t in losses).backward()``, or, with a scaler,
        as after ``scaler.scale(sum(...)).backward()``.

        Args:
            losses: Task -> unweighted scalar loss, as it comes from the model. May be left out beside ``micro``. A task
                that is left out, or whose loss is None or has no graph, is absent from this step: the others are
                trained and measured, and the row says so. A function that makes a loss stands for a task that this
                step does not train: it is called at due steps, with the parameters as they are, and what its forward
                changes (buffers, random numbers) is put back.
            weights: Task -> weight in force; default 1 each. An absent task needs none.
            micro: The losses of each of m micro-batches that make up the batch, each with a forward of its own: the
                noise of the measurement is known then (``gram_noise``). ``losses`` must be their mean, weighted by
                their samples, which is what is trained: :func:`gradprobe.probes.mean_losses`.
            batch_size: Samples, stored with the row; beside ``micro`` a list of the samples of each: without one, they
                count as equally many.

        Raises:
            ProbeError: A task is unknown, all are absent, a loss is no scalar, a weight is NaN, a shared parameter is
                gone, or ``losses`` are not the mean of ``micro``.
        """
        self._recorder.backward(self._handed_in(losses, weights, micro, batch_size))

    def record(
        self,
        losses: GivenLosses | None = None,
        weights: Weights | None = None,
        *,
        micro: Sequence[GivenLosses] | None = None,
        batch_size: BatchSize = 0,
    ) -> None:
        """Measure on due steps and change nothing; the loop's own backward comes after.

        Arguments and errors as for :meth:`backward`. Features cost a pass through each head here.
        """
        self._recorder.record(self._handed_in(losses, weights, micro, batch_size))

    def note(self, losses: Losses, weights: Weights | None, status: str, *, batch_size: int = 0) -> None:
        """Instead of the two above, for a step that the loop cannot take, such as one with a NaN loss.

        Hands on a row without a measurement: the losses, the weights, and the reason.
        """
        self._check_open()
        given = handed_in(self.tasks, losses, weights, None, batch_size, self.step, lambda: self.is_due)
        self._recorder.note(given, status)

    def log_metrics(self, epoch: int, **values: float) -> None:
        """Hand on metrics of one epoch."""
        self._check_open()
        self._recorder.report.epoch(epoch, values)

    def flush(self) -> bool:
        """Make all rows so far safe. Call it before saving a state to resume from: rows must not be behind it.

        Within a step of several calls, its row stands for those that were made so far.

        Returns:
            Whether they are.
        """
        return self._recorder.flush()

    # ---- what is known

    @property
    def epoch(self) -> int:
        """The epoch that rows are stored with, from 0; set by the loop."""
        return self._recorder.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._recorder.epoch = whole("epoch", epoch, least=0)

    @property
    def step(self) -> int:
        """The present training step, from 0."""
        return self._recorder.clock.step

    @property
    def share(self) -> float:
        """Under data parallelism: which share of the step's samples this process has.

        To be set, before each call, by a loop whose processes have different numbers of samples, and which multiplies
        each process's losses by its share times the number of processes, so that all samples count alike. It matters
        to the estimate of the noise alone. 1 / processes where it was not set.
        """
        return self._recorder.ranks.share

    @share.setter
    def share(self, share: float) -> None:
        self._recorder.ranks.share = share

    @property
    def is_due(self) -> bool:
        """Whether a call now would measure. For a loop that makes its losses apart for the probe alone."""
        return self._recorder.due_next()

    @property
    def overhead(self) -> float:
        """Seconds spent measuring so far."""
        return self._recorder.report.overhead

    @property
    def header(self) -> Header | None:
        """Names of the shared layers; None before the first measurement."""
        return self._recorder.report.header

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features at which the tasks part; empty before the first measurement, and without a level
        that measures there.
        """
        return self._recorder.features.names

    @property
    def shared(self) -> SharedLayers | None:
        """The shared layers with their parameters; None before the first measurement."""
        return self._recorder.gradients.shared

    def state_dict(self) -> dict[str, Any]:
        """What a later probe needs to go on as this one would have.

        It flushes first: a checkpoint that is ahead of the file would leave a gap in the rows after a kill.
        """
        self.flush()
        return self._recorder.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the probe stopped that ``state`` came from; what the file holds beyond that is cut.

        Raises:
            ProbeError: It is the state of something else.
        """
        self._check_open()
        self._recorder.load_state_dict(state)

    # ---- the end

    def close(self, end: str = "finished") -> None:
        """Let go of model and optimizer, and close the sinks. A second call does nothing.

        An error of this is a warning, and :attr:`trouble` says it, where it would hide another: while an exception is
        under way, as in ``finally``, and at the end of a ``with`` block.

        Raises:
            RunFileError: The file could not be completed; says how many rows are lost, and where the others are.
        """
        self._close(end, raises=sys.exc_info()[1] is None)

    @property
    def trouble(self) -> str:
        """What of the file could not be written when the probe was closed, and what to do; empty: nothing."""
        return self._recorder.report.trouble

    def _close(self, end: str, *, raises: bool) -> None:
        if self._lost.detach() is None:
            return
        atexit.unregister(self._lost)
        _unclaim(self._model, self)
        try:
            _end(self._recorder, self._recorder.report, end)
        except Exception as error:
            if raises:
                raise
            tell(str(error))

    def __enter__(self) -> GradientProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(ending(error), raises=False)

    def _check_open(self) -> None:
        if not self._lost.alive:
            raise ProbeError("this probe was closed, and its file is complete; attach a new one to go on.")

    def _handed_in(
        self,
        losses: GivenLosses | None,
        weights: Weights | None,
        micro: Sequence[GivenLosses] | None,
        batch_size: BatchSize,
    ) -> HandedIn:
        self._check_open()
        if micro is not None:
            self._recorder.check_micro()
        step = self._recorder.clock.step
        return handed_in(self.tasks, losses, weights, micro, batch_size, step, lambda: self.is_due)


def ending(error: BaseException | None) -> str:
    """How a training ended, by what ended it: "finished", "interrupted" or "failed: ..."."""
    if error is None:
        return "finished"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}"


def _end(recorder: Recorder, report: Reporter | None, end: str) -> None:
    try:
        recorder.close()
    finally:
        if report is not None:
            report.close(end)


def _end_lost(recorder: Recorder, report: Reporter | None, end: str) -> None:
    """Of a probe that nobody has any more: nobody takes an exception either."""
    try:
        _end(recorder, report, end)
    except Exception as error:
        tell(str(error))


class _Attached(Protocol):
    """What is registered here."""

    def close(self, end: str = "finished") -> None:
        """Let go of the model."""


# One probe at a time has a model, so that none measures another's passes.
_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[_Attached]] = weakref.WeakKeyDictionary()


def _claim(model: nn.Module, probe: _Attached) -> None:
    """Note that ``model`` has ``probe`` now."""
    _attached[model] = weakref.ref(probe)


def _unclaim(model: nn.Module, probe: _Attached) -> None:
    """Note that ``probe`` has let go of ``model``."""
    if _holder(model) is probe:
        del _attached[model]


def _make_room(model: nn.Module, caller: FrameType | None) -> None:
    """Make sure that a new probe may attach.

    A cell of a notebook that is run again says ``probe = attach(model, ...)`` while ``probe`` still is the old one.
    The old one is closed then, since this very assignment is about to lose it. It is told from any other second
    attachment by the instruction that follows the call in ``caller``: a store to the variable that holds the old one.

    Raises:
        ProbeError: The model has a probe that something else holds.
    """
    old = _holder(model)
    if old is None:
        return
    if caller is not None and _about_to_be_assigned(caller) is old:
        old.close("finished")
        return
    raise ProbeError(
        f"this model ({type(model).__name__}) has a probe already, and two would measure each other. Close it first: "
        "probe.close(), or use it in a `with` block. In a notebook, assign the new probe to the variable that holds "
        "the old one."
    )


def _holder(model: nn.Module) -> _Attached | None:
    reference = _attached.get(model)
    return reference() if reference is not None else None


def _about_to_be_assigned(frame: FrameType) -> Any:
    """What the variable holds now to which the result of the running call goes; None where it goes elsewhere."""
    following = (i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti and i.opname != "CACHE")
    store = next(following, None)
    if store is None or store.opname not in ("STORE_NAME", "STORE_GLOBAL", "STORE_FAST"):
        return None
    if store.opname == "STORE_GLOBAL":
        return frame.f_globals.get(store.argval)
    return frame.f_locals.get(store.argval)
