"""Backward passes of a measurement: one for every task, or for all but one, which is derived from the joint one."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradprobe.measures import Array
from gradprobe.probes.gramian import GramianSum, bring
from gradprobe.probes.graph import LossGraph, trace
from gradprobe.probes.shared_layers import SharedLayers
from gradprobe.probes.state import has_backward_hooks, state_kept
from gradprobe.processes import OneProcess
from gradprobe.statistics import noise_part

__all__ = ["Gradients", "combined", "done"]


class _Done(threading.local):
    count = 0


done = _Done()
"""Counts the passes of this thread that went through."""
Gradients = list["Tensor | None"]
"""One task's gradient on every shared parameter, in the order of ``SharedLayers.parameters``; None: no path."""


def pass_to(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Gradients:
    """One task's own gradient, by a backward pass of its own that touches no ``.grad`` and keeps the graph.

    Args:
        loss: Of the task.
        parameters: Shared ones.
    """
    # One may have been frozen since the layers were found.
    wanted = [i for i, p in enumerate(parameters) if p.requires_grad]
    result: Gradients = [None] * len(parameters)
    if not wanted or not loss.requires_grad:  # a task that is absent
        return result
    found = torch.autograd.grad(loss, [parameters[i] for i in wanted], retain_graph=True, allow_unused=True)
    done.count += 1
    for index, gradient in zip(wanted, found, strict=True):
        result[index] = gradient
    return result


@dataclass(frozen=True)
class Step:
    """What a way of measuring gets: the losses of one step, and where their gradients are wanted.

    Every way is a function of a step that gives the Gramians (L, T, T): :func:`explicit`,
    :func:`gradprobe.probes.blocks.by_blocks`, :func:`gradprobe.probes.sketch.sketched`. One that needs the joint
    backward, too, is a :class:`DerivedMeasurement`.

    Attributes:
        model: Its state is kept over the passes.
        shared: The layers.
        losses: (T,) in the order of the tasks, as they are scaled.
        weights: (T,) of the joint loss; 0: the task is absent. They matter where a task is derived.
        ranks: The processes whose gradients are averaged.
        graph: Of the losses; None: nobody has walked through it yet.
        kept: Gets every task's gradients; None: none are kept.
    """

    model: nn.Module
    shared: SharedLayers
    losses: Sequence[Tensor]
    weights: Array
    ranks: OneProcess
    graph: LossGraph | None = None
    kept: list[Gradients] | None = None

    @cached_property
    def traced(self) -> LossGraph:
        """The graph of the losses."""
        return self.graph if self.graph is not None else trace(self.losses)


class Listener:
    """While it is entered, hands on every gradient that a backward pass brings to the parameters.

    Args:
        parameters: Those listened to.
        take: Called with the place of a parameter and its gradient. What it raises is kept in ``failure``: a hook
            that raises would end the user's backward.
        hollow: Put a tensor without storage of its own in the place of each gradient, so that a pass made for ``take``
            alone does not collect what nobody needs. Never for the user's own backward.

    Attributes:
        seconds: Spent in ``take``, which would else look like time of the backward.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        take: Callable[[int, Tensor], None],
        *,
        hollow: bool = False,
    ) -> None:
        self._parameters, self._take, self._hollow = parameters, take, hollow
        self.seconds = 0.0
        self.failure: Exception | None = None

    def __enter__(self) -> Listener:
        self._handles = [p.register_hook(self._hook(i)) for i, p in enumerate(self._parameters) if p.requires_grad]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Callable[[Tensor], Tensor | None]:
        def hook(gradient: Tensor | None) -> Tensor | None:
            if gradient is None:  # undefined: the task does not reach the parameter, whatever the graph says
                return None
            started = time.perf_counter()
            try:
                self._take(index, gradient)
            except Exception as error:
                self.failure = self.failure or error
            self.seconds += time.perf_counter() - started
            if self._hollow and gradient.layout == torch.strided:
                return gradient.new_zeros(()).expand_as(gradient)
            return None

        return hook


class ArrivingGradients:
    """Brings one task's gradients, as they arrive, together with the others', which are there already.

    Each parameter's gradients are multiplied and freed at once, so that no more than T - 1 copies of the shared
    parameters are ever alive.

    Args:
        shared: The layers.
        others: Task -> its gradients. Emptied as the last task's arrive.
        last: The task that is still to come.
        kept: Gets every task's gradients, so that T copies stay alive; None: none are kept.
    """

    def __init__(
        self, shared: SharedLayers, others: dict[int, Gradients], last: int, kept: list[Gradients] | None = None
    ) -> None:
        self.sum = GramianSum(shared.layers, len(others) + 1)
        self.others, self.last, self.kept = others, last, kept
        if kept is not None:
            kept[:] = [[None] * len(shared.parameters) for _ in range(len(others) + 1)]
        self._missing = set(range(len(shared.parameters)))

    def at(self, index: int) -> Gradients:
        """All tasks' gradients on one parameter as far as they are known; None for the last task's."""
        return [self.others[task][index] if task != self.last else None for task in range(len(self.others) + 1)]

    def add(self, index: int, gradient: Tensor | None, own: Tensor | None = None) -> None:
        """The last task's gradient on one parameter has come.

        Args:
            index: The place of the parameter.
            gradient: What is multiplied with the others' gradients.
            own: The last task's gradient, where that is another and gradients are kept.
        """
        row = self.at(index)
        row[self.last] = gradient
        self.sum.add(index, row)
        if self.kept is not None:
            row[self.last] = gradient if own is None else own
            for task, found in enumerate(row):
                self.kept[task][index] = found
        self._missing.discard(index)
        for gradients in self.others.values():
            gradients[index] = None

    def complete(self) -> None:
        """Nothing more will come from this process's passes."""
        for index in sorted(self._missing):
            self.add(index, None)

    def end(self, change: Array | None = None, failure: Exception | None = None) -> Array:
        """Nothing more will come: the Gramians (L, T, T), of ``change @ gradients`` where that is given.

        Args:
            change: (T, T).
            failure: Of what has listened in this process: raised.
        """
        if failure is not None:
            raise failure
        self.complete()
        return self.sum.result(change)


class ArrivingGradientsOfProcesses(ArrivingGradients):
    """The same for several processes: all gradients are kept, averaged over the processes, and then multiplied.

    The processes' batches are independent micro-batches, so that products of their own gradients tell the noise: see
    :attr:`OneProcess.parts`.

    So T copies of the shared parameters are alive at the end, and two of one task's.
    """

    def __init__(
        self,
        shared: SharedLayers,
        others: dict[int, Gradients],
        last: int,
        ranks: OneProcess,
        kept: list[Gradients] | None = None,
    ) -> None:
        super().__init__(shared, others, last, kept)
        self._ranks, self._shared, self._parameters = ranks, shared, shared.parameters
        self._last: Gradients = [None] * len(shared.parameters)

    def add(self, index: int, gradient: Tensor | None, own: Tensor | None = None) -> None:
        """The last task's gradient on one parameter has come, of this process alone."""
        # A copy: the backward may put it into .grad, where it is averaged in place.
        self._last[index] = gradient.clone() if gradient is not None else None
        self._missing.discard(index)

    def end(self, change: Array | None = None, failure: Exception | None = None) -> Array:
        """See :class:`ArrivingGradients`. Every process must get here, and gets the same."""
        tasks = [self.others[t] if t != self.last else self._last for t in range(len(self.others) + 1)]
        self._ranks.spread(self._ranks.together(lambda: self._own(tasks, change, failure)))
        for gradients in tasks:
            gradients[:] = self._ranks.average(gradients, self._parameters)
        for index in range(len(self._last)):
            self.sum.add(index, [gradients[index] for gradients in tasks])
        if self.kept is not None:
            self.kept[:] = tasks
            if change is not None:
                self.kept[self.last] = [
                    None if row[self.last] is None else combined(change[self.last], row)
                    for row in zip(*tasks, strict=True)
                ]
        return self.sum.result(change)

    def _own(self, tasks: Sequence[Gradients], change: Array | None, failure: Exception | None) -> Array:
        """Of this process's gradients."""
        if failure is not None:
            raise failure
        return multiplied(self._shared, tasks, change)


def combined(factors: Array, gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of gradients on one parameter times their factors, dense; None: there are none."""
    total: Tensor | None = None
    for factor, gradient in zip(factors, gradients, strict=True):
        if gradient is not None and factor:
            dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
            total = dense * float(factor) if total is None else total.add_(dense, alpha=float(factor))
    return total


def _arriving(step: Step, others: dict[int, Gradients], last: int) -> ArrivingGradients:
    """What fits the number of processes."""
    if step.ranks.size == 1:
        return ArrivingGradients(step.shared, others, last, step.kept)
    return ArrivingGradientsOfProcesses(step.shared, others, last, step.ranks, step.kept)


def explicit(step: Step) -> Array:
    """The Gramians (L, T, T) by one explicit pass per task."""
    return step.ranks.together(lambda: _passes(step)).end()


def _passes(step: Step) -> ArrivingGradients:
    parameters, last = step.shared.parameters, len(step.losses) - 1
    with state_kept(step.model) as back:
        others = {}
        for task in range(last):
            others[task] = pass_to(step.losses[task], parameters)
            back()
        met = _arriving(step, others, last)
        with Listener(parameters, met.add, hollow=True) as listener:
            pass_to(step.losses[last], parameters)
        if listener.failure is not None:
            raise listener.failure
    return met


EXACT_TYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_TOLERANCE = {
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
}
"""How far a derived gradient may be from the explicit one, relative to its length. Other types are never derived."""


class DerivedMeasurement:
    """T - 1 explicit passes, and the joint backward that training makes anyway.

    ``joint = sum_k w_k g_k`` gives ``g_d = (joint - sum_{k != d} w_k g_k) / w_d`` without a pass of its own. Hooks on
    the shared parameters see the joint gradient as it arrives, so no copy of it is kept. Under data parallelism
    they see this process's own gradient, before it is averaged over the processes: what the explicit passes gave too.

    Args:
        step: Whose weights are finite, and not 0 for the derived task. Its graph says where that task has no path,
            where a difference would be rounding, not 0.
        derived: Which task to derive.

    Attributes:
        listener: To be entered while the joint backward runs.
        by_passes: The same by explicit passes, where the two are to be compared; None: they are not.
        explicit: Whether those are what the row is to have.
    """

    def __init__(self, step: Step, derived: int) -> None:
        self.step, self.graph, self._derived, self._weights = step, step.traced, derived, step.weights
        self.by_passes: Array | None = None
        self.explicit = True
        parameters = step.shared.parameters
        # Of float32 gradients, products in float64 have digits enough to be subtracted instead of the gradients.
        self._by_products = all(p.dtype in (torch.float32, torch.complex64) for p in parameters)
        self._paths = self.graph.reached(derived, parameters)
        others = {}
        with state_kept(step.model) as back:
            for task in (t for t in range(len(step.losses)) if t != derived):
                others[task] = pass_to(step.losses[task], parameters)
                back()
        self._arriving = _arriving(step, others, derived)
        self.listener = Listener(parameters, self._take)

    def result(self) -> Array | None:
        """The Gramians (L, T, T); None where the derived gradient cannot be trusted.

        That is when it is not finite (the task's own gradient, or only another's, which an explicit pass must
        tell apart) or the small remainder of large terms.
        """
        gram, present = self._gramians()
        own = gram[:, self._derived, self._derived][present[:, self._derived]]
        if not np.isfinite(own).all():
            return None
        worst = _cancellation(gram, self._weights)[self._derived]
        return gram if worst <= largest_cancellation(self.step.shared) else None

    def _gramians(self) -> tuple[Array, NDArray[np.bool_]]:
        """(L, T, T), and (L, T): which task brought a gradient to which layer."""
        change = self._difference() if self._by_products else None
        return self._arriving.end(change, self.listener.failure), self._arriving.sum.present

    def _take(self, index: int, joint: Tensor) -> None:
        if not self._paths[index]:
            self._arriving.add(index, None)
        elif self._by_products:
            own = None
            if self._arriving.kept is not None and self.step.ranks.size == 1:
                row = [*self._arriving.at(index)]
                row[self._derived] = joint
                own = combined(self._difference()[self._derived], row)
            self._arriving.add(index, joint, own)
        else:
            rest = joint.to_dense() if joint.layout != torch.strided else joint.clone()
            for task, own in enumerate(self._arriving.at(index)):
                if own is not None:
                    rest.sub_(own, alpha=float(self._weights[task]))
            self._arriving.add(index, rest.div_(float(self._weights[self._derived])))

    def _difference(self) -> Array:
        """(T, T): makes of the others' gradients and the joint one, in the derived task's place, all tasks' own."""
        change = np.eye(len(self._weights))
        change[self._derived] = -self._weights / self._weights[self._derived]
        change[self._derived, self._derived] = 1 / self._weights[self._derived]
        return change


def _cancellation(gram: Array, weights: Array) -> Array:
    """How many times larger the terms are than the task's weighted gradient that is left of them: (..., T).

    Deriving task d loses about so many times the rounding error. The worst layer counts. Infinite where the
    task has weight 0 or an exactly zero gradient.
    """
    square = np.square(weights) * np.diagonal(gram, axis1=-2, axis2=-1)
    largest = np.sqrt(np.nansum(np.maximum(square, 0), axis=-1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = largest / np.sqrt(square)
    ratio = np.where(square <= 0, np.inf, ratio)  # below 0: a difference of which nothing is left
    worst: Array = np.nanmax(np.where(np.isnan(square), 1.0, ratio), axis=-2, initial=1.0)
    return np.where(weights == 0, np.inf, worst)  # also where the task reached no layer


def largest_cancellation(shared: SharedLayers) -> float:
    """How much cancellation the coarsest type of the shared parameters bears; 0: none of it is to be derived."""
    types = {p.dtype for p in shared.parameters}
    if not types or not types <= set(_TOLERANCE):
        return 0.0
    # A backward pass rounds each number a few times; 8 was enough for every model in the tests.
    return min(_TOLERANCE[t] / (8 * torch.finfo(t).eps) for t in types)


def task_to_derive(gram: Array, weights: Array, largest: float) -> int | None:
    """The task whose worst layer cancels least, or None where every task needs a pass of its own.

    Args:
        gram: (L, T, T) of the last measured row.
        weights: (T,) now in force.
        largest: The cancellation that is borne, see :func:`largest_cancellation`.
    """
    if gram.shape[0] == 0:
        return None
    worst = _cancellation(gram, weights)
    best = int(np.argmin(worst))
    return best if worst[best] <= largest else None


def may_be_derived(step: Step) -> bool:
    """Whether the joint gradient is the weighted sum of the tasks' own up to rounding in the parameters' type.

    It is not where a part is computed in a half type, under autocast, or in TF32 on a GPU; nor where a hook of the
    user's stands in the way, which may clip or replace what it sees.
    """
    return not has_backward_hooks(step.model) and computed_exactly(step.shared, step.traced)


def computed_exactly(shared: SharedLayers, graph: LossGraph) -> bool:
    """Whether nothing is computed in less than float32: no half type, no autocast, no TF32."""
    return graph.exact and not _rounds_products(any(p.device.type == "cuda" for p in shared.parameters))


def _rounds_products(on_gpu: bool) -> bool:
    """Whether float32 products are made of shortened numbers: TF32, or bfloat16 on a CPU."""
    if torch.get_float32_matmul_precision() != "highest":
        return True
    try:
        return on_gpu and bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set through torch's newer switches, which the older one cannot express
        return True


def difference(derived: Array, by_passes: Array) -> float:
    """The largest difference of two Gramians (L, T, T) of the same step, relative to the norms; inf: one lacks a task.

    It tells what nothing else tells beforehand: an operation whose backward is not linear, such as one that clips, and
    layers within which rounding is larger than their gradients' sizes let expect.
    """
    if (np.isnan(derived) != np.isnan(by_passes)).any():
        return math.inf
    norm = np.sqrt(np.diagonal(by_passes, axis1=-2, axis2=-1))
    apart, scale = np.abs(derived - by_passes), norm[:, :, None] * norm[:, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(apart == 0, 0.0, apart / scale)
    return float(np.nanmax(relative, initial=0.0))


def tolerance(shared: SharedLayers) -> float:
    """How far apart explicit gradients of the same step may be: of the coarsest type among the parameters."""
    return max(_TOLERANCE.get(p.dtype, 1e-2) for p in shared.parameters)


class MicroSum:
    """Takes micro-batches one by one, and gives the Gramian of the batch and the noise part of it.

    Each has a forward of its own; slices of one BatchNorm forward would not be independent. Every task gets one pass
    per micro-batch: together they cost what one pass over the whole batch does. Alive at a time are T mean gradients
    and the T of the present micro-batch.

    Source: docs/run-file.md, ``gram_noise``; the estimate is :func:`gradprobe.statistics.noise_part`.

    Args:
        model: Whose buffers and random numbers are kept.
        shared: The layers.
        tasks: T, how many.
        ranks: The processes whose gradients are averaged: each one's micro-batches count.
        kept: Gets every micro-batch's T gradients; None: they are let go of.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: SharedLayers,
        tasks: int,
        ranks: OneProcess | None = None,
        kept: list[list[Gradients]] | None = None,
    ) -> None:
        self._model, self._shared, self._ranks, self._kept = model, shared, ranks or OneProcess(), kept
        self._parts = GramianSum(shared.layers, tasks)
        self.means: list[Gradients] = [[None] * len(shared.parameters) for _ in range(tasks)]
        self.shares: list[float] = []

    def add(self, losses: Sequence[Tensor], share: float) -> None:
        """One micro-batch: (T,) losses, and the share of the batch that it is."""
        found = self._passes(losses)
        self.shares.append(share)
        if self._kept is not None:
            self._kept.append(found)
        for index in range(len(self._shared.parameters)):
            row = [gradients[index] for gradients in found]
            self._parts.add(index, row, factor=share**2)
            for mean, gradient in zip(self.means, row, strict=True):
                mean[index] = _added(mean[index], gradient, share)
            if self._kept is None:
                for gradients in found:
                    gradients[index] = None

    def _passes(self, losses: Sequence[Tensor]) -> list[Gradients]:
        parameters, found = self._shared.parameters, []
        with state_kept(self._model) as back:
            for loss in losses:
                found.append(pass_to(loss, parameters))
                back()
        return found

    def result(self) -> tuple[Array, Array]:
        """The Gramians F and their noise parts D, (L, T, T) each; see :func:`noise_part`.

        A layer that a task reaches in some of the micro-batches only counts as a gradient of 0 in the others. Every
        process must get here, and gets the same; :attr:`means` and :attr:`shares` are those over all processes then.
        """
        for gradients in self.means:
            gradients[:] = self._ranks.average(gradients, self._shared.parameters)
        whole_batch = _sum_of(self._shared, self.means)
        bring([whole_batch, self._parts])
        gram = whole_batch.result()
        parts = self._ranks.mean(np.nan_to_num(self._parts.result(), posinf=0.0, neginf=0.0)) / self._ranks.size
        self.shares = self._ranks.shares(self.shares)
        return gram, noise_part(gram, parts, self.shares)


def _added(mean: Tensor | None, gradient: Tensor | None, share: float) -> Tensor | None:
    if gradient is None:
        return mean
    return wide(gradient) * share if mean is None else mean.add_(wide(gradient), alpha=share)


def wide(gradient: Tensor) -> Tensor:
    """A gradient so that means of it can be made: dense, and of a half type in float32."""
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return dense.float() if dense.dtype in (torch.float16, torch.bfloat16) else dense


def multiplied(shared: SharedLayers, gradients: Sequence[Gradients], change: Array | None = None) -> Array:
    """The Gramians (L, T, T) of all tasks' gradients, or of ``change @ gradients``."""
    return _sum_of(shared, gradients).result(change)


def _sum_of(shared: SharedLayers, gradients: Sequence[Gradients]) -> GramianSum:
    total = GramianSum(shared.layers, len(gradients))
    for index in range(len(shared.parameters)):
        total.add(index, [own[index] for own in gradients])
    return total
