"""What a backward pass may move besides gradients, put back: buffers, attributes of modules, random numbers.

A non-reentrant activation checkpoint runs its part of the forward again in every backward pass, and with it whatever
the user's code does there: BatchNorm counts, dropout draws, a block counts its calls. Hooks that keep what the forward
left, and take it out in the backward, do it in every pass, too.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradprobe.probes import walk
from gradprobe.processes import reduction_kept

SMALL = 1 << 16
"""Plain tensors of a module with more numbers than this are not copied; see :func:`large_attributes`."""

_LONG = 10_000
"""Longer containers are data, and not copied."""

_OWN = frozenset(vars(nn.Module()))
"""What torch keeps in a module: no hook of the user's belongs to its state."""

_LISTS, _SETS = (list, deque), (set,)
_DICTS = (dict, OrderedDict, defaultdict, Counter)
_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)
_FIXED = frozenset((int, float, bool, str, tuple, bytes, complex, type(None), torch.device, torch.dtype, torch.Size))
"""What cannot change in place."""

_CONTAINERS = frozenset((*_LISTS, *_SETS, *_DICTS))


@contextmanager
def state_kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put back afterwards whatever a pass may have moved besides gradients.

    That is: every buffer, its values and which tensor it is; attributes of modules and of parameters, with the lists,
    dicts and sets among them, small tensors and generators; the random numbers of torch, numpy and Python.

    Yields:
        What puts them back at once. Called between two passes, it lets each see what the training's own backward will.
    """
    state = _State(model)
    try:
        with reduction_kept(model):
            yield state.back
    finally:
        state.back()


class _State:
    def __init__(self, model: nn.Module) -> None:
        self._mappings: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._empty: list[dict[str, Any]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._generators: list[Callable[[], None]] = []
        self._seen: set[int] = set()
        plain: list[Tensor] = []
        devices = set()
        for module in walk.modules(model):
            attributes = module.__dict__
            self._mappings.append((attributes, attributes.copy()))
            if module._buffers:
                self._mappings.append((module._buffers, module._buffers.copy()))
                plain += [b for b in module._buffers.values() if b is not None]
            for name, value in attributes.items():
                if type(value) not in _FIXED and name not in _OWN:
                    self._look(value, plain)
            for parameter in module._parameters.values():
                if parameter is not None:
                    devices.add(parameter.device)
                    self._attached(parameter.__dict__)
        # Through .data: a graph that saved a buffer must not think that it changed.
        self._tensors = [memory(t.data) for t in plain]
        self._before = [t.clone() for t in self._tensors]
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._on_gpus = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    def _attached(self, held: dict[str, Any]) -> None:
        """Remember what hangs on a parameter, which mostly is nothing."""
        if not held:
            self._empty.append(held)
            return
        self._mappings.append((held, held.copy()))
        for value in held.values():
            if type(value) in _CONTAINERS:
                self._look(value, [])

    def _look(self, value: Any, plain: list[Tensor]) -> None:
        """Remember one attribute of a module, and what is in it."""
        kind = type(value)
        if kind in _CONTAINERS:
            if len(value) <= _LONG and id(value) not in self._seen:
                self._seen.add(id(value))
                self._containers.append((value, value.copy()))
                for inner in value.values() if kind in _DICTS else value:
                    if type(inner) not in _FIXED:
                        self._look(inner, plain)
        elif kind is Tensor:
            if value.is_leaf and not value.requires_grad and value.numel() <= SMALL:
                plain.append(value)
        elif isinstance(value, _GENERATORS):
            self._generators.append(_as_it_is(value))

    def back(self) -> None:
        for held in self._empty:
            if held:
                held.clear()
        for now, before in self._mappings:
            if len(now) != len(before) or not all(map(is_, now.values(), before.values())):
                now.clear()
                now.update(before)
        for container, before in self._containers:
            if type(container) in _LISTS:
                if len(container) != len(before) or not all(map(is_, container, before)):
                    container.clear()
                    container.extend(before)
            elif type(container) in _SETS:
                if container != before:
                    container.clear()
                    container.update(before)
            elif len(container) != len(before) or not all(map(is_, container.values(), before.values())):
                container.clear()
                dict.update(container, before)
        if self._tensors:
            put_back(self._tensors, self._before)
        for restore in self._generators:
            restore()
        python, legacy, on_cpu = self._random
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(on_cpu)
        for device, state in self._on_gpus.items():
            torch.cuda.set_rng_state(state, device)


def _as_it_is(generator: Any) -> Callable[[], None]:
    """What puts a generator of random numbers back to where it is now."""
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return partial(generator.set_state, generator.get_state())


def memory(tensor: Tensor) -> Tensor:
    """A tensor that can be written to, with all memory of ``tensor``: itself, but where places of it are one number.

    An expanded tensor has one number in many places, and torch refuses to write to it.
    """
    if tensor.layout != torch.strided or tensor.is_contiguous() or not overlaps(tensor.shape, tensor.stride()):
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,))


def overlaps(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether two places of a strided tensor may be one number.

    >>> overlaps((3, 4), (0, 1)), overlaps((3, 4), (2, 1)), overlaps((3, 4), (1, 3))
    (True, True, False)
    """
    extent = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size > 1):
        if step < extent:
            return True
        extent = step * (size - 1) + extent
    return False


def put_back(tensors: list[Tensor], before: list[Tensor]) -> None:
    """Write the values back; without a sign to graphs that saved the tensors, if these are made by ``.data``."""
    dense = all(t.layout == torch.strided for t in tensors)
    if dense:
        torch._foreach_copy_(tensors, before)
        return
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)


def large_attributes(model: nn.Module) -> dict[str, Tensor]:
    """Name -> the plain tensors of modules that :func:`state_kept` does not copy, as they are large.

    Those with a graph are left out: they are activations, which nothing changes.
    """
    return {
        f"{name}.{attribute}" if name else attribute: value
        for name, module in model.named_modules()
        for attribute, value in module.__dict__.items()
        if type(value) is Tensor and not value.requires_grad and value.numel() > SMALL and not value.is_inference()
    }
