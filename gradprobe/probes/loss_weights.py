"""Learned weights of losses inside a model: parameters on which no feature depends, only scalars on the way to a loss.

Every task's loss has a gradient on a log-variance or a softmax weight, often long and opposed, though no task learns
anything there of what the others learn: counted among the shared layers, it drowns the trunk. Such a parameter is known
by what is done with it, from the losses down: only sums, products and selections, up to where a function of the
parameter alone meets a loss, which is something that other parameters make.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gradprobe.probes.trace import Node, Trace, is_leaf

FEW = 64
"""Numbers that a parameter has at most that weighs losses; more losses than that nobody weighs."""

_LINEAR = re.compile(
    r"Mul|Div|Add|Sub|Rsub|Neg|Sum|Mean|Select|Index|IndexSelect|Gather|Slice|Stack|Cat|Unbind|Split|"
    r"SplitWithSizes|View|UnsafeView|Reshape|ReshapeAlias|Squeeze|Unsqueeze|Expand|Permute|T|Transpose|"
    r"CopySlices|Copy|ToCopy|Clone|Alias|AsStrided|Dot|Addcmul|Addcdiv|SelectScatter|SliceScatter|IndexPut|"
    r"NanToNum|_DDPSink|DDPSink"
)
"""Operations that only add, scale and arrange what they are given."""

_OF_ITSELF = re.compile(
    r"Exp|Exp2|Expm1|Log|Log2|Log10|Log1P|Pow|Sqrt|Rsqrt|Reciprocal|Sigmoid|LogSigmoidForward|Softplus|Softmax|"
    r"LogSoftmax|Tanh|Relu|Elu|Abs|Clamp|ClampMin|ClampMax|Maximum|Minimum|LinalgVectorNorm|Norm|Logsumexp|Prod|"
    r"Square"
)
"""Operations that make a positive weight, or weights that sum to one, out of a parameter."""

_HIDING = ("CompiledFunction", "DifferentiableGraph")
"""Operations that stand for a whole compiled or scripted region."""


@dataclass
class _Below:
    """What a node is computed from.

    Attributes:
        leaves: ``id`` of the leaf tensors that want gradients.
        plain: Whether by operations that make weights alone, of no more numbers than the leaves have.
    """

    leaves: set[int]
    plain: bool


def loss_weights(graph: Trace, size: Mapping[int, int]) -> set[int]:
    """The parameters that weigh losses and do nothing else.

    Args:
        graph: Of one step.
        size: ``id`` of each parameter that is in question -> how many numbers it has.

    Returns:
        Their ``id``. Those that a compiled region hides are given by :func:`hidden`.
    """
    if not any(0 < numbers <= FEW for leaf, numbers in size.items() if leaf in graph.leaves):
        return set()
    below = _below(graph, size)
    tail, ends = _tail(graph)
    met: set[int] = set()
    used_otherwise: set[int] = set().union(*(below[node].leaves for node in ends))
    for node in tail:
        inputs = [child for child, _ in node.next_functions if child is not None]
        weights = [child for child in inputs if below[child].plain]
        losses = [child for child in inputs if not below[child].plain]
        for child in weights:
            if losses and _fits(child, node):
                met |= below[child].leaves
            elif losses:
                used_otherwise |= below[child].leaves
        for child in losses:
            if child not in tail:
                used_otherwise |= below[child].leaves
    return {leaf for leaf in met - used_otherwise if size.get(leaf, FEW + 1) <= FEW}


def hidden(graph: Trace, size: Mapping[int, int], most: int) -> set[int]:
    """``id`` of the parameters that may weigh losses within a compiled region, where it cannot be seen.

    Args:
        graph, size: As for :func:`loss_weights`.
        most: Numbers that such a parameter has at most.
    """
    inputs = [child for node in graph.nodes if _kind(node) in _HIDING for child, _ in node.next_functions]
    leaves = {id(child.variable) for child in inputs if child is not None and is_leaf(child)}
    return {leaf for leaf in leaves if 0 < size.get(leaf, 0) <= most}


def _below(graph: Trace, size: Mapping[int, int]) -> dict[Node, _Below]:
    found: dict[Node, _Below] = {}
    for node in graph.nodes:  # each after what it was computed from
        if is_leaf(node):
            leaf = id(node.variable)
            found[node] = _Below({leaf}, size.get(leaf, FEW + 1) <= FEW)
            continue
        children = [found[child] for child, _ in node.next_functions if child is not None]
        leaves = set().union(*(child.leaves for child in children))
        plain = bool(children) and all(child.plain for child in children) and _makes_weights(_kind(node))
        found[node] = _Below(leaves, plain and _numbers(node) <= sum(size[leaf] for leaf in leaves))
    return found


def _tail(graph: Trace) -> tuple[set[Node], list[Node]]:
    """What lies between the losses and the first operation that does more than add, scale and arrange; and losses that
    are made by such an operation themselves.
    """
    above: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
    for node in graph.nodes:
        for child, _ in node.next_functions if not is_leaf(node) else ():
            if child is not None:
                above[child].append(node)
    tail: set[Node] = set()
    for node in reversed(graph.nodes):
        if not is_leaf(node) and _LINEAR.fullmatch(_kind(node)) and all(parent in tail for parent in above[node]):
            tail.add(node)
    return tail, [node for node in graph.nodes if not above[node] and node not in tail and not is_leaf(node)]


def _fits(weight: Node, node: Node) -> bool:
    """Whether one number scales all, or a vector of weights a vector of losses."""
    return _numbers(weight) == 1 or _numbers(node) <= _numbers(weight)


def _makes_weights(kind: str) -> bool:
    return bool(_LINEAR.fullmatch(kind) or _OF_ITSELF.fullmatch(kind))


def _kind(node: Node) -> str:
    return str(type(node).__name__).rstrip("0123456789").removesuffix("Backward")


def _numbers(node: Node) -> int:
    if is_leaf(node):
        return int(node.variable.numel())
    shapes = [tuple(meta.shape) for meta in node._input_metadata]
    return max((_product(shape) for shape in shapes), default=FEW + 1)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= int(length)
    return total
