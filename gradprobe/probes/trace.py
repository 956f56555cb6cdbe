"""One walk over the autograd graph of all tasks: who reaches what, and in which precision it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Node = Any
"""A ``grad_fn``; torch has no public type for it."""

_EXACT = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Trace:
    """The graph below the losses of one step. It holds the graph alive: let go of it with the losses.

    Attributes:
        nodes: Every operation, each after all that it was computed from.
        tasks: Operation -> bit mask of the tasks whose loss depends on it.
        leaves: ``id`` of each leaf tensor -> bit mask of the tasks that reach it.
    """

    nodes: tuple[Node, ...]
    tasks: dict[Node, int]
    leaves: dict[int, int]

    def reaches(self, task: int, leaf: Tensor) -> bool:
        """Whether a task's loss depends on a leaf."""
        return bool(self.leaves.get(id(leaf), 0) >> task & 1)

    @property
    def exact(self) -> bool:
        """Whether nothing in it is computed in less than float32: no half type, no autocast.

        From parameters of an exact type one gets to a shorter one only through a conversion, or inside an operation
        of the user's own: those are looked at.
        """
        kinds = {kind for kind in set(map(type, self.nodes)) if _may_convert(kind.__name__)}
        return all(
            meta.dtype in _EXACT or not meta.dtype.is_floating_point
            for node in (self.nodes if kinds else ())
            if type(node) in kinds
            for meta in getattr(node, "_input_metadata", ())
        )


def _may_convert(name: str) -> bool:
    return name.startswith("ToCopy") or not name[-1].isdecimal()  # torch's own are numbered: AddBackward0


def is_leaf(node: Node) -> bool:
    """Whether a node stands for a leaf tensor, which is then its ``variable``."""
    return type(node).__name__ == "AccumulateGrad"


def several(mask: int) -> bool:
    """Whether a bit mask names two tasks or more."""
    return mask & (mask - 1) != 0


def trace(losses: Sequence[Tensor]) -> Trace:
    """Walk once, whatever the number of tasks.

    Args:
        losses: (T,) with their graphs. One without a graph reaches nothing.
    """
    roots = [loss.grad_fn for loss in losses]
    nodes = _children_first([root for root in roots if root is not None])
    masks: dict[Node, int] = dict.fromkeys(nodes, 0)
    leaves = {id(loss): 1 << t for t, loss in enumerate(losses) if loss.grad_fn is None and loss.requires_grad}
    for task, root in enumerate(roots):
        if root is not None:
            masks[root] |= 1 << task
    for node in reversed(nodes):
        mask = masks[node]
        if is_leaf(node):
            leaf = id(node.variable)
            leaves[leaf] = leaves.get(leaf, 0) | mask
            continue
        for child, _ in node.next_functions:
            if child is not None:
                masks[child] |= mask
    return Trace(tuple(nodes), masks, leaves)


def _children_first(roots: Sequence[Node]) -> list[Node]:
    """All nodes in an order in which each comes after its ``next_functions``. Without recursion: graphs are deep."""
    order: list[Node] = []
    seen: set[Node] = set()
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(root.next_functions))]
        while stack:
            node, children = stack[-1]
            for child, _ in children:
                if child is not None and child not in seen:
                    seen.add(child)
                    stack.append((child, iter(child.next_functions)))
                    break
            else:
                order.append(node)
                stack.pop()
    return order
