"""What a loop hands in at one call of a probe (losses, weights, micro-batches), and what was measured of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.clock import Stopwatch, whole
from gradprobe.probes.gramian import scalars
from gradprobe.probes.shared_layers import check_names
from gradprobe.rows import MEASURED, NONFINITE_GRADIENT, NONFINITE_LOSS, absent

__all__ = ["is_present", "mean_losses", "shares_of"]


Weights = Mapping[str, "float | Tensor"]
Losses = Mapping[str, Tensor]
GivenLosses = Mapping[str, "Tensor | float | Callable[[], Tensor] | None"]
"""Losses as a loop hands them in; a function stands for a task that is measured at due steps, and not trained."""


def task_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks of a probe.

    Raises:
        ProbeError: Fewer than two, two of one name, or a name with ``|`` or that a file cannot hold.
    """
    names = tuple(tasks)
    if isinstance(tasks, str) or len(names) < 2 or len(set(names)) != len(names):
        raise ProbeError(f"tasks={tasks!r}: give a list of two or more different names.")
    check_names("tasks", names)
    if any("|" in task for task in names):
        raise ProbeError(f"tasks={list(names)}: a name must not contain '|', which joins the names of a pair.")
    return names


def all_losses(tasks: Sequence[str], losses: GivenLosses) -> dict[str, Tensor]:
    """The loss of every task: those that are there, in the order in which they were given, then the absent ones.

    A task is absent from a step where it is left out, or its loss is None, a plain number, or has no graph, as YOLOv5's
    own loss has none on a batch without boxes.

    Returns:
        Task -> 0-d tensor or tensor of one number; of an absent task NaN, without a graph.

    Raises:
        ProbeError: A task is unknown, or a loss is no real scalar.
    """
    _check_mapping("losses", losses)
    unknown = [task for task in losses if task not in tasks]
    if unknown:
        raise ProbeError(
            f"the probe was attached for tasks {list(tasks)}; losses have the unknown {unknown}. Pass each task's loss "
            "under its name; one that is absent from a step may be left out."
        )
    present = {}
    for task, loss in losses.items():
        if loss is None or isinstance(loss, (int, float)):
            continue
        fault = _shape_fault(loss)
        if fault:
            raise ProbeError(f"the loss of task {task!r} {fault}")
        assert isinstance(loss, Tensor)
        if loss.requires_grad:
            present[task] = loss
    if len(present) < len(tasks):
        device = next((loss.device for loss in present.values()), None)
        nothing = torch.full((), float("nan"), device=device)
        present |= {task: nothing for task in tasks if task not in present}
    return present


def is_present(loss: object) -> bool:
    """Whether a loss is of a task that takes part in the step."""
    return isinstance(loss, Tensor) and loss.requires_grad


def _shape_fault(loss: object) -> str:
    """What is wrong with a loss whether or not it has a graph, and what to do; empty where nothing is."""
    if not isinstance(loss, Tensor):
        return f"is a {type(loss).__name__}, not a tensor."
    if loss.numel() != 1:
        return f"has shape {tuple(loss.shape)}; reduce it to one number, for example with .mean()."
    if loss.is_complex():
        return "is complex; a gradient needs a real one, for example .abs()."
    return ""


def loss_fault(loss: object) -> str:
    """What is wrong with a loss, and what to do; empty where nothing is."""
    fault = _shape_fault(loss)
    if not fault and isinstance(loss, Tensor) and not loss.requires_grad:
        return "has no graph (was it detached, or computed under no_grad?), so it has no gradient to measure."
    return fault


