"""Inner products of task gradients, collected parameter by parameter and summed layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradprobe.measures import Array
from gradprobe.probes.graph import Layer

_PIECE = 1 << 16  # numbers converted to float64 at a time: they stay in the cache, and no whole copy is made


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two tensors of one shape and any floating type, accumulated in float64.

    Returns:
        0-d, float64 (float32 on Apple's MPS, which has no float64), on the tensors' device.
    """
    a, b = a.reshape(-1), b.reshape(-1)
    if a.device.type == "mps":
        return torch.dot(a.float(), b.float())
    if a.device.type != "cpu":  # a wide product costs a GPU more than its accumulation does
        return (a.float() * b.float() if a.dtype != torch.float64 else a * b).sum(dtype=torch.float64)
    if a.numel() <= _PIECE:
        return torch.dot(a.double(), b.double())
    pieces = zip(torch.split(a, _PIECE), torch.split(b, _PIECE), strict=True)
    return torch.stack([torch.dot(x.double(), y.double()) for x, y in pieces]).sum()


class GramianSum:
    """Takes task gradients one parameter at a time, in any order, and gives the Gramian of every layer.

    Only products are kept, so a gradient can be freed as soon as it was added. Nothing is moved off the device
    before :meth:`result`, and then everything in one transfer.

    Args:
        layers: L of them.
        tasks: T, how many.
    """

    def __init__(self, layers: Sequence[Layer], tasks: int) -> None:
        self._layers, self._tasks = layers, tasks
        self._owner = [index for index, layer in enumerate(layers) for _ in layer.parameters]
        self._products: list[Tensor] = []
        self._places: list[tuple[int, int, int]] = []
        self._present = np.zeros((len(layers), tasks), dtype=bool)

    def add(self, index: int, gradients: Sequence[Tensor | None]) -> None:
        """Add one parameter.

        Args:
            index: Its place in ``SharedLayers.parameters``.
            gradients: T tensors of its shape; None where a task has no path to it.
        """
        layer = self._owner[index]
        for i, first in enumerate(gradients):
            if first is None:
                continue
            self._present[layer, i] = True
            for j in range(i, self._tasks):
                second = gradients[j]
                if second is not None:
                    self._products.append(dot(first, second))
                    self._places.append((layer, i, j))

    @property
    def present(self) -> NDArray[np.bool_]:
        """(L, T): which task brought a gradient to which layer."""
        return self._present

    def result(self) -> Array:
        """The Gramians so far.

        Returns:
            (L, T, T) float64, symmetric, in (loss per unit of parameter)^2. NaN where a task has no path to any
            parameter of the layer, or a gradient is not finite.
        """
        gram = np.zeros((len(self._layers), self._tasks, self._tasks))
        if self._products:
            values = torch.stack(self._products).cpu().numpy()
            values[~np.isfinite(values)] = np.nan
            layer, i, j = np.array(self._places).T
            np.add.at(gram, (layer, i, j), values)
            gram += np.triu(gram, 1).transpose(0, 2, 1)
        gram[~(self._present[:, :, None] & self._present[:, None, :])] = np.nan
        return gram
