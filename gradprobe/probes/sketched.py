"""Measuring by sketches: of each task's gradient on a layer k numbers are kept, see :mod:`gradprobe.probes.sketch`.

Each pass hands its gradients on one by one, as it comes to them, and they are sketched and freed at once. So no whole
gradient of a task is ever there, let alone two: beside what training needs, a measurement takes T k numbers per layer
and the gradient of one parameter. Several processes average their sketches, not their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradprobe.measures import Array
from gradprobe.probes.derived import DerivedMeasurement
from gradprobe.probes.gramian import GramianSum
from gradprobe.probes.graph import Layer, SharedLayers
from gradprobe.probes.passes import Listener, pass_to
from gradprobe.probes.sketch import Draw, Size
from gradprobe.probes.state import state_kept
from gradprobe.probes.trace import Trace
from gradprobe.processes import OneProcess


class Sketching:
    """A new draw for each measured row.

    Args:
        size: Of the sketches.

    Attributes:
        row: Of the next measurement.
    """

    def __init__(self, size: Size) -> None:
        self.size, self.row = size, 0

    def next(self, shared: SharedLayers) -> Draw:
        """The draw of the next row."""
        self.row += 1
        return Draw(self.size, self.row - 1, shared.layers)


class _SketchSum:
    """Takes task gradients one parameter at a time, in any order, and gives the Gramian of every layer.

    Args:
        shared: The layers.
        tasks: T, how many.
        draw: Of the row.
    """

    def __init__(self, shared: SharedLayers, tasks: int, draw: Draw) -> None:
        self._draw, self._tasks, self._shared = draw, tasks, shared
        self.sketches: list[list[Tensor | None]] = [[None] * len(shared.layers) for _ in range(tasks)]
        """(T, L): None where a task has brought no gradient."""

    def add(self, task: int, index: int, gradient: Tensor) -> None:
        """A task's gradient on one parameter; nothing of it is kept."""
        layer = self._draw.layer_of(index)
        total = self.sketches[task][layer]
        if total is None:
            wide = torch.float32 if gradient.device.type == "mps" else torch.float64
            total = torch.zeros(self._draw.lengths[layer], dtype=wide, device=gradient.device)
            self.sketches[task][layer] = total
        self._draw.add(total, index, gradient.to(total.device))

    @property
    def present(self) -> NDArray[np.bool_]:
        """(L, T): which task brought a gradient to which layer."""
        found = [[sketch is not None for sketch in sketches] for sketches in self.sketches]
        return np.array(found, dtype=bool).reshape(self._tasks, len(self._shared.layers)).T

    def result(self, ranks: OneProcess, change: Array | None = None) -> Array:
        """The Gramians (L, T, T) of the averages over the processes; see :meth:`GramianSum.result`.

        Every process must get here, and gets the same.
        """
        if ranks.size > 1:
            like = [self._like(layer) for layer in range(len(self._shared.layers))]
            self.sketches = [ranks.average(sketches, like) for sketches in self.sketches]
        # One vector per layer stands for all of its parameters.
        total = GramianSum([Layer(layer.name, layer.parameters[:1]) for layer in self._shared.layers], self._tasks)
        for layer in range(len(self._shared.layers)):
            total.add(layer, [sketches[layer] for sketches in self.sketches])
        return total.result(change)

    def _like(self, layer: int) -> Tensor:
        """What another process's sketch looks like, where this one has none."""
        there = next((s[layer] for s in self.sketches if s[layer] is not None), None)
        if there is not None:
            return there
        device = self._shared.layers[layer].parameters[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(self._draw.lengths[layer], dtype=wide, device=device)


def measure_sketched(
    model: nn.Module, shared: SharedLayers, losses: Sequence[Tensor], draw: Draw, ranks: OneProcess | None = None
) -> Array:
    """The Gramians (L, T, T) of sketches, by one explicit pass per task."""
    ranks = ranks or OneProcess()
    return ranks.together(lambda: _passes(model, shared, losses, draw, range(len(losses)))).result(ranks)


def _passes(
    model: nn.Module, shared: SharedLayers, losses: Sequence[Tensor], draw: Draw, tasks: Sequence[int]
) -> _SketchSum:
    total = _SketchSum(shared, len(losses), draw)
    with state_kept(model) as back:
        for task in tasks:
            with Listener(shared.parameters, partial(total.add, task), hollow=True) as listener:
                pass_to(losses[task], shared.parameters)
            if listener.failure is not None:
                raise listener.failure
            back()
    return total


class SketchedMeasurement(DerivedMeasurement):
    """T - 1 streamed passes, and the joint backward that training makes anyway: sketches can be subtracted.

    Args:
        model, shared, losses, weights, derived, graph, ranks: As of :class:`DerivedMeasurement`.
        draw: Of the row.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: SharedLayers,
        losses: Sequence[Tensor],
        weights: Array,
        derived: int,
        graph: Trace,
        draw: Draw,
        ranks: OneProcess,
    ) -> None:
        self.shared, self.graph, self.draw, self.by_passes = shared, graph, draw, None
        self.explicit = True
        self._weights, self._derived, self._ranks = weights, derived, ranks
        others = [task for task in range(len(losses)) if task != derived]
        self._sum = _passes(model, shared, losses, draw, others)
        # A layer that the derived task reaches counts with all its parameters: of those that it does not reach, the
        # joint gradient is the others', and nothing is left.
        self._reached = [any(graph.reaches(derived, p) for p in layer.parameters) for layer in shared.layers]
        self.listener = Listener(shared.parameters, self._take)

    def _gramians(self) -> tuple[Array, NDArray[np.bool_]]:
        self._ranks.together(self._complete)
        gram = self._sum.result(self._ranks, self._difference())
        return gram, self._sum.present

    def _complete(self) -> None:
        if self.listener.failure is not None:
            raise self.listener.failure

    def _take(self, index: int, joint: Tensor) -> None:
        if self._reached[self.draw.layer_of(index)]:
            self._sum.add(self._derived, index, joint)
