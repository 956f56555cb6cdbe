"""What a check gets to see, and what it says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gradprobe.probes.calls import loss_fault
from gradprobe.probes.feature_gradients import Feature, find_features
from gradprobe.probes.graph import LossGraph, Node, is_leaf, trace
from gradprobe.probes.shared_layers import by_module

SEVERITIES = ("error", "warning", "note")
"""error: a measurement would fail or be wrong. warning: it is right, and something beside it is not, or it is easily
misread. note: good to know."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: One of :data:`SEVERITIES`.
        check: Which check found it; stays the same from version to version.
        module: Name of the module or parameter that it is about; "" for the whole model, or where it is a loss.
        message: What it is, and what it does to a measurement.
        advice: What to do.
    """

    severity: str
    check: str
    module: str
    message: str
    advice: str

    def __str__(self) -> str:
        where = f"{self.module}: " if self.module else ""
        return f"{self.severity}: {where}{self.message} {self.advice}"


def below(node: Node) -> tuple[set[int], bool]:
    """What a tensor is made of other than by way of single numbers, such as losses are.

    Args:
        node: That made it.

    Returns:
        ``id`` of the leaf tensors on such ways, and whether a way ended at a single number.
    """
    leaves: set[int] = set()
    single, seen, stack = False, {node}, [node]
    while stack:
        for child, output in stack.pop().next_functions:
            if child is None or child in seen:
                continue
            if is_leaf(child):
                leaves.add(id(child.variable))
            elif child._input_metadata and math.prod(child._input_metadata[output].shape) == 1:
                single = True
            else:
                seen.add(child)
                stack.append(child)
    return leaves, single


def _of_numbers(node: Node) -> bool:
    """Whether a tensor is a list of single numbers, such as of all losses, and has no axis of samples."""
    leaves, single = below(node)
    return single and not leaves


@dataclass(frozen=True)
class Patient:
    """A model with the losses of one forward.

    Attributes:
        losses: Those that have a gradient at all, in their order.
        faults: Task -> what is wrong with its loss.
        graph: Of ``losses``.
        features: Where their tasks part.
    """

    model: nn.Module
    losses: Mapping[str, Tensor]
    faults: Mapping[str, str]
    graph: LossGraph
    features: list[Feature]

    @classmethod
    def of(cls, model: nn.Module, losses: Mapping[str, Tensor]) -> Patient:
        """Look at the graph once for all checks."""
        faults = {task: loss_fault(loss) for task, loss in losses.items()}
        sound = {task: loss for task, loss in losses.items() if not faults[task]}
        graph = trace(list(sound.values()))
        owners = {id(p): layer for layer, members in by_module(model).items() for p in members}
        features = [f for f in find_features(graph, owners) if not _of_numbers(f.node)]
        return cls(model, sound, {t: f for t, f in faults.items() if f}, graph, features)

    @property
    def tasks(self) -> list[str]:
        """Names, in the order of the bits of ``graph.tasks``."""
        return list(self.losses)

    @property
    def batch_size(self) -> int:
        """Length of the first axis of the shared features; 0 where they differ, or there are none."""
        sizes = {self.shape(f.node, f.output)[:1] for f in self.features}
        return sizes.pop()[0] if len(sizes) == 1 and () not in sizes else 0

    @staticmethod
    def shape(node: Node, output: int = 0) -> tuple[int, ...]:
        """Shape of what an operation made."""
        return tuple(int(n) for n in node._input_metadata[output].shape)

    def nodes(self, name: str) -> list[Node]:
        """Operations whose type is called ``name``."""
        return [node for node in self.graph.nodes if type(node).__name__ == name]

    def users(self) -> dict[int, list[Node]]:
        """``id`` of a leaf -> the operations that use it."""
        users: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            for child, _ in node.next_functions if not is_leaf(node) else ():
                if child is not None and is_leaf(child):
                    users.setdefault(id(child.variable), []).append(node)
        return users
