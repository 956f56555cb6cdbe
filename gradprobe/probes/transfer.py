"""What one row needs from a device, brought over in one transfer.

Each transfer makes the host wait for all that was asked of the device before, so a measured row has one: the products
of its gradients, and along with them whatever else it stores (the losses, the loss scale).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradprobe.measures import Array


class _Waiting(threading.local):
    """Tensors that are to go along with the next transfer of this thread, and their numbers once they have."""

    def __init__(self) -> None:
        self.tensors: list[weakref.ref[Tensor]] = []
        self.found: dict[int, Array] = {}


_waiting = _Waiting()


def take_along(tensors: Sequence[Tensor]) -> None:
    """Have the next transfer bring these, too, in the place of what waits already. They are not kept alive."""
    _waiting.tensors, _waiting.found = [weakref.ref(t) for t in tensors if not t.is_cpu], {}


def fetch(tensors: Sequence[Tensor]) -> list[Array]:
    """The numbers of some tensors, flat, in float64 (from float32 on Apple's MPS, which has no float64).

    One transfer per device; nothing is copied of what lies on the CPU.
    """
    found: list[Array] = [np.zeros(0)] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.is_cpu:
            found[place] = tensor.detach().reshape(-1).double().numpy()
        else:
            by_device.setdefault(tensor.device, []).append(place)
    for device, places in by_device.items():
        others = _along(device)
        numbers = _bring([tensors[place] for place in places] + others)
        for place, part in zip(places, numbers, strict=False):
            found[place] = part
        _waiting.found.update(zip(map(id, others), numbers[len(places) :], strict=True))
    return found


def values(tensors: Sequence[Tensor]) -> list[float]:
    """Scalars as numbers: those that went along with a transfer, and the others by one of their own."""
    missing = [t for t in tensors if not (id(t) in _waiting.found and any(ref() is t for ref in _waiting.tensors))]
    fetched = dict(zip(map(id, missing), fetch(missing), strict=True))
    return [float((fetched[id(t)] if id(t) in fetched else _waiting.found[id(t)])[0]) for t in tensors]


def _along(device: torch.device) -> list[Tensor]:
    alive = [tensor for ref in _waiting.tensors if (tensor := ref()) is not None]
    return [t for t in alive if t.device == device and id(t) not in _waiting.found]


def _bring(tensors: Sequence[Tensor]) -> list[Array]:
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    flat = torch.cat([tensor.detach().reshape(-1).to(wide) for tensor in tensors])
    numbers = flat.cpu().double().numpy()
    return np.split(numbers, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
