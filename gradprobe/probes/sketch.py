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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.gramian import vector
from gradprobe.probes.graph import Layer

_SMALLEST = 16
POOL = 8
"""Signs are stretches of one random sequence, so many times as long as a row: two rows seldom have the same."""

_LOOPED = 512
"""On a CPU rows of at least so many numbers are added one by one, which needs no indices."""

_AT_ONCE = 1 << 20
"""Numbers that are turned at a time elsewhere."""


@dataclass(frozen=True)
class Size:
    """What ``sketch=`` asks for.

    Attributes:
        numbers: k, for each task and layer.
        seed: Of all draws.
    """

    numbers: int
    seed: int = 0


def size_of(sketch: int | Sequence[int] | None) -> Size | None:
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
    return Size(*given)


class Draw:
    """The signs and turns of one measured row: the same in every process, and at every call.

    Args:
        size: How many numbers, and the seed.
        row: Of the recording, from 0.
        layers: Whose gradients are sketched.
    """

    def __init__(self, size: Size, row: int, layers: Sequence[Layer]) -> None:
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
