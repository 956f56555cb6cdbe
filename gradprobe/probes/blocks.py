"""Measuring in little memory: the graph is cut into blocks, and all tasks go through one block before the next.

Any graph can be cut: its operations are put in an order in which each comes after what it was computed from, and a
block is a stretch of that order. From the losses down, each task's gradient is taken through one block: on the block's
parameters, which are multiplied and freed, and on the edges that lead out of it, where the next block goes on. So
at most T gradients of one block are alive, and T gradients of the few activations at the cut.

It costs what explicit passes cost, and the calls: no task is derived from the joint backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradprobe.measures import Array
from gradprobe.probes.gramian import GramianSum
from gradprobe.probes.graph import LossGraph, Node, is_leaf
from gradprobe.probes.passes import Step, done
from gradprobe.probes.shared_layers import SharedLayers
from gradprobe.probes.state import state_kept
from gradprobe.processes import OneProcess

_Edge = tuple[Node, int]
"""An operation, and which of its outputs the gradient is of."""
BLOCKS = 8
"""Into so many parts of about equal numbers of parameters a model is cut, where its layers allow it."""


@dataclass(frozen=True)
class _Block:
    """A stretch of the graph.

    Attributes:
        first, end: Its operations, by their place in ``LossGraph.nodes``.
        leaves: Places of the shared parameters that it uses.
        complete: Those of them that no later block uses: their gradients are whole when this block is done.
        out: The edges that lead out of it, towards earlier operations.
    """

    first: int
    end: int
    leaves: tuple[int, ...]
    complete: tuple[int, ...]
    out: tuple[_Edge, ...]


def cut(graph: LossGraph, shared: SharedLayers, count: int = BLOCKS) -> list[_Block]:
    """Blocks from the losses down, cut where the least leads across.

    Args:
        graph: Of one step.
        shared: The layers.
        count: How many blocks to aim at.
    """
    uses = _uses(graph, shared)
    bounds = _bounds(graph, shared, uses, count)
    blocks = []
    for end, first in pairwise(bounds):
        used = tuple(i for i, places in uses.items() if any(first <= at < end for at in places))
        complete = tuple(i for i in used if min(uses[i]) >= first)
        blocks.append(_Block(first, end, used, complete, _leading_out(graph, first, end)))
    return blocks


def by_blocks(step: Step, count: int = BLOCKS) -> Array:
    """The Gramians (L, T, T), with no more than T gradients of one block alive."""
    shared, losses, graph, ranks = step.shared, step.losses, step.traced, step.ranks
    position = {node: at for at, node in enumerate(graph.nodes)}
    total, own = GramianSum(shared.layers, len(losses)), GramianSum(shared.layers, len(losses))
    walks = [_Walk(loss, shared, position) for loss in losses]
    with state_kept(step.model) as back:
        for block in cut(graph, shared, count):
            ranks.together(partial(_all_through, walks, block, back))
            _multiply(total, own, walks, block, shared.parameters, ranks)
    if ranks.size > 1:
        ranks.spread(own.result())
    return total.result()


def _multiply(
    total: GramianSum,
    own: GramianSum,
    walks: Sequence[_Walk],
    block: _Block,
    parameters: Sequence[nn.Parameter],
    ranks: OneProcess,
) -> None:
    """Of the gradients that are whole now; a function of its own, so that none of them outlives it.

    ``own`` gets this process's where there are several, ``total`` those of all.
    """
    used = [parameters[index] for index in block.complete]
    if ranks.size > 1:
        for index in block.complete:
            own.add(index, [walk.gradients.get(index) for walk in walks])
    found = [ranks.average([walk.gradients.pop(index, None) for index in block.complete], used) for walk in walks]
    for place, index in enumerate(block.complete):
        total.add(index, [gradients[place] for gradients in found])


def _all_through(walks: Sequence[_Walk], block: _Block, back: Callable[[], None]) -> None:
    for walk in walks:
        walk.through(block)
        back()


class _Walk:
    """One task's way down through the blocks."""

    def __init__(self, loss: Tensor, shared: SharedLayers, position: dict[Node, int]) -> None:
        self._parameters, self._position = shared.parameters, position
        self.gradients: dict[int, Tensor] = {}
        """Of the parameters of the present block, and of those that were used and are still to be used again."""
        self._front: dict[_Edge, Tensor] = {}
        if loss.grad_fn is not None:
            self._front[loss.grad_fn, loss.output_nr] = torch.ones_like(loss)

    def through(self, block: _Block) -> None:
        """Take the gradient from the upper edges of a block to its parameters and its lower edges."""
        starts = {e: self._front.pop(e) for e in list(self._front) if self._position[e[0]] >= block.first}
        leaves = [i for i in block.leaves if self._parameters[i].requires_grad]
        targets: list[Any] = [torch.autograd.graph.get_gradient_edge(self._parameters[i]) for i in leaves]
        targets += [GradientEdge(*edge) for edge in block.out]
        if not starts or not targets:
            return
        with _stopping_at({node for node, _ in block.out}):
            found = torch.autograd.grad(
                [GradientEdge(*edge) for edge in starts],
                targets,
                list(starts.values()),
                retain_graph=True,
                allow_unused=True,
            )
        done.count += 1
        _gather(self.gradients, leaves, found)
        _gather(self._front, block.out, found[len(leaves) :])


