"""Whether two calls are of one forward: then they are one micro-batch, of which each call hands in some tasks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradprobe.probes.trace import is_leaf, trace

Operation = tuple[int, str]
"""Sequence number and kind of an operation; the number is its own as long as the forwards run in one thread."""


@dataclass(frozen=True)
class Uses:
    """What a call's losses were made by.

    Attributes:
        losses: The operations that made the losses themselves.
        parameters: ``id`` of a parameter -> the operations that joined it with something else, such as a layer's input.
        operations: All of them.
    """

    losses: frozenset[Operation]
    parameters: dict[int, frozenset[Operation]]
    operations: frozenset[Operation]


def uses_of(losses: Iterable[Tensor], parameters: Collection[Tensor]) -> Uses:
    """Read off the graph.

    What is made of a parameter alone (a transposed or a shorter copy) may be kept for several forwards, so such
    operations are passed over.
    """
    roots, wanted = list(losses), {id(p) for p in parameters}
    found: dict[int, set[Operation]] = {}
    nodes = [node for node in trace(roots).nodes if not is_leaf(node)]
    for node in nodes:
        if len(node.next_functions) == 1:
            continue
        for child, _ in node.next_functions:
            leaf = _leaf_below(child)
            if id(leaf) in wanted:
                found.setdefault(id(leaf), set()).add(_name(node))
    made = frozenset(_name(loss.grad_fn) for loss in roots if loss.grad_fn is not None)
    used = {leaf: frozenset(by) for leaf, by in found.items()}
    return Uses(made, used, frozenset(map(_name, nodes)))


def same_forward(one: Uses, other: Uses) -> bool:
    """Whether ``one`` is of the forward that ``other`` is of.

    It is where all its losses are the other's, or where both use the parameters that they have in common by the same
    operations. One may use a parameter more often than the other, as heads at different depths do; where each has a
    use of its own, the forward ran twice, whatever else they share (a penalty that was made once, say). Where no
    parameter is visible in both (behind a reentrant checkpoint), any operation in common will do.
    """
    if one.losses and one.losses <= other.losses:
        return True
    common = one.parameters.keys() & other.parameters.keys()
    pairs = [(one.parameters[p], other.parameters[p]) for p in common]
    if not pairs:
        return bool(one.operations & other.operations)
    return all(own <= theirs or theirs <= own for own, theirs in pairs)


def _leaf_below(node: Any) -> object:
    """The leaf that a chain of operations on one tensor begins with; None: there is none."""
    while node is not None and not is_leaf(node):
        if len(node.next_functions) != 1:
            return None
        node = node.next_functions[0][0]
    return None if node is None else node.variable


def _name(node: Any) -> Operation:
    return node._sequence_nr(), type(node).__name__