def _weight_values(
    tasks: Sequence[str],
    weights: Weights | None,
    step: int,
    due: Callable[[], bool] | None = None,
    absent: Collection[str] = (),
) -> Array:
    """The weights in force, (T,) in the order of ``tasks``; 1 each where there are none.

    A task that is absent from the step needs none: NaN where it has none.

    Reading tensors on a GPU makes the host wait: where some are, and ``due`` says that the step is not measured, they
    are left alone, and the result is NaN.

    Raises:
        ProbeError: A task has no weight, an unknown one has, or a weight is NaN, infinite or no number.
    """
    if weights is None:
        return np.ones(len(tasks))
    _check_mapping("weights", weights)
    given = {task: weight for task, weight in weights.items() if not (weight is None and task in absent)}
    missing = [task for task in tasks if task not in given and task not in absent]
    unknown = [task for task in weights if task not in tasks]
    if missing:
        raise ProbeError(f"weights lack {missing}; give one for each of {list(tasks)}.")
    if unknown:
        raise ProbeError(f"weights have the unknown {unknown}; the tasks are {list(tasks)}.")
    known = _from_devices(given, due)
    if known is None:
        return np.full(len(tasks), np.nan)
    known |= {task: _number(task, weight) for task, weight in given.items() if task not in known}
    for task, value in known.items():
        if not np.isfinite(value):
            raise ProbeError(f"the weight of task {task!r} is {value} at step {step}; it must be finite.")
    return np.array([known.get(task, np.nan) for task in tasks])


def _from_devices(weights: Weights, due: Callable[[], bool] | None) -> dict[str, float] | None:
    """The weights that lie on a GPU, in one transfer; None: there are some, and nobody will look at them."""
    there = {t: w for t, w in weights.items() if isinstance(w, Tensor) and not w.is_cpu and w.numel() == 1}
    if there and due is not None and not due():
        return None
    return dict(zip(there, scalars(list(there.values())), strict=True))


def _check_mapping(what: str, given: object) -> None:
    """Raise where something is no mapping.

    Raises:
        ProbeError: Says what it is instead.
    """
    if not isinstance(given, Mapping):
        raise ProbeError(f"{what} are a {type(given).__name__}; give a dict: task -> one of them.")


def _number(task: str, weight: float | Tensor) -> float:
    try:
        return float(weight.detach()) if isinstance(weight, Tensor) else float(weight)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ProbeError(f"the weight of task {task!r} is {weight!r}; it must be one number.") from error


BatchSize = int | Sequence[int]
"""Samples of the batch, or of each of its micro-batches."""
_APART = 1e-2
"""Losses of a batch that differ from the mean over its micro-batches by more than this part are not that mean. Half
precision is within it, a sum in the place of a mean is not."""


@dataclass(frozen=True)
class MicroBatches:
    """The losses of one batch, micro-batch by micro-batch.

    Attributes:
        losses: (m,) task -> unweighted loss, each with a graph of its own.
        shares: (m,) of the batch's samples, summing to 1.
        batch_size: Samples of the batch; 0: unknown.
    """

    losses: tuple[Losses, ...]
    shares: tuple[float, ...]
    batch_size: int

    def mean(self) -> dict[str, Tensor]:
        """The losses of the batch."""
        return mean_losses(self.losses, self.shares)


def mean_losses(losses: Sequence[Losses], shares: Sequence[float]) -> dict[str, Tensor]:
    """Task -> sum_a alpha_a loss_a: what training is to step on, so that its gradient is the mean that is measured.

    Of a single micro-batch the losses as they are.
    """
    if len(losses) == 1:
        return dict(losses[0])
    return {task: _weighted([one[task] for one in losses], shares) for task in losses[0]}


