"""What passes and forwards of a probe may move besides gradients: looked at, noticed, and put back."""

from __future__ import annotations

import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradprobe.probes.graph import Node, is_leaf
from gradprobe.processes import reduction_kept

__all__ = ["parameters_of", "sow", "state_kept", "undisturbed", "where_random_streams_are"]


_SMALL = 1 << 16
"""Plain tensors of a module with more numbers than this are not copied; see :func:`_large_attributes`."""
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
        for module in _modules_of(model):
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
            if value.is_leaf and not value.requires_grad and value.numel() <= _SMALL:
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
            _put_back(self._tensors, self._before)
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


def _put_back(tensors: list[Tensor], before: list[Tensor]) -> None:
    """Write the values back; without a sign to graphs that saved the tensors, if these are made by ``.data``."""
    dense = all(t.layout == torch.strided for t in tensors)
    if dense:
        torch._foreach_copy_(tensors, before)
        return
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)


def _large_attributes(model: nn.Module) -> dict[str, Tensor]:
    """Name -> the plain tensors of modules that :func:`state_kept` does not copy, as they are large.

    Those with a graph are left out: they are activations, which nothing changes.
    """
    return {
        f"{name}.{attribute}" if name else attribute: value
        for name, module in model.named_modules()
        for attribute, value in module.__dict__.items()
        if type(value) is Tensor and not value.requires_grad and value.numel() > _SMALL and not value.is_inference()
    }


class _Held(threading.local):
    def __init__(self) -> None:
        self.modules: dict[int, list[nn.Module]] = {}


_held = _Held()


# A model's modules and parameters without their names, for every measured step: model.parameters() and its like build
# every name on the way, which takes milliseconds in a model of many modules.


@contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """Within it the modules of a model are walked through once; a measured row asks for them ten times."""
    _held.modules[id(model)] = []
    try:
        yield
    finally:
        _held.modules.pop(id(model), None)


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """Each module once, the model first."""
    held = _held.modules.get(id(model))
    if held is None:
        return _walked(model)
    if not held:
        held += _walked(model)
    return held


