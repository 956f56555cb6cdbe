"""Task gradients at the features that the heads share, taken within the one joint backward.

Where two tasks part, the graph has operations that one task alone depends on (its head), and below them one that
several depend on (what made the feature). What such a private operation hands down in the joint backward is that
task's gradient at the feature, times its weight: a hook on the operation sees it, and no pass is made for it.

**A bound, not a measurement.** With d_i the gradient of task i at the feature and J the Jacobian of the feature with
respect to the parameters below it, the gradient on those is g_i = J^T d_i. So |g_i| <= s |d_i| and
|<g_i, g_j>| <= s^2 |d_i| |d_j|, s the largest singular value of J; d_i = 0 gives g_i = 0, and parallel d give
parallel g. But neither the size nor the sign of cos(d_i, d_j) is that of cos(g_i, g_j): J decides.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.gramian import fetch, products
from gradprobe.probes.graph import LossGraph, Node, is_leaf, several, trace
from gradprobe.probes.guard import Guard
from gradprobe.probes.passes import done
from gradprobe.probes.shared_layers import by_module
from gradprobe.probes.state import state_kept

__all__ = ["GradientLevel"]


_Origin = tuple[str, str, int]
"""The layer that makes a feature, the type of the operation, and which of its outputs it is."""


@dataclass(frozen=True)
class Feature:
    """One tensor at which two or more tasks part.

    Attributes:
        name: The layer that makes it.
        node, output: The operation that made it, and which of its outputs it is.
        size: How many numbers it has.
        entries: Operation of a head, and which of its inputs the feature is -> the task whose head it is.
    """

    name: str
    node: Node
    output: int
    size: int
    entries: Mapping[tuple[Node, int], int]

    @property
    def origin(self) -> _Origin:
        """What tells it from others, without its graph."""
        return self.name.split("#")[0], type(self.node).__name__, self.output

    @property
    def tasks(self) -> list[int]:
        """The tasks whose whole gradient enters here."""
        return sorted(set(self.entries.values()))


def find_features(graph: LossGraph, names: Mapping[int, str]) -> list[Feature]:
    """The features at which tasks part, in the order in which the forward made them.

    A task counts at a feature only if all of its paths into it are its own: where one leads through an operation
    that another task depends on too, its gradient cannot be told from the other's.

    Args:
        graph: Of one step.
        names: ``id`` of a parameter -> the layer that owns it.
    """
    entries: dict[tuple[Node, int], dict[tuple[Node, int], int]] = {}
    for parent in graph.nodes:
        if is_leaf(parent):
            continue
        for slot, (child, output) in enumerate(parent.next_functions):
            if child is not None and several(graph.tasks[child]) and not is_leaf(child):
                entries.setdefault((child, output), {})[parent, slot] = graph.tasks[parent]
    position = {node: index for index, node in enumerate(graph.nodes)}
    found: list[Feature] = []
    for (node, output), masks in sorted(entries.items(), key=lambda item: (position[item[0][0]], item[0][1])):
        own = _own(masks)
        if len(set(own.values())) >= 2:
            size = math.prod(node._input_metadata[output].shape)
            found.append(Feature(_maker(node, position, names), node, output, size, own))
    return _distinct(found)


def _select(features: Sequence[Feature], wanted: Iterable[str] | None) -> list[Feature]:
    """Those made at or below the modules called ``wanted``; all where that is None.

    Raises:
        ProbeError: None is; lists those there are.
    """
    if wanted is None:
        return list(features)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen = [f for f in features if any(f.origin[0] == n or f.name.startswith(n + ".") for n in names)]
    if not chosen:
        raise ProbeError(
            f"features={names}: tasks part at no output of these modules. They part at the outputs of: "
            f"{', '.join(f.name for f in features) or 'no module'}."
        )
    return chosen


def _own(masks: Mapping[tuple[Node, int], int]) -> dict[tuple[Node, int], int]:
    """The entries of the tasks that enter by operations of their own only."""
    mixed = 0
    for mask in masks.values():
        mixed |= mask if several(mask) else 0
    return {at: mask.bit_length() - 1 for at, mask in masks.items() if not mask & mixed}


def _maker(node: Node, position: Mapping[Node, int], names: Mapping[int, str]) -> str:
    """The layer whose parameters were used last before ``node``."""
    queue, seen = [(-position[node], node)], {node}
    while queue:
        _, current = heapq.heappop(queue)
        for child, _ in current.next_functions:
            if child is None or child in seen:
                continue
            if is_leaf(child):
                if id(child.variable) in names:
                    return names[id(child.variable)]
                continue
            seen.add(child)
            heapq.heappush(queue, (-position[child], child))
    return "input"


def _distinct(features: list[Feature]) -> list[Feature]:
    """Names made different where one layer makes several: ``model.24``, ``model.24#2``."""
    count: dict[str, int] = {}
    result = []
    for feature in features:
        count[feature.name] = count.get(feature.name, 0) + 1
        again = count[feature.name]
        result.append(feature if again == 1 else replace(feature, name=f"{feature.name}#{again}"))
    return result


