"""Products of gradients without the gradients: for linear and convolutional layers on few samples and positions.

The gradient of such a layer's weight is a sum over samples and positions, g = sum_n d_n a_n^T, of the gradient d_n
at the layer's output and the (unfolded) input a_n. So <g_i, g_j> = sum_{n,m} (a_n . a_m) (d^i_n . d^j_m): with
fewer rows n than the weight has rows and columns, cheaper than making the two gradients and multiplying them, and a
pass that stops at d is cheaper than one that makes g.

Source: Goodfellow, "Efficient per-example gradient computations", 2015, for the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from gradprobe.measures import Array
from gradprobe.probes.gramian import symmetric
from gradprobe.probes.graph import SharedLayers
from gradprobe.probes.trace import Node, Trace, is_leaf


@dataclass(frozen=True)
class Ghost:
    """A weight whose gradient is not made.

    Attributes:
        index: Its place in ``SharedLayers.parameters``.
        node: The operation that uses it; the gradient at its output stands for that of the weight.
    """

    index: int
    node: Node

    def rows(self, gradient: Tensor) -> Tensor:
        """The gradient at the output, one row per sample and position: (N, out)."""
        return gradient.movedim(1, -1).reshape(-1, gradient.shape[1])

    def overlap(self) -> Tensor:
        """(N, N) inner products of the inputs of every two rows."""
        inputs = _inputs(self.node)
        return inputs @ inputs.T

    def products(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """Inner products of the weight's gradients, accumulated in float64: (k, k) in the order of the keys."""
        overlap = self.overlap().double()
        rows = [self.rows(g) for g in gradients.values()]
        return symmetric([[(overlap * (a @ b.T)).sum() for b in rows[i:]] for i, a in enumerate(rows)])


def find_ghosts(graph: Trace, shared: SharedLayers) -> list[Ghost]:
    """The weights for which it pays, each used by one operation only."""
    index = {  # not where a hook of the user's changes the gradient, which would not be seen here
        id(p): i
        for i, p in enumerate(shared.parameters)
        if p.dtype in (torch.float32, torch.float64) and p.requires_grad and not p._backward_hooks
    }
    users: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for child, _ in node.next_functions if not is_leaf(node) else ():
            if child is not None and is_leaf(child) and id(child.variable) in index:
                users.setdefault(index[id(child.variable)], []).append(node)
    parents = _parents_of_transposes(graph)
    found = []
    for place, nodes in users.items():
        if len(nodes) != 1:
            continue
        node = nodes[0]
        if type(node).__name__ == "TBackward0":  # a linear layer uses its weight transposed
            above = parents.get(node, [])
            node = above[0] if len(above) == 1 else None
        if node is not None and _pays(node, shared.parameters[place]):
            found.append(Ghost(place, node))
    return found


def _parents_of_transposes(graph: Trace) -> dict[Node, list[Node]]:
    parents: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        for child, _ in node.next_functions if not is_leaf(node) else ():
            if child is not None and type(child).__name__ == "TBackward0":
                parents.setdefault(child, []).append(node)
    return parents


def _pays(node: Node, weight: Tensor) -> bool:
    kind, shape = type(node).__name__, node._input_metadata[0].shape
    if kind == "ConvolutionBackward0":
        if weight.ndim != 4 or node._saved_groups != 1 or node._saved_transposed:
            return False
        rows = shape[0] * shape[2] * shape[3]
    elif kind in ("AddmmBackward0", "MmBackward0") and weight.ndim == 2:
        rows = shape[0]
    else:
        return False
    return _cheaper(int(rows), weight.shape[0], weight.numel() // weight.shape[0])


def _cheaper(rows: int, out: int, inputs: int) -> bool:
    return rows * (out + inputs) <= out * inputs


def _inputs(node: Node) -> Tensor:
    """(N, in): what the weight was multiplied by, one row per sample and position."""
    kind = type(node).__name__
    if kind == "AddmmBackward0":
        saved: Tensor = node._saved_mat1
        return saved.detach()
    if kind == "MmBackward0":
        saved = node._saved_self
        return saved.detach()
    kernel = node._saved_weight.shape[2:]
    columns = F.unfold(
        node._saved_input.detach(), kernel, node._saved_dilation, node._saved_padding, node._saved_stride
    )
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


class OutputGradients:
    """Every task's gradient at the outputs that stand for weights, and their products once all are there.

    Args:
        ghosts: What stands for what.
    """

    def __init__(self, ghosts: Sequence[Ghost]) -> None:
        self.ghosts = ghosts
        self.places = {ghost.index for ghost in ghosts}
        self._gradients: list[dict[int, Tensor]] = [{} for _ in ghosts]

    @property
    def edges(self) -> list[GradientEdge]:
        """What to ask ``autograd.grad`` for in the weights' stead."""
        return [GradientEdge(ghost.node, 0) for ghost in self.ghosts]

    def add(self, task: int, gradients: Sequence[Tensor | None]) -> None:
        """One task's, in the order of the ghosts."""
        for held, gradient in zip(self._gradients, gradients, strict=True):
            if gradient is not None:
                held[task] = gradient

    def listening(self, task: int, weights: Array, reached: Sequence[bool]) -> _Joint:
        """Enter it while the joint backward runs: the gradient of ``task`` is what the joint one has beyond the others.

        Args:
            task: The one to be derived.
            weights: (T,).
            reached: For every parameter, whether the task has a path to it.
        """
        return _Joint(self, task, weights, reached)

    def products(self) -> Iterator[tuple[int, list[int], Tensor]]:
        """Place of a parameter, the tasks that reach it, and their inner products."""
        for ghost, held in zip(self.ghosts, self._gradients, strict=True):
            if held:
                tasks = sorted(held)
                yield ghost.index, tasks, ghost.products({task: held[task] for task in tasks})


class _Joint:
    def __init__(self, outputs: OutputGradients, task: int, weights: Array, reached: Sequence[bool]) -> None:
        self._outputs, self._task, self._weights, self._reached = outputs, task, weights, reached

    def __enter__(self) -> None:
        self._handles = [
            ghost.node.register_prehook(self._hook(place, self._reached[ghost.index]))
            for place, ghost in enumerate(self._outputs.ghosts)
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, place: int, reached: bool) -> Callable[[Any], None]:
        def hook(gradients: Any) -> None:
            if gradients[0] is None or not reached:
                return
            held, rest = self._outputs._gradients[place], gradients[0].detach().clone()
            for other, gradient in held.items():
                rest.sub_(gradient, alpha=float(self._weights[other]))
            held[self._task] = rest.div_(float(self._weights[self._task]))

        return hook
