"""One pass saved: the last task's gradient is what the joint backward has beyond the other tasks'."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradprobe.measures import Array
from gradprobe.probes import walk
from gradprobe.probes.graph import SharedLayers
from gradprobe.probes.passes import Gradients, Listener, combined, meeting, pass_to
from gradprobe.probes.state import state_kept
from gradprobe.probes.trace import Trace
from gradprobe.processes import OneProcess

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
        model: Whose buffers are kept, as are the random numbers.
        shared: The layers.
        losses: (T,) in the order of the tasks.
        weights: (T,), finite; the derived task's is not 0.
        derived: Which task to derive.
        graph: Of the losses; says where the derived task has no path, where a difference would be rounding, not 0.
        ranks: The processes whose gradients are averaged.
        kept: Gets every task's gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: SharedLayers,
        losses: Sequence[Tensor],
        weights: Array,
        derived: int,
        graph: Trace,
        ranks: OneProcess | None = None,
        kept: list[Gradients] | None = None,
    ) -> None:
        self.shared, self.graph, self._weights, self._derived = shared, graph, weights, derived
        self.by_passes: Array | None = None
        """The same by explicit passes, where the two are to be compared."""
        self.explicit = True
        """Whether those are what the row is to have."""
        # Of float32 gradients, products in float64 have digits enough to be subtracted instead of the gradients.
        self._by_products = all(p.dtype in (torch.float32, torch.complex64) for p in shared.parameters)
        self._paths = [graph.reaches(derived, p) for p in shared.parameters]
        self._ranks = ranks or OneProcess()
        others = {}
        with state_kept(model) as back:
            for task in (t for t in range(len(losses)) if t != derived):
                others[task] = pass_to(losses[task], shared.parameters)
                back()
        self._meeting = meeting(shared, others, derived, self._ranks, kept)
        self.listener = Listener(shared.parameters, self._take)
        """To be entered while the joint backward runs."""

    def result(self) -> Array | None:
        """The Gramians (L, T, T); None where the derived gradient cannot be trusted.

        That is when it is not finite (the task's own gradient, or only another's, which an explicit pass must
        tell apart) or the small remainder of large terms.
        """
        gram, present = self._gramians()
        own = gram[:, self._derived, self._derived][present[:, self._derived]]
        if not np.isfinite(own).all():
            return None
        return gram if _cancellation(gram, self._weights)[self._derived] <= largest_cancellation(self.shared) else None

    def _gramians(self) -> tuple[Array, NDArray[np.bool_]]:
        """(L, T, T), and (L, T): which task brought a gradient to which layer."""
        self._ranks.together(self._complete)
        return self._meeting.end(self._difference() if self._by_products else None), self._meeting.sum.present

    def _complete(self) -> None:
        if self.listener.failure is not None:
            raise self.listener.failure

    def _take(self, index: int, joint: Tensor) -> None:
        if not self._paths[index]:
            self._meeting.add(index, None)
        elif self._by_products:
            own = None
            if self._meeting.kept is not None and self._ranks.size == 1:
                row = [*self._meeting.at(index)]
                row[self._derived] = joint
                own = combined(self._difference()[self._derived], row)
            self._meeting.add(index, joint, own)
        else:
            rest = joint.to_dense() if joint.layout != torch.strided else joint.clone()
            for task, own in enumerate(self._meeting.at(index)):
                if own is not None:
                    rest.sub_(own, alpha=float(self._weights[task]))
            self._meeting.add(index, rest.div_(float(self._weights[self._derived])))

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
        largest: The cancellation that is borne.
    """
    if gram.shape[0] == 0:
        return None
    worst = _cancellation(gram, weights)
    best = int(np.argmin(worst))
    return best if worst[best] <= largest else None


def may_be_derived(model: nn.Module, shared: SharedLayers, graph: Trace) -> bool:
    """Whether the joint gradient is the weighted sum of the tasks' own up to rounding in the parameters' type.

    It is not where a part is computed in a half type, under autocast, or in TF32 on a GPU; nor where a hook of the
    user's stands in the way, which may clip or replace what it sees.
    """
    hooked = any(p._backward_hooks for p in walk.parameters(model)) or any(
        m._backward_hooks or m._backward_pre_hooks for m in walk.modules(model)
    )
    return not hooked and computed_exactly(shared, graph)


def computed_exactly(shared: SharedLayers, graph: Trace) -> bool:
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
