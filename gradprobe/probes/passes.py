"""The autograd passes of a measurement: explicit gradients, and the last task's derived from the joint one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from gradprobe.measures import Array
from gradprobe.probes.gramian import GramianSum
from gradprobe.probes.graph import SharedLayers, reached

Gradients = Sequence[Tensor | None]
"""One task's gradient on every shared parameter, in the order of ``SharedLayers.parameters``; None: no path."""

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""How far a derived gradient may be from the explicit one, relative to its length. Other types are never derived."""


def explicit(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Gradients:
    """One task's own gradient, by a backward pass of its own that touches no ``.grad`` and keeps the graph."""
    if not parameters:
        return ()
    return torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put every buffer back afterwards.

    A non-reentrant activation checkpoint runs its part of the forward again in every backward pass, and BatchNorm
    counts each of them: without this, measuring would move the running statistics.
    """
    # Through .data: a graph that saved a buffer must not think that it changed.
    buffers = [b.data for b in model.buffers()]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)


def measure_explicitly(model: nn.Module, shared: SharedLayers, losses: Sequence[Tensor]) -> Array:
    """The Gramians (L, T, T) by one explicit pass per task."""
    parameters = shared.parameters
    total = GramianSum(shared.layers, len(losses))
    with buffers_kept(model):
        gradients = [explicit(loss, parameters) for loss in losses]
    for index in range(len(parameters)):
        total.add(index, [g[index] for g in gradients])
    return total.result()


class DerivedMeasurement:
    """T - 1 explicit passes; the last task's gradient is what the joint backward has beyond theirs.

    ``joint = sum_k w_k g_k`` gives ``g_d = (joint - sum_{k != d} w_k g_k) / w_d`` without a pass of its own. Hooks on
    the shared parameters see the joint gradient as it arrives, so no copy of it is kept.

    Args:
        shared: The layers.
        losses: (T,) in the order of the tasks.
        weights: (T,), finite; the derived task's is not 0.
        derived: Which task to derive.
    """

    def __init__(
        self, model: nn.Module, shared: SharedLayers, losses: Sequence[Tensor], weights: Array, derived: int
    ) -> None:
        self._shared, self._weights, self._derived = shared, weights, derived
        self._sum = GramianSum(shared.layers, len(losses))
        # From the graph: where the derived task has no path, the difference would be rounding, not 0.
        self._paths = reached(losses[derived])
        with buffers_kept(model):
            self._explicit: dict[int, list[Tensor | None]] = {
                task: list(explicit(loss, shared.parameters)) for task, loss in enumerate(losses) if task != derived
            }
        self._failure: Exception | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the joint backward runs."""
        parameters = self._shared.parameters
        handles = [p.register_hook(self._hook(index, p)) for index, p in enumerate(parameters)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> Array | None:
        """The Gramians (L, T, T); None where the derived gradient cannot be trusted.

        That is when it is not finite (the task's own gradient, or only another's, which an explicit pass must
        tell apart) or the small remainder of large terms.
        """
        if self._failure is not None:
            raise self._failure
        gram = self._sum.result()
        own = gram[:, self._derived, self._derived][self._sum.present[:, self._derived]]
        if not np.isfinite(own).all():
            return None
        dtype = self._shared.parameters[0].dtype
        return gram if cancellation(gram, self._weights)[self._derived] <= _bound(dtype) else None

    def _hook(self, index: int, parameter: nn.Parameter):  # type: ignore[no-untyped-def]
        def take(joint: Tensor) -> None:
            try:
                with torch.no_grad():
                    self._sum.add(index, self._all(index, id(parameter), joint))
                for gradients in self._explicit.values():
                    gradients[index] = None  # freed as the backward goes
            except Exception as error:  # a hook that raises would end the user's backward
                self._failure = self._failure or error

        return take

    def _all(self, index: int, leaf: int, joint: Tensor) -> list[Tensor | None]:
        row: list[Tensor | None] = [None] * (len(self._explicit) + 1)
        rest = joint
        for task, gradients in self._explicit.items():
            own = gradients[index]
            row[task] = own
            if own is not None:
                rest = torch.sub(rest, own, alpha=float(self._weights[task]))
        if leaf in self._paths:
            row[self._derived] = rest / float(self._weights[self._derived])
        return row


def cancellation(gram: Array, weights: Array) -> Array:
    """How many times larger the terms are than the task's weighted gradient that is left of them: (..., T).

    Deriving task d loses about so many times the rounding error. The worst layer counts. Infinite where the
    task has weight 0 or an exactly zero gradient.
    """
    square = np.square(weights) * np.diagonal(gram, axis1=-2, axis2=-1)
    largest = np.sqrt(np.nansum(square, axis=-1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = largest / np.sqrt(square)
    ratio = np.where(square == 0, np.inf, ratio)
    worst: Array = np.nanmax(np.where(np.isnan(square), 1.0, ratio), axis=-2, initial=1.0)
    return worst


def task_to_derive(gram: Array, weights: Array, dtype: torch.dtype) -> int | None:
    """The task whose worst layer cancels least, or None where every task needs a pass of its own.

    Args:
        gram: (L, T, T) of the last measured row.
        weights: (T,) now in force.
        dtype: Of the gradients.
    """
    if dtype not in _TOLERANCE or gram.shape[0] == 0:
        return None
    worst = cancellation(gram, weights)
    best = int(np.argmin(worst))
    return best if worst[best] <= _bound(dtype) else None


def _bound(dtype: torch.dtype) -> float:
    # A backward pass rounds each number a few times; 8 was enough for every model in the tests.
    return _TOLERANCE[dtype] / (8 * torch.finfo(dtype).eps)
