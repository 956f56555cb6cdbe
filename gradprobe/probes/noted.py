"""What passes must leave alone, noted before them and compared, and put back, afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradprobe.probes.state import large_attributes
from gradprobe.probes.trace import Node, is_leaf

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


class Noted:
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
        self._large = [(name, tensor, tensor._version) for name, tensor in large_attributes(model).items()]

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
        self._fingerprint = fingerprint(tensor) if self._copy is None else None

    def written(self) -> bool:
        return self._version is not None and self._tensor._version != self._version

    def moved(self) -> bool:
        if self._copy is not None:
            return not _same_bits(self._tensor, self._copy)
        return self.written() or not _equal(self._fingerprint, fingerprint(self._tensor))

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


class Parameters:
    """Whether parameters move: their versions, and on request their bits, at one moment.

    Args:
        parameters: Each of them.
        closely: Also take fingerprints. What is written through ``.data`` changes no version.
    """

    def __init__(self, parameters: Sequence[Tensor], *, closely: bool) -> None:
        self._parameters = [p for p in parameters if not is_lazy(p)]
        self._versions = [p._version for p in self._parameters if not p.is_inference()]
        self._prints = [fingerprint(p) for p in self._parameters] if closely else []

    def moved(self) -> bool:
        """Whether any is another than it was."""
        if [p._version for p in self._parameters if not p.is_inference()] != self._versions:
            return True
        return any(
            not _equal(before, fingerprint(p)) for before, p in zip(self._prints, self._parameters, strict=False)
        )


def fingerprint(tensor: Tensor) -> Tensor | None:
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