def _under_first_names(features: Sequence[Feature], first: Mapping[str, _Origin]) -> list[Feature]:
    """This step's features under the names of the first step's.

    Where a layer makes fewer or more of them than at first, order does not tell which is which. Then the operation and
    its output may; one that they do not tell either is left out: better no number than another feature's.

    Args:
        features: Of this step.
        first: Name -> origin of those of the first step, in their order.
    """
    count, count_first = Counter(f.origin[0] for f in features), Counter(layer for layer, *_ in first.values())

    def key(origin: _Origin) -> tuple[object, ...]:
        return origin[:1] if count[origin[0]] == count_first[origin[0]] else origin

    found = []
    for kind in dict.fromkeys(key(f.origin) for f in features):
        now = [f for f in features if key(f.origin) == kind]
        names = [name for name, origin in first.items() if key(origin) == kind]
        if len(now) == len(names):
            found += [replace(f, name=name) for f, name in zip(now, names, strict=True)]
    return found


class JointFeatures:
    """Collects every task's gradient at the features while the joint backward runs.

    Args:
        features: F of them.
        factors: (T,) by what the joint backward multiplies each task's gradient: its weight, times the loss scale.

    Attributes:
        seconds: Spent in the hooks.
    """

    def __init__(self, features: Sequence[Feature], factors: Array) -> None:
        self.features, self._factors = features, factors
        self._gradients: list[dict[int, Tensor]] = [{} for _ in features]
        self._failure: Exception | None = None
        self.seconds = 0.0

    def __enter__(self) -> JointFeatures:
        self._handles = [
            parent.register_hook(self._hook(place, slot, task))
            for place, feature in enumerate(self.features)
            for (parent, slot), task in feature.entries.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def result(self) -> Array:
        """The Gramians (F, T, T)."""
        if self._failure is not None:
            raise self._failure
        return _gramians(self._gradients, self._factors)

    def _hook(self, place: int, slot: int, task: int) -> Callable[[Any, Any], None]:
        def hook(down: Any, _: Any) -> None:
            started = time.perf_counter()
            try:
                gradient, held = down[slot], self._gradients[place]
                if gradient is not None:
                    # A reference, no copy: the engine adds into a tensor only if nobody else holds it.
                    held[task] = gradient if task not in held else held[task] + gradient
            except Exception as error:
                self._failure = self._failure or error
            self.seconds += time.perf_counter() - started

        return hook


def _explicit_features(features: Sequence[Feature], losses: Sequence[Tensor], factors: Array) -> Array:
    """The same by a pass through each head: for loops that make their own backward.

    Args:
        features: F of them.
        losses: (T,).
        factors: (T,) by what each loss is multiplied already.
    """
    gradients: list[dict[int, Tensor]] = [{} for _ in features]
    for task, loss in enumerate(losses):
        places = [place for place, feature in enumerate(features) if task in feature.tasks]
        if not places:
            continue
        edges = [GradientEdge(features[place].node, features[place].output) for place in places]
        found = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        done.count += 1
        for place, gradient in zip(places, found, strict=True):
            if gradient is not None:
                gradients[place][task] = gradient
    return _gramians(gradients, factors)


def _gramians(gradients: Sequence[Mapping[int, Tensor]], factors: Array) -> Array:
    """Gramians of the gradients of the unweighted losses: (F, T, T); NaN where a task is missing or its factor is 0."""
    gram = np.full((len(gradients), len(factors), len(factors)), np.nan)
    found = []
    for place, by_task in enumerate(gradients):
        tasks = [task for task in sorted(by_task) if factors[task] != 0]
        if tasks:
            found.append((place, tasks, products([by_task[task] for task in tasks])))
    for (place, tasks, _), numbers in zip(found, fetch([part for _, _, part in found]), strict=True):
        values = numbers.reshape(len(tasks), len(tasks)) / np.outer(factors[tasks], factors[tasks])
        gram[place][np.ix_(tasks, tasks)] = np.where(np.isfinite(values), values, np.nan)
    return gram


class FeatureGradients:
    """Knows the features at which the tasks part, and finds them again in each step's new graph.

    Args:
        model: Names the features by its modules.
        wanted: Modules whose outputs count; None: all at which tasks part.
        warn: Is told what the user should know.
        guard: Stands around the passes; default one for these alone.

    Attributes:
        names: (F,) of the features; empty before any were found.
    """

    def __init__(
        self, model: nn.Module, wanted: Iterable[str] | None, warn: Callable[[str], None], guard: Guard | None = None
    ) -> None:
        self._model, self._warn, self._guard = model, warn, guard or Guard(model, warn)
        self._wanted = [wanted] if isinstance(wanted, str) else None if wanted is None else list(wanted)
        self._owners: dict[int, str] = {}
        self._first: dict[str, _Origin] = {}  # of all features at the first step, wanted or not
        self.names: tuple[str, ...] = ()

    def find(self, losses: Sequence[Tensor]) -> list[Feature]:
        """This step's features, those that are known; at the first step all there are."""
        graph = trace(losses)
        found = find_features(graph, self._owners)
        if not self._owners or not {f.name for f in found} <= set(self.names):  # at first, or parameters were replaced
            owners = {id(p): layer for layer, members in by_module(self._model).items() for p in members}
            if owners != self._owners:
                self._owners = owners
                found = find_features(graph, owners)
        if not self.names:
            self._first = {f.name: f.origin for f in found}
            found = _select(found, self._wanted)
            self.names = tuple(f.name for f in found)
            if not found:
                self._warn("no feature was found at which two tasks part, so none is recorded")
        return [f for f in _under_first_names(found, self._first) if f.name in self.names]

    def explicit(self, features: Sequence[Feature], losses: Sequence[Tensor], factors: Array) -> Array:
        """(F, T, T) of this step's features by a pass through each head; see :func:`_explicit_features`."""

        def passes(_: bool) -> Array:
            with state_kept(self._model):
                return _explicit_features(features, losses, factors)

        return self._guard.passes(losses, passes, kind="features")

    def arranged(self, features: Sequence[Feature], gram: Array) -> Array:
        """Gramians of this step's features in the places of the names; NaN for one that this step lacks."""
        full = np.full((len(self.names), *gram.shape[1:]), np.nan)
        for feature, value in zip(features, gram, strict=True):
            full[self.names.index(feature.name)] = value
        return full


@dataclass(frozen=True)
class GradientLevel:
    """What a probe measures.

    Attributes:
        parameters: Gradients on the shared parameters, at due steps.
        features: Gradients at the shared features: at due steps, or at every step if parameters are measured too.
        every: Steps between due ones where the user does not say.
    """

    parameters: bool
    features: bool
    every: int


LEVELS = {
    "parameters": GradientLevel(parameters=True, features=False, every=10),
    "features": GradientLevel(parameters=False, features=True, every=1),
    "both": GradientLevel(parameters=True, features=True, every=10),
}


def level_called(name: str) -> GradientLevel:
    """The level of that name.

    Raises:
        ProbeError: There is none; says which there are.
    """
    if name not in LEVELS:
        raise ProbeError(f"level={name!r}: there are {', '.join(map(repr, LEVELS))}.")
    return LEVELS[name]
