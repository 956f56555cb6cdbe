"""Reads the autograd graph: which parameters a loss reaches, and in which order the forward used them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from gradprobe.measures import Array


def reached(loss: Tensor) -> dict[int, int]:
    """The leaf tensors that a loss depends on.

    Args:
        loss: Any tensor with a graph.

    Returns:
        ``id`` of each leaf -> the sequence number of the first operation that used it. The numbers grow in the
        order in which the forward ran. Parameters behind a reentrant checkpoint are invisible here.
    """
    root = loss.grad_fn
    if root is None:
        return {id(loss): 0} if loss.requires_grad else {}
    first_use: dict[int, int] = {}
    seen = {root}
    stack = [root]
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            leaf = getattr(child, "variable", None)
            if leaf is not None:
                order = node._sequence_nr()
                first_use[id(leaf)] = min(order, first_use.get(id(leaf), order))
            elif child not in seen:
                seen.add(child)
                stack.append(child)
    return first_use


@dataclass(frozen=True)
class Layer:
    """Some parameters that are measured as one vector."""

    name: str
    parameters: tuple[nn.Parameter, ...]

    @property
    def size(self) -> int:
        """Number of numbers in it."""
        return sum(p.numel() for p in self.parameters)


@dataclass(frozen=True)
class SharedLayers:
    """The layers that two or more tasks reach, in the order in which the forward runs them.

    Attributes:
        layers: L of them.
        reach: (L, T) bool, from the graph and never from values.
    """

    layers: tuple[Layer, ...]
    reach: tuple[tuple[bool, ...], ...]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of all layers, layer by layer."""
        return [p for layer in self.layers for p in layer.parameters]


def padded(values: Array, layers: int) -> Array:
    """(L, ...) with NaN for layers that have joined at the end."""
    return np.concatenate([values, np.full((layers - len(values), *values.shape[1:]), np.nan)])


def find_shared(
    groups: Mapping[str, Iterable[nn.Parameter]], losses: Mapping[str, Tensor], chosen: set[int] | None = None
) -> SharedLayers:
    """The shared layers of a model, found from the graphs of its tasks' losses.

    Args:
        groups: Layer name -> its parameters. A parameter in two groups (tied weights) counts in the first.
        losses: Task name -> loss with its graph.
        chosen: ``id`` of the parameters that may count; None: every one that two or more tasks reach.
    """
    uses = [reached(loss) for loss in losses.values()]
    order: dict[str, int] = {}
    layers: dict[str, Layer] = {}
    taken: set[int] = set()
    for name, parameters in groups.items():
        members = [
            p
            for p in parameters
            if p.requires_grad
            and id(p) not in taken
            and (id(p) in chosen if chosen is not None else sum(id(p) in use for use in uses) >= 2)
        ]
        if members:
            taken.update(id(p) for p in members)
            layers[name] = Layer(name, tuple(members))
            order[name] = min((use[id(p)] for use in uses for p in members if id(p) in use), default=1 << 62)
    names = sorted(layers, key=order.__getitem__)
    reach = tuple(tuple(any(id(p) in use for p in layers[n].parameters) for use in uses) for n in names)
    return SharedLayers(tuple(layers[n] for n in names), reach)


def by_module(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by the module that owns them: ``{"model.0.conv": [weight, bias], ...}``.

    Names are those of the module before it was compiled, so that runs can be laid side by side.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        plain = name.replace("_orig_mod.", "")
        owner = plain.rpartition(".")[0] or plain
        groups.setdefault(owner, []).append(parameter)
    return groups
