"""The autograd passes of a measurement by explicit gradients: one backward pass per task."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gradprobe.measures import Array
from gradprobe.probes.gramian import GramianSum
from gradprobe.probes.graph import SharedLayers
from gradprobe.probes.state import state_kept
from gradprobe.processes import OneProcess


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


class Meeting:
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

    def end(self, change: Array | None = None) -> Array:
        """Nothing more will come: the Gramians (L, T, T), of ``change @ gradients`` where that is given."""
        self.complete()
        return self.sum.result(change)


class MeetingOfRanks(Meeting):
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

    def end(self, change: Array | None = None) -> Array:
        """See :class:`Meeting`. Every process must get here, and gets the same."""
        tasks = [self.others[t] if t != self.last else self._last for t in range(len(self.others) + 1)]
        self._ranks.spread(self._ranks.together(lambda: self._own(tasks, change)))
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

    def _own(self, tasks: Sequence[Gradients], change: Array | None) -> Array:
        """Of this process's gradients."""
        own = GramianSum(self._shared.layers, len(tasks))
        for index in range(len(self._parameters)):
            own.add(index, [gradients[index] for gradients in tasks])
        return own.result(change)


def combined(factors: Array, gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of gradients on one parameter times their factors, dense; None: there are none."""
    total: Tensor | None = None
    for factor, gradient in zip(factors, gradients, strict=True):
        if gradient is not None and factor:
            dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
            total = dense * float(factor) if total is None else total.add_(dense, alpha=float(factor))
    return total


def meeting(
    shared: SharedLayers,
    others: dict[int, Gradients],
    last: int,
    ranks: OneProcess,
    kept: list[Gradients] | None = None,
) -> Meeting:
    """The one that fits the number of processes."""
    if ranks.size == 1:
        return Meeting(shared, others, last, kept)
    return MeetingOfRanks(shared, others, last, ranks, kept)


def measure_explicitly(
    model: nn.Module,
    shared: SharedLayers,
    losses: Sequence[Tensor],
    ranks: OneProcess | None = None,
    kept: list[Gradients] | None = None,
) -> Array:
    """The Gramians (L, T, T) by one explicit pass per task.

    ``kept`` gets every task's gradients.
    """
    ranks = ranks or OneProcess()
    return ranks.together(lambda: _passes(model, shared, losses, ranks, kept)).end()


def _passes(
    model: nn.Module,
    shared: SharedLayers,
    losses: Sequence[Tensor],
    ranks: OneProcess,
    kept: list[Gradients] | None,
) -> Meeting:
    parameters, last = shared.parameters, len(losses) - 1
    with state_kept(model) as back:
        others = {}
        for task in range(last):
            others[task] = pass_to(losses[task], parameters)
            back()
        met = meeting(shared, others, last, ranks, kept)
        with Listener(parameters, met.add, hollow=True) as listener:
            pass_to(losses[last], parameters)
        if listener.failure is not None:
            raise listener.failure
    return met