def _gather(into: dict[Any, Tensor], keys: Sequence[Any], gradients: Sequence[Tensor | None]) -> None:
    for key, gradient in zip(keys, gradients, strict=False):
        if gradient is not None:
            into[key] = into[key] + gradient if key in into else gradient


@contextmanager
def _stopping_at(nodes: set[Node]) -> Iterator[None]:
    """Let nothing pass through these operations.

    One of them may lie above another, and the gradient on the lower is wanted as it leaves the block, without what
    comes by way of the upper: that part is added when the next block is gone through.
    """
    handles = [node.register_prehook(lambda gradients: tuple(None for _ in gradients)) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _uses(graph: LossGraph, shared: SharedLayers) -> dict[int, list[int]]:
    """Place of a shared parameter -> places of the operations that use it."""
    index = {id(p): i for i, p in enumerate(shared.parameters)}
    uses: dict[int, list[int]] = {}
    for at, node in enumerate(graph.nodes):
        if is_leaf(node):
            continue
        for child, _ in node.next_functions:
            if child is not None and is_leaf(child) and id(child.variable) in index:
                uses.setdefault(index[id(child.variable)], []).append(at)
    return uses


def _bounds(graph: LossGraph, shared: SharedLayers, uses: dict[int, list[int]], count: int) -> list[int]:
    """Places at which blocks end and begin, from the losses down; the first is the end of the graph, the last 0."""
    parameters = shared.parameters
    goal = sum(parameters[i].numel() for i in uses) / count
    width = _width(graph)
    order = sorted(uses, key=lambda i: -min(uses[i]))
    bounds, size = [len(graph.nodes)], 0
    for this, following in pairwise(order):
        size += parameters[this].numel()
        lowest, highest = min(uses[following]) + 1, min(uses[this])
        if size >= goal and lowest <= highest:
            bounds.append(lowest + int(np.argmin(width[lowest : highest + 1])))
            size = 0
    return [*bounds, 0]


def _width(graph: LossGraph) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(N + 1,) how many numbers' gradients lead across a cut just below each place."""
    change = np.zeros(len(graph.nodes) + 1, dtype=np.int64)
    position = {node: at for at, node in enumerate(graph.nodes)}
    highest: dict[_Edge, int] = {}
    for at, node in enumerate(graph.nodes):
        for child, output in node.next_functions if not is_leaf(node) else ():
            if child is not None and not is_leaf(child):
                highest[child, output] = at
    for (child, output), top in highest.items():
        size = int(np.prod(child._input_metadata[output].shape, dtype=np.int64))
        change[position[child] + 1] += size
        change[top + 1] -= size
    return np.cumsum(change)


def _leading_out(graph: LossGraph, first: int, end: int) -> tuple[_Edge, ...]:
    position = {node: at for at, node in enumerate(graph.nodes[:first])}
    found: dict[_Edge, None] = {}
    for node in graph.nodes[first:end]:
        for child, output in node.next_functions if not is_leaf(node) else ():
            if child is not None and child in position and not is_leaf(child):
                found[child, output] = None
    return tuple(found)
