"""A seeded linear sketch: k numbers for a gradient of any length, with the same inner products on average.

A vector is cut into rows of k numbers. Each row is multiplied by random signs, turned by a random number of places,
and the rows are added up: a count-sketch whose hash keeps the numbers of one row apart. It is linear, so sketches may
be added, scaled, and averaged over processes in the place of the gradients.

**Error.** Over the draws, ``<S a, S b>`` has the mean ``<a, b>`` and a variance of at most
``(1 + 1/8) (|a|^2 |b|^2 + <a, b>^2) / k``, whatever the vectors. So a norm is right to about ``1/sqrt(2 k)`` of it, and
the cosine c of two sketches has a standard deviation of about ``(1 - c^2) / sqrt(k)``: 0.016 for k = 4096 at c = 0,
and less the more parallel two gradients are. A vector of at most k numbers is kept as it is, without error. Each row
that is measured draws anew: errors of different rows are independent, and means over rows are right.

Sources: Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", 2002, for count-sketch; Weinberger
et al., "Feature hashing for large scale multitask learning", 2009, for its inner products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.gramian import GramianSum, vector
from gradprobe.probes.passes import DerivedMeasurement, Listener, Step, pass_to
from gradprobe.probes.shared_layers import Layer, SharedLayers
from gradprobe.probes.state import state_kept
from gradprobe.processes import OneProcess

_SMALLEST = 16
POOL = 8
"""Signs are stretches of one random sequence, so many times as long as a row: two rows seldom have the same."""
_LOOPED = 512
"""On a CPU rows of at least so many numbers are added one by one, which needs no indices."""
_AT_ONCE = 1 << 20
"""Numbers that are turned at a time elsewhere."""


@dataclass(frozen=True)
class SketchSize:
    """What ``sketch=`` asks for.

    Attributes:
        numbers: k, for each task and layer.
        seed: Of all draws.
    """

    numbers: int
    seed: int = 0


def sketch_size(sketch: int | Sequence[int] | None) -> SketchSize | None:
    """What a ``sketch=`` argument means: None, k, or k and a seed.

    Raises:
        ProbeError: It is none of these, or k is too small.
    """
    if sketch is None:
        return None
    given = [sketch] if isinstance(sketch, int) else list(sketch) if isinstance(sketch, (tuple, list)) else []
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in given)
    if len(given) not in (1, 2) or not whole or given[0] < _SMALLEST or given[-1] < 0:
        raise ProbeError(
            f"sketch={sketch!r}: give the numbers that are kept of each task's gradient on a layer, at least "
            f"{_SMALLEST}, such as 4096; or those and a seed, such as (4096, 1)."
        )
    return SketchSize(*given)


class Draw:
    """The signs and turns of one measured row: the same in every process, and at every call.

    Args:
        size: How many numbers, and the seed.
        row: Of the recording, from 0.
        layers: Whose gradients are sketched.
    """

    def __init__(self, size: SketchSize, row: int, layers: Sequence[Layer]) -> None:
        self.numbers = size.numbers
        self._key = (size.seed, row)
        signs = np.random.default_rng((*self._key, 0)).integers(0, 2, (POOL + 1) * size.numbers)
        self._pool: NDArray[np.float32] = (2 * signs - 1).astype(np.float32)
        self._draws: dict[int, NDArray[np.int64]] = {}
        self._pools: dict[torch.device, Tensor] = {}
        self._place: list[tuple[int, int, int]] = []  # of each parameter: layer, where it starts there, its number
        self.lengths = [min(_count(layer), size.numbers) for layer in layers]
        """(L,) numbers of each layer's sketch."""
        self._exact = [_count(layer) <= size.numbers for layer in layers]
        for place, layer in enumerate(layers):
            start = 0
            for parameter in layer.parameters:
                self._place.append((place, start, len(self._place)))
                start += _numbers(parameter)

    def layer_of(self, index: int) -> int:
        """The layer that a parameter belongs to."""
        return self._place[index][0]

    def add(self, total: Tensor, index: int, gradient: Tensor) -> None:
        """Add the sketch of a parameter's gradient to that of its layer.

        Args:
            total: (lengths[layer],) of the layer so far.
            index: The parameter's place in ``SharedLayers.parameters``.
            gradient: Of any floating type; a sparse one counts with its zeros, a complex one as two numbers each.
        """
        layer, start, number = self._place[index]
        flat = vector(gradient)
        if flat.dtype not in (torch.float32, torch.float64):
            flat = flat.float()
        if self._exact[layer]:
            total[start : start + flat.numel()] += flat
            return
        turns, starts, signs = drawn = self._drawn(number, -(-flat.numel() // self.numbers))
        if flat.is_cpu and self.numbers >= _LOOPED:
            self._one_by_one(total.numpy(), flat.numpy(), turns.tolist(), starts.tolist(), signs.tolist())
        else:
            self._at_once(total, flat, drawn)

    def _drawn(self, number: int, rows: int) -> NDArray[np.int64]:
        """(3, rows) of one parameter: by how much each row is turned, where its signs begin, and one more sign."""
        if number not in self._draws:
            rng = np.random.default_rng((*self._key, 1 + number))
            turns, starts = rng.integers(0, self.numbers, rows), rng.integers(0, POOL * self.numbers, rows)
            self._draws[number] = np.stack([turns, starts, 2 * rng.integers(0, 2, rows) - 1])
        return self._draws[number]

    def _one_by_one(
        self, total: Array, flat: NDArray[Any], turns: list[int], starts: list[int], signs: list[int]
    ) -> None:
        width = self.numbers
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is seen in the result
            for row, (turn, start, sign) in enumerate(zip(turns, starts, signs, strict=True)):
                part = flat[row * width : (row + 1) * width]
                part = part * self._pool[start : start + len(part)]
                add = np.add if sign > 0 else np.subtract
                first = min(len(part), width - turn)
                add(total[turn : turn + first], part[:first], out=total[turn : turn + first])
                if first < len(part):
                    rest = len(part) - first
                    add(total[:rest], part[first:], out=total[:rest])

    def _at_once(self, total: Tensor, flat: Tensor, drawn: NDArray[np.int64]) -> None:
        width, device = self.numbers, flat.device
        if device not in self._pools:
            self._pools[device] = _sent(self._pool, device)
        pool, (turned, started, signed) = self._pools[device], _sent(drawn, device)
        columns = torch.arange(width, device=device)
        step = max(1, _AT_ONCE // width)
        for first in range(0, len(turned), step):
            part = flat[first * width : (first + step) * width]
            count = -(-part.numel() // width)
            if part.numel() < count * width:
                part = torch.cat([part, part.new_zeros(count * width - part.numel())])
            here = slice(first, first + count)
            # What comes to stand at column c was at (c - turn) mod k.
            source = (columns - turned[here, None]).remainder(width)
            flipped = pool[started[here, None] + source] * signed[here, None]
            total += (part.reshape(count, width).gather(1, source) * flipped).sum(0, dtype=total.dtype)


def _sent(values: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on a device; the host goes on while it is made, where that is safe."""
    return torch.from_numpy(values).to(device, non_blocking=device.type != "mps")


def _numbers(parameter: Tensor) -> int:
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def _count(layer: Layer) -> int:
    return sum(map(_numbers, layer.parameters))


class Sketching:
    """A new draw for each measured row.

    Args:
        size: Of the sketches.

    Attributes:
        row: Of the next measurement.
    """

    def __init__(self, size: SketchSize) -> None:
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


def sketched(step: Step, draw: Draw) -> Array:
    """The Gramians (L, T, T) of sketches, by one explicit pass per task."""
    return step.ranks.together(lambda: _passes(step, draw, range(len(step.losses)))).result(step.ranks)


def _passes(step: Step, draw: Draw, tasks: Sequence[int]) -> _SketchSum:
    total, parameters = _SketchSum(step.shared, len(step.losses), draw), step.shared.parameters
    with state_kept(step.model) as back:
        for task in tasks:
            with Listener(parameters, partial(total.add, task), hollow=True) as listener:
                pass_to(step.losses[task], parameters)
            if listener.failure is not None:
                raise listener.failure
            back()
    return total


class SketchedMeasurement(DerivedMeasurement):
    """T - 1 streamed passes, and the joint backward that training makes anyway: sketches can be subtracted.

    Args:
        step, derived: As of :class:`DerivedMeasurement`.
        draw: Of the row.
    """

    def __init__(self, step: Step, derived: int, draw: Draw) -> None:
        self.step, self.graph, self.draw, self._derived, self._weights = step, step.traced, draw, derived, step.weights
        self.by_passes, self.explicit = None, True
        self._sum = _passes(step, draw, [task for task in range(len(step.losses)) if task != derived])
        # A layer that the derived task reaches counts with all its parameters: of those that it does not reach, the
        # joint gradient is the others', and nothing is left.
        self._reached = [any(self.graph.reached(derived, layer.parameters)) for layer in step.shared.layers]
        self.listener = Listener(step.shared.parameters, self._take)

    def _gramians(self) -> tuple[Array, NDArray[np.bool_]]:
        self.step.ranks.together(self._raise_failure)
        gram = self._sum.result(self.step.ranks, self._difference())
        return gram, self._sum.present

    def _raise_failure(self) -> None:
        if self.listener.failure is not None:
            raise self.listener.failure

    def _take(self, index: int, joint: Tensor) -> None:
        if self._reached[self.draw.layer_of(index)]:
            self._sum.add(self._derived, index, joint)