def _walked(model: nn.Module) -> list[nn.Module]:
    found = {id(model): model}
    stack = [model]
    while stack:
        for child in stack.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                stack.append(child)
    return list(found.values())


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Each parameter, a tied one as often as it is registered."""
    return [p for m in _modules_of(model) for p in m._parameters.values() if p is not None]


def has_backward_hooks(model: nn.Module) -> bool:
    """Whether hooks on gradients, which every backward pass runs, are on any parameter or module."""
    return has_parameter_hooks(model) or any(m._backward_hooks or m._backward_pre_hooks for m in _modules_of(model))


def has_parameter_hooks(model: nn.Module) -> bool:
    """Whether hooks on gradients are on any parameter."""
    return any(p._backward_hooks for p in parameters_of(model))


_PLAIN = (Tensor, nn.Parameter)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Touched:
    """What some passes moved, by name.

    Attributes:
        gradients: Tensors whose ``.grad`` is another, or another value, or which keep another gradient beside it.
        parameters: Parameters whose values moved.
        attributes: Large tensors of modules that were written to.
        lost: Those of ``parameters`` that could not be put back, as no copy had been made, and ``attributes``.
    """

    gradients: list[str]
    parameters: list[str]
    attributes: list[str]
    lost: list[str]

    def __bool__(self) -> bool:
        return bool(self.gradients or self.parameters or self.attributes)


class PassSnapshot:
    """The gradients and values of a model's parameters at one moment.

    Args:
        model: Whose they are.
        nodes: Of the losses' graph: other leaf tensors there have a ``.grad``, too.
        copies: Whether to copy the parameters' values, so that they can be put back; a fingerprint else.
    """

    def __init__(self, model: nn.Module, nodes: Iterable[Node], *, copies: bool) -> None:
        named = {id(p): (name, p) for name, p in model.named_parameters() if not is_lazy(p)}
        others = [node.variable for node in nodes if is_leaf(node)]
        unnamed = {id(t): (f"an input of shape {tuple(t.shape)}", t) for t in others if id(t) not in named}
        self._gradients = [_Gradient(name, leaf) for name, leaf in [*named.values(), *unnamed.values()]]
        self._values = [(name, _Value(p, copy=copies)) for name, p in named.values()]
        self._large = [(name, tensor, tensor._version) for name, tensor in _large_attributes(model).items()]

    def back(self) -> Touched:
        """Put back what was touched, and say what it was."""
        gradients = [g.name for g in self._gradients if g.back()]
        moved = [(name, value) for name, value in self._values if value.moved()]
        attributes = [name for name, tensor, version in self._large if tensor._version != version]
        lost = [name for name, value in moved if not value.back()] + attributes
        return Touched(gradients, [name for name, _ in moved], attributes, lost)


class _Gradient:
    """The ``.grad`` of a leaf, and what other code hangs on it: ``main_grad``, ``grad_sample``."""

    def __init__(self, name: str, leaf: Tensor) -> None:
        self.name, self._leaf, self._grad = name, leaf, leaf.grad
        held = [leaf.grad, *(v for v in vars(leaf).values() if type(v) is Tensor and not v.requires_grad)]
        self._held = [_Value(t, copy=True) for t in held if t is not None]

    def back(self) -> bool:
        other = self._leaf.grad is not self._grad
        if other:
            self._leaf.grad = self._grad
        moved = [value for value in self._held if value.written() or value.moved()]
        for value in moved:
            value.back()
        return other or bool(moved)


class _Value:
    def __init__(self, tensor: Tensor, *, copy: bool) -> None:
        self._tensor = tensor
        self._version = None if tensor.is_inference() else tensor._version
        # Of a parameter without numbers yet, or one that another library made its own, the version alone is looked at.
        self._copy = tensor.detach().clone() if copy and type(tensor) in _PLAIN else None
        self._fingerprint = _fingerprint(tensor) if self._copy is None else None

    def written(self) -> bool:
        return self._version is not None and self._tensor._version != self._version

    def moved(self) -> bool:
        if self._copy is not None:
            return not _same_bits(self._tensor, self._copy)
        return self.written() or not _equal(self._fingerprint, _fingerprint(self._tensor))

    def back(self) -> bool:
        if self._copy is None:
            return False
        self._tensor.data.copy_(self._copy)
        if self._version is not None and self._tensor._version != self._version:
            _set_version(self._tensor, self._version)
        return True


def _set_version(tensor: Tensor, version: int) -> None:
    """Let a graph that saved a tensor find it as it was: its numbers are put back to the last bit."""
    setter: Any = getattr(torch._C._autograd, "_unsafe_set_version_counter", None)
    if setter is None:
        return
    try:
        setter((tensor,), (version,))
    except TypeError:  # before torch 2.6 for one tensor
        setter(tensor, version)


class ParameterValues:
    """Whether parameters move: their versions, and on request their bits, at one moment.

    Args:
        parameters: Each of them.
        closely: Also take fingerprints. What is written through ``.data`` changes no version.
    """

    def __init__(self, parameters: Sequence[Tensor], *, closely: bool) -> None:
        self._parameters = [p for p in parameters if not is_lazy(p)]
        self._versions = [p._version for p in self._parameters if not p.is_inference()]
        self._prints = [_fingerprint(p) for p in self._parameters] if closely else []

    def moved(self) -> bool:
        """Whether any is another than it was."""
        if [p._version for p in self._parameters if not p.is_inference()] != self._versions:
            return True
        return any(
            not _equal(before, _fingerprint(p)) for before, p in zip(self._prints, self._parameters, strict=False)
        )


def _fingerprint(tensor: Tensor) -> Tensor | None:
    """A sum over the bits of a tensor; another one where a number changed, whatever it changed by."""
    bits = _bits(tensor)
    return None if bits is None else bits.sum(dtype=torch.int64)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the last bit; NaN is the same as itself."""
    if one.layout != torch.strided:
        return _same_sparse(one, other)
    mine, its = _bits(one), _bits(other)
    return one.shape == other.shape and (mine is None or its is None or torch.equal(mine, its))


def _same_sparse(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.sparse_coo or one._nnz() != other._nnz():
        return one.layout != torch.sparse_coo
    return torch.equal(one._indices(), other._indices()) and _same_bits(one._values(), other._values())


def _bits(tensor: Tensor) -> Tensor | None:
    """The numbers of a strided tensor as integers of their size; None: it has no such numbers."""
    if type(tensor) not in _PLAIN or tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    plain = tensor.detach()
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    kind = _BITS.get(plain.element_size())
    return None if kind is None or plain.is_quantized else plain.view(kind)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is None or other is None or bool(one == other)


def sow(seed: int) -> None:
    """Begin the global random streams anew: of Python, numpy, and torch on the CPU and on GPUs."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    for generator in torch.cuda.default_generators if torch.cuda.is_initialized() else ():
        generator.manual_seed(seed)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what forwards of a training may change: what passes may, modes among it, and the streams of all GPUs."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with state_kept(model):
            yield
    finally:
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


def where_random_streams_are() -> tuple[Any, ...]:
    """Another value where the global random numbers of Python, numpy, or torch have gone on."""
    _, key, *rest = np.random.get_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    on_torch = [state.numpy().tobytes() for state in (torch.get_rng_state(), *gpus)]
    return random.getstate(), np.asarray(key).tobytes(), *rest, *on_torch
