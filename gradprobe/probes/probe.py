"""The probe: put into a training loop, it measures task gradients on the shared layers and hands rows on."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.errors import GradprobeError, ProbeError
from gradprobe.measures import Array
from gradprobe.probes import passes
from gradprobe.probes.clock import StepClock
from gradprobe.probes.graph import SharedLayers, by_module, check_losses, find_shared
from gradprobe.rows import MEASURED, NONFINITE_GRADIENT, NONFINITE_LOSS, Header, Provenance, ResumableSink, Row, Sink

Weights = Mapping[str, "float | Tensor"]
Losses = Mapping[str, Tensor]
Shared = Iterable["str | nn.Parameter"] | Callable[[str, nn.Parameter], bool]

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[GradientProbe]] = weakref.WeakKeyDictionary()


class GradientProbe:
    """Measures the Gramian of the task gradients on every shared layer while a model trains.

    Nothing it does changes the training: parameters, buffers, random numbers and ``.grad`` end as they would have
    without it. A failure in measuring becomes a row that says why; only a wrong call raises.

    Args:
        model: Any module whose tasks share parameters.
        tasks: Names, two or more.
        sinks: Who gets the rows.
        every: Measure at steps 0, every, 2 every, ...
        optimizer: Where given, a training step is what its ``step()`` completes, and rows carry its learning rate.
        accumulate: Without an optimizer: how many calls make one step.
        shared: Overrides the search in the graph: module names, parameters, or a predicate of name and parameter.
        layers: How parameters are grouped: layer name -> parameters. Default: by the module that owns them.
        provenance: Stored in the header.

    Raises:
        ProbeError: Fewer than two tasks, a model that has a probe already, or ``shared`` that names nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[str],
        sinks: Sequence[Sink] = (),
        *,
        every: int = 10,
        optimizer: Optimizer | None = None,
        accumulate: int = 1,
        shared: Shared | None = None,
        layers: Mapping[str, Iterable[nn.Parameter]] | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        if len(self.tasks) < 2 or len(set(self.tasks)) != len(self.tasks):
            raise ProbeError(f"tasks={list(self.tasks)}: give two or more different names.")
        if any("|" in task for task in self.tasks):
            raise ProbeError(f"tasks={list(self.tasks)}: a name must not contain '|', which joins the names of a pair.")
        self._clock = StepClock(every, None, accumulate)  # checks its arguments before a hook is set
        holder = _attached.get(model)
        if holder is not None and holder() is not None:
            raise ProbeError("this model has a probe already. Close it first: probe.close()")
        self._model = model
        self._groups = layers if layers is not None else by_module(model)
        self._chosen = None if shared is None else _choose(model, shared)
        self._clock = StepClock(every, optimizer, accumulate)
        self._optimizer = optimizer
        self._sinks = list(sinks)
        self._provenance = dict(provenance or {})
        self._shared: SharedLayers | None = None
        self._header: Header | None = None
        self._last_gram: Array | None = None
        self._last_metrics = -1
        self._started = time.perf_counter()
        self._warned: set[str] = set()
        self._closed = False
        self.epoch = 0
        self.overhead = 0.0
        _attached[model] = weakref.ref(self)

    # ---- in the training loop

    def backward(self, losses: Losses, weights: Weights | None = None, *, batch_size: int = 0) -> None:
        """The joint backward, and on due steps the measurement.

        ``.grad`` ends bit for bit as after ``sum(w[t] * losses[t] for t in losses).backward()``.

        Args:
            losses: Task -> unweighted scalar loss, as it comes from the model.
            weights: Task -> weight in force; default 1 each.
            batch_size: Stored with the row.

        Raises:
            ProbeError: A task is missing or unknown, a loss has no graph or is no scalar, a weight is NaN.
        """
        self._check(losses)
        values = self._weights(weights)
        applied = weights if weights is not None else dict.fromkeys(self.tasks, 1.0)
        total = sum(applied[task] * losses[task] for task in losses)
        assert isinstance(total, Tensor)
        if not self._clock.due():
            total.backward()
        else:
            self._measured_backward(losses, values, total, batch_size)
        self._clock.called()

    def record(self, losses: Losses, weights: Weights | None = None, *, batch_size: int = 0) -> None:
        """Measure on due steps and change nothing; the loop's own backward comes after.

        Arguments and errors as for :meth:`backward`.
        """
        self._check(losses)
        values = self._weights(weights)
        if self._clock.due():
            started = time.perf_counter()
            gram, status = self._guarded(lambda: self._explicit(losses))
            self._emit(losses, values, gram, status, started, 0.0, batch_size)
        self._clock.called()

    def note(self, losses: Losses, weights: Weights | None, status: str, *, batch_size: int = 0) -> None:
        """Hand on a row without a measurement: the losses, the weights, and the reason.

        For a step that the loop cannot take, such as one with a NaN loss.
        """
        started = time.perf_counter()
        self._guarded(lambda: self._find(losses))
        self._emit(losses, self._weights(weights), None, status, started, 0.0, batch_size)

    def log_metrics(self, epoch: int, **values: float) -> None:
        """Hand on metrics of one epoch."""
        for sink in self._sinks:
            sink.write_epoch(epoch, values)
        self._last_metrics = max(self._last_metrics, epoch)

    def flush(self) -> bool:
        """Make all rows so far safe. Call it before saving a state to resume from: rows must not be behind it.

        Returns:
            Whether they are.
        """
        return all([sink.flush() for sink in self._sinks])  # a list: each is asked, whatever the others say

    # ---- what is known

    @property
    def step(self) -> int:
        """The present training step, from 0."""
        return self._clock.step

    @property
    def header(self) -> Header | None:
        """Names of the shared layers; None before the first measurement."""
        return self._header

    @property
    def shared(self) -> SharedLayers | None:
        """The shared layers with their parameters; None before the first measurement."""
        return self._shared

    def state_dict(self) -> dict[str, Any]:
        """What a later probe needs to go on as this one would have.

        It flushes first: a checkpoint that is ahead of the file would leave a gap in the rows after a kill.
        """
        self.flush()
        return {
            "clock": self._clock.state_dict(),
            "epoch": self.epoch,
            "last_metrics": self._last_metrics,
            "seconds": time.perf_counter() - self._started,
            "last_gram": None if self._last_gram is None else self._last_gram.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the probe stopped that ``state`` came from; what the file holds beyond that is cut."""
        self._clock.load_state_dict(state["clock"])
        self.epoch, self._last_metrics = state["epoch"], state["last_metrics"]
        self._started = time.perf_counter() - state["seconds"]
        gram = state["last_gram"]
        self._last_gram = None if gram is None else np.array(gram, dtype=np.float64)
        for sink in self._sinks:
            if isinstance(sink, ResumableSink):
                sink.rewind(self.step, self._last_metrics)

    # ---- the end

    def close(self, end: str = "finished") -> None:
        """Let go of model and optimizer, and close the sinks. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._clock.close()
        if self._header is None:
            self._start(SharedLayers((), ()))
        _attached.pop(self._model, None)
        for sink in self._sinks:
            sink.close(end)

    def __enter__(self) -> GradientProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.close("interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {kind and kind.__name__}")

    # ---- measuring

    def _check(self, losses: Losses) -> None:
        if self._closed:
            raise ProbeError("this probe was closed; attach a new one to measure further.")
        check_losses(self.tasks, losses)

    def _measured_backward(self, losses: Losses, weights: Array, total: Tensor, batch_size: int) -> None:
        started = time.perf_counter()
        ordered = [losses[task] for task in self.tasks]
        plan, status = self._guarded(lambda: self._plan(losses, ordered, weights))
        gram = plan if isinstance(plan, np.ndarray) else None
        joint = time.perf_counter()
        if isinstance(plan, passes.DerivedMeasurement):
            with plan.listening():
                total.backward(retain_graph=True)
            joint = time.perf_counter() - joint
            gram, status = self._guarded(plan.result)
            if gram is None and status == MEASURED:
                gram, status = self._guarded(lambda: self._explicit(losses))
        else:
            total.backward()
            joint = time.perf_counter() - joint
        self._emit(losses, weights, gram, status, started, joint, batch_size)

    def _plan(self, losses: Losses, ordered: list[Tensor], weights: Array) -> Array | passes.DerivedMeasurement:
        """Either the measurement itself, or one that the joint backward completes."""
        shared = self._find(losses)
        derived = None
        if self._last_gram is not None and shared.layers:
            derived = passes.task_to_derive(self._last_gram, weights, shared.parameters[0].dtype)
        if derived is None:
            return self._explicit(losses)
        return passes.DerivedMeasurement(self._model, shared, ordered, weights, derived)

    def _explicit(self, losses: Losses) -> Array:
        return passes.measure_explicitly(self._model, self._find(losses), [losses[t] for t in self.tasks])

    def _find(self, losses: Losses) -> SharedLayers:
        """The shared layers; searched for once, at the first measurement, and announced to the sinks."""
        if self._shared is None:
            ordered = {task: losses[task] for task in self.tasks}
            self._start(find_shared(self._groups, ordered, self._chosen))
        assert self._shared is not None
        return self._shared

    def _start(self, shared: SharedLayers) -> None:
        header = Header(
            tasks=self.tasks,
            layers=tuple(layer.name for layer in shared.layers),
            layer_size=np.array([layer.size for layer in shared.layers], dtype=np.int64),
            reach=np.array(shared.reach, dtype=bool).reshape(len(shared.layers), len(self.tasks)),
            provenance=self._provenance,
        )
        self._shared, self._header = shared, header  # first: no sink is started twice, whatever happens below
        for sink in list(self._sinks):
            try:
                sink.start(header)
            except GradprobeError:
                raise  # a file that cannot be written is for the user to see
            except Exception as error:
                self._sinks.remove(sink)
                self._warn(f"{type(sink).__name__} could not start and is left out: {type(error).__name__}: {error}")

    def _guarded(self, measure: Callable[[], Any]) -> tuple[Any, str]:
        """The result of ``measure`` and the row's status; a failure is a status, not an exception."""
        try:
            return measure(), MEASURED
        except GradprobeError:
            raise  # a wrong call, or a file that cannot be written: for the user to see
        except Exception as error:
            reason = f"measuring failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            self._warn(reason)
            return None, reason

    def _emit(
        self,
        losses: Losses,
        weights: Array,
        gram: Array | None,
        status: str,
        started: float,
        elsewhere: float,
        batch_size: int,
    ) -> None:
        """Hand one row on. ``elsewhere``: seconds since ``started`` that training would have spent anyway."""
        if self._header is None:
            return  # not even the layers could be found; the warning is out
        values = np.array([float(losses[t].detach()) for t in self.tasks])
        if gram is None:
            gram = np.full((len(self._header.layers), len(self.tasks), len(self.tasks)), np.nan)
        elif status == MEASURED:
            self._last_gram = gram
            status = _status(values, gram, self._header.reach)
        now = time.perf_counter()
        spent = now - started - elsewhere
        self.overhead += spent
        row = Row(
            step=self._clock.step,
            epoch=self.epoch,
            time=now - self._started,
            loss=values,
            weight=weights,
            gram=gram,
            lr=float(self._optimizer.param_groups[0]["lr"]) if self._optimizer is not None else float("nan"),
            overhead=spent,
            batch_size=batch_size,
            status=status,
        )
        for sink in self._sinks:
            try:
                sink.write(row)
            except Exception as error:  # a display or a logger must not end a training
                self._warn(f"{type(sink).__name__} failed: {type(error).__name__}: {error}")

    def _weights(self, weights: Weights | None) -> Array:
        if weights is None:
            return np.ones(len(self.tasks))
        missing = [task for task in self.tasks if task not in weights]
        if missing:
            raise ProbeError(f"weights lack {missing}; give one for each of {list(self.tasks)}.")
        values = np.array([float(weights[task]) for task in self.tasks])
        for task, value in zip(self.tasks, values, strict=True):
            if not np.isfinite(value):
                raise ProbeError(f"the weight of task {task!r} is {value} at step {self.step}; it must be finite.")
        return values

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"gradprobe: step {self.step}: {reason}. Training goes on.", RuntimeWarning, stacklevel=4)


def _status(losses: Array, gram: Array, reach: Any) -> str:
    if not np.isfinite(losses).all():
        return NONFINITE_LOSS
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    return NONFINITE_GRADIENT if np.isnan(diagonal[reach]).any() else MEASURED


def _choose(model: nn.Module, shared: Shared) -> set[int]:
    """``id`` of the parameters that ``shared`` names."""
    named = dict(model.named_parameters())
    if callable(shared):
        return {id(p) for name, p in named.items() if shared(name, p)}
    wanted = [shared] if isinstance(shared, str) else list(shared)
    chosen: set[int] = set()
    for item in wanted:
        if isinstance(item, str):
            found = {id(p) for name, p in named.items() if name == item or name.startswith(item + ".")}
            if not found:
                raise ProbeError(f"shared={item!r}: the model has no parameter there (first: {list(named)[:4]}).")
            chosen |= found
        else:
            chosen.add(id(item))
    return chosen