def _weighted(losses: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """A micro-batch from which the task is absent adds nothing; absent from all, the task has no loss."""
    present = [(loss, share) for loss, share in zip(losses, shares, strict=True) if is_present(loss)]
    if not present:
        return losses[0]
    total = present[0][0] * present[0][1]
    for loss, share in present[1:]:
        total = total + loss * share
    return total


def shares_of(sizes: Sequence[int]) -> tuple[float, ...]:
    """Each micro-batch's share of the samples.

    >>> shares_of([3, 1])
    (0.75, 0.25)
    """
    return tuple(size / sum(sizes) for size in sizes)


def _micro_batches(tasks: tuple[str, ...], losses: Sequence[GivenLosses], batch_size: BatchSize) -> MicroBatches:
    """What ``micro=`` and ``batch_size=`` of a probe's call mean.

    Args:
        tasks: Of the probe.
        losses: (m,).
        batch_size: Samples of each micro-batch; or of the batch, whose micro-batches are equally large then.

    Raises:
        ProbeError: There is no micro-batch, one lacks a task or has a loss without a graph, or the sizes do not fit.
    """
    if isinstance(losses, Mapping) or not isinstance(losses, Sequence) or not losses:
        raise ProbeError(
            "micro= must be a list with the losses of each micro-batch, such as [{'det': ..., 'cls': ...}]."
        )
    checked = tuple(_checked(tasks, one, place) for place, one in enumerate(losses))
    count = len(checked)
    if isinstance(batch_size, Sequence):
        sizes = [whole("batch_size", size) for size in batch_size]
        if len(sizes) != count:
            raise ProbeError(f"batch_size={sizes} has {len(sizes)} sizes for {count} micro-batches; give one for each.")
        return MicroBatches(checked, shares_of(sizes), sum(sizes))
    total = whole("batch_size", batch_size, least=0)
    if 0 < total < count:
        raise ProbeError(f"batch_size={total} samples are less than one for each of {count} micro-batches.")
    return MicroBatches(checked, (1 / count,) * count, total)


def _checked(tasks: tuple[str, ...], losses: GivenLosses, place: int) -> Losses:
    try:
        return all_losses(tasks, losses)
    except ProbeError as error:
        raise ProbeError(f"micro[{place}]: {error}") from error


def check_mean(losses: Losses, micro: MicroBatches) -> None:
    """Raise where the losses of a batch are not those of its micro-batches.

    Raises:
        ProbeError: A task's loss is another than the mean; says which and by how much.
    """
    known = iter(scalars([one[task] for task in losses for one in (losses, *micro.losses)]))
    for task in losses:
        loss, *parts = itertools.islice(known, 1 + len(micro.losses))
        parts = [part if is_present(one[task]) else 0.0 for part, one in zip(parts, micro.losses, strict=True)]
        mean = math.fsum(share * part for share, part in zip(micro.shares, parts, strict=True))
        scale = math.fsum(share * abs(part) for share, part in zip(micro.shares, parts, strict=True))
        if math.isfinite(mean) and abs(loss - mean) > _APART * scale:
            raise ProbeError(
                f"the loss of task {task!r} is {loss:.6g}, but its mean over the {len(parts)} "
                f"micro-batches, weighted by their samples, is {mean:.6g}: what is measured would not be what is "
                "trained. Leave losses= out, or make them that mean; losses must be means over samples, not sums."
            )


@dataclass
class HandedIn:
    """What a loop hands in at one call, checked.

    Attributes:
        losses: Of every task; see :func:`all_losses`.
        weights: (T,) in force; NaN: of an absent task, or not read as nobody will look at them.
        batch_size: Samples; 0: unknown.
        micro: By micro-batch; None: as a whole.
        asked: Task -> what makes its loss, where it is measured and not trained.
        given: The losses as they were handed in.
        factors: The weights as they were handed in; None: 1 each.
    """

    losses: Losses
    weights: Array
    batch_size: int
    micro: MicroBatches | None = None
    asked: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    given: GivenLosses = field(default_factory=dict)
    factors: Weights | None = None

    def check_some(self) -> None:
        """Raise where no task takes part in the step.

        Raises:
            ProbeError: Says how each loss came to have no gradient.
        """
        if any(map(is_present, self.losses.values())):
            return
        how = [
            f"{task!r} {loss_fault(loss).split(', so')[0].rstrip('.')}"
            for task, loss in self.given.items()
            if loss is not None
        ]
        raise ProbeError(
            f"no task takes part in this step, so that there is no gradient to make or to measure: "
            f"{'; '.join(how) or 'no loss was given'}. Leave such a step out, as the loop has to leave out its "
            "backward."
        )

    def joint(self) -> Tensor:
        """The weighted sum of the losses that take part.

        Raises:
            ProbeError: None does.
        """
        self.check_some()
        factors = self.factors
        total = sum(
            (1.0 if factors is None else factors[task]) * loss for task, loss in self.losses.items() if is_present(loss)
        )
        assert isinstance(total, Tensor)
        return total


def handed_in(
    tasks: tuple[str, ...],
    losses: GivenLosses | None,
    weights: Weights | None,
    micro: Sequence[GivenLosses] | None,
    batch_size: BatchSize,
    step: int,
    due: Callable[[], bool],
) -> HandedIn:
    """Check what a loop hands in.

    Args:
        tasks, step: Of the probe.
        losses, weights, micro, batch_size: See :meth:`gradprobe.GradientProbe.backward`.
        due: Whether the step is measured, so that weights on a GPU are read.

    Raises:
        ProbeError: A task is unknown, a loss is no scalar, or a weight is no number.
    """
    asked: dict[str, Any] = {}
    if micro is not None:
        parts = _micro_batches(tasks, micro, batch_size)
        trained = dict(parts.mean() if losses is None else all_losses(tasks, losses))
        given, samples = micro[0] if losses is None else losses, parts.batch_size
    elif losses is None:
        raise ProbeError("give losses= (task -> loss), or micro=, a list of them by micro-batch.")
    else:
        _check_mapping("losses", losses)
        asked = {task: loss for task, loss in losses.items() if callable(loss)}
        parts, given = None, losses
        trained = all_losses(tasks, {task: None if task in asked else loss for task, loss in losses.items()})
        if isinstance(batch_size, Sequence):
            raise ProbeError(f"batch_size={batch_size!r}: a list goes with micro=; give the samples of the batch.")
        samples = whole("batch_size", batch_size, least=0)
    absent = {task for task, loss in trained.items() if not is_present(loss)}
    values = _weight_values(tasks, weights, step, due, absent)
    return HandedIn(trained, values, samples, parts, asked, given, weights)


@dataclass(frozen=True)
class Noise:
    """What a measurement in micro-batches tells besides.

    Attributes:
        part: (L, T, T) of the Gramians, as the losses were scaled; None: not known.
        batches: In how many it was measured.
    """

    part: Array | None
    batches: int


@dataclass(frozen=True)
class Call:
    """What was measured at one call, or at the calls of one step together.

    Attributes:
        step: Of the training.
        losses: Of this process; their graphs tell why a gradient is missing.
        values: (T,) of this process.
        weights: (T,) in force.
        gram: (L, T, T), as the losses were scaled; None: it failed.
        status: Why it failed.
        watch: Has counted what it cost.
        batch_size: Samples of this process.
        noise: None: it was not measured in micro-batches.
        shares: Of the micro-batches that the call itself was measured in; [1.0]: as a whole.
        present: (T,) bool: whose gradients there are.
    """

    step: int
    losses: Losses
    values: Array
    weights: Array
    gram: Array | None
    status: str
    watch: Stopwatch
    batch_size: int
    noise: Noise | None
    shares: Sequence[float]
    present: NDArray[np.bool_]

    @property
    def parts(self) -> Array:
        """(L, T, T) what :func:`noise_part` needs of the call's micro-batches: its inverse."""
        assert self.gram is not None
        squared = float(np.square(self.shares).sum())
        if self.noise is None or self.noise.part is None or len(self.shares) == 1:
            return self.gram * (squared if len(self.shares) > 1 else 1.0)
        return self.noise.part * (1 - squared) + self.gram * squared


def joined(one: Call, other: Call, gram: Array | None) -> Call:
    """Two calls of one forward as one, with the Gramian of both; its samples and its noise count once."""
    parts = [call.noise.part for call in (one, other) if call.noise is not None and call.noise.part is not None]
    other.watch.add(one.watch.seconds)
    return replace(
        other,
        step=one.step,
        losses={**other.losses, **{task: loss for task, loss in one.losses.items() if is_present(loss)}},
        values=np.where(one.present, one.values, other.values),
        weights=np.where(one.present, one.weights, other.weights),
        gram=gram,
        status=_status_of_calls([one, other]),
        watch=other.watch,
        batch_size=max(one.batch_size, other.batch_size),
        noise=other.noise and replace(other.noise, part=_either(parts)),
        present=one.present | other.present,
    )


def _either(parts: Sequence[Array]) -> Array | None:
    """Of two arrays, or one or none, what either knows."""
    if len(parts) < 2:
        return None
    return np.where(np.isnan(parts[0]), parts[1], parts[0])


def as_one(calls: Sequence[Call], gram: Array | None, noise: Noise | None) -> Call:
    """The calls of a step as one: means of the losses, the latest weights, all samples and all that they cost.

    Args:
        calls: In their order.
        gram: (L, T, T) of the mean of their gradients.
        noise: Of that.
    """
    *earlier, last = calls
    if not earlier:
        return replace(last, gram=gram, noise=noise)
    for call in earlier:
        last.watch.add(call.watch.seconds)
    return replace(
        last,
        losses=latest_losses(calls),
        values=mean_values(calls),
        weights=latest_weights(calls),
        gram=gram,
        status=_status_of_calls(calls),
        batch_size=sum(call.batch_size for call in calls),
        noise=noise,
        present=np.any([call.present for call in calls], axis=0),
    )


def mean_values(calls: Sequence[Call]) -> Array:
    """(T,) means of the losses over the calls in which each task is present; NaN where it is in none."""
    there = np.array([call.present for call in calls])
    total = np.where(there, [call.values for call in calls], 0.0).sum(axis=0)
    means: Array = np.divide(total, there.sum(axis=0), out=np.full(total.shape, np.nan), where=there.any(axis=0))
    return means


def latest_weights(calls: Sequence[Call]) -> Array:
    """(T,) weights in force: of each task in the last call in which it is present."""
    found = calls[-1].weights
    for call in calls:
        found = np.where(call.present, call.weights, found)
    return found


def latest_losses(calls: Sequence[Call]) -> Losses:
    """The latest losses of every task, where it takes part in a call."""
    there = {task: loss for call in calls for task, loss in call.losses.items() if is_present(loss)}
    return {**calls[-1].losses, **there}


def _status_of_calls(calls: Sequence[Call]) -> str:
    """Why there is no measurement, where one call failed."""
    failed = [call for call in calls if call.gram is None]
    return next((call.status for call in failed or calls if call.status != MEASURED), MEASURED)


def padded(values: Array, layers: int) -> Array:
    """(L, ...) with NaN for layers that have joined at the end."""
    if len(values) == layers:
        return values
    return np.concatenate([values, np.full((layers - len(values), *values.shape[1:]), np.nan)])


def status_of(tasks: Sequence[str], losses: Array, gram: Array, there: NDArray[np.bool_]) -> str:
    """The status of a row whose passes went through.

    Args:
        tasks: (T,) names.
        losses: (T,) values.
        gram: (L, T, T); infinite where a gradient is not finite, NaN where a task brought none.
        there: (T,) bool: who takes part in the step.
    """
    if not np.isfinite(losses[there]).all():
        return NONFINITE_LOSS
    if np.isinf(gram).any():
        return NONFINITE_GRADIENT
    return MEASURED if there.all() else absent([t for t, here in zip(tasks, there, strict=True) if not here])


def finite(values: Array) -> Array:
    """What a row is handed on with: NaN in the place of what is not finite."""
    return np.where(np.isfinite(values), values, np.nan)
