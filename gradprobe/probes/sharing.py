"""Which layers are shared, as it becomes known: by the graph of every measured step, and by the gradients themselves.

A graph says where a gradient may come. It says too much where losses come out of one vector, and too little at a step
at which a layer is frozen, left out by chance, or used by another expert. So every step's graph is looked at, layers
join at the end as they become shared, and a layer counts once two tasks have had a gradient other than 0 on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from gradprobe import measures
from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.graph import LossGraph, Node, is_leaf, reached, refuse, several
from gradprobe.probes.shared_layers import Layer, Selection, SharedLayers
from gradprobe.probes.state import parameters_of
from gradprobe.processes import OneProcess

_Place = tuple[str, int]
"""A parameter by the name of its layer and its place among the layer's, which are the same in all processes."""
_SURE = 2
"""Rows after which a layer on which no second task has had a gradient is said to be shared by the graph alone: layers
that begin at 0 have their first gradient at the second step."""
_MUCH = 0.1
"""Share of a task's squared norm over all shared layers from which on it is said that a layer may be no layer."""


@dataclass
class _Found:
    """What graphs have shown of one parameter.

    Attributes:
        tasks: Bit mask of those whose loss depends on it.
        order: When the forward used it first, among the others.
        weighs: Whether it only weighs losses, see :mod:`gradprobe.probes.sharing`.
    """

    tasks: int
    order: int
    weighs: bool = False


@dataclass
class Sharing:
    """The shared layers of a model.

    Attributes:
        model, selection, ranks: Whose; which of its parameters count; the processes that train it.
        tasks: T, how many.
        warn: Told what the user should know.
        shared: None before the first look.
        weights: Names of learned loss weights, which are no layers.
        joined: Whether the last look has changed the layers.
        changed: Whether the last row has changed who reaches what.
    """

    model: nn.Module
    selection: Selection
    ranks: OneProcess
    tasks: int
    warn: Callable[[str], None]
    shared: SharedLayers | None = None
    weights: tuple[str, ...] = ()
    joined: bool = False
    changed: bool = False
    _found: dict[_Place, _Found] = field(default_factory=dict)
    _known: dict[int, int] = field(default_factory=dict)  # id of a parameter -> tasks that are known to reach it
    _members: dict[str, set[int]] = field(default_factory=dict)  # layer, in the order of the file -> places
    _binding: _Binding | None = None

    def __post_init__(self) -> None:
        self._effect: NDArray[np.bool_] = np.zeros((0, self.tasks), dtype=bool)
        self._by_graph = self._effect  # (L, T)
        self._rows: list[int] = []  # that were measured since each layer has joined
        self._told: set[str] = set()
        self._hidden: set[_Place] = set()  # that may be learned loss weights in a compiled region
        self._doubtful: list[str] = []

    # ---- what the graphs show

    def look(self, losses: Mapping[str, Tensor], graph: LossGraph) -> SharedLayers:
        """The shared layers at this step, those of earlier ones among them, with parameters that were replaced.

        Args:
            losses: In the order of the tasks.
            graph: Of these losses.

        Raises:
            ProbeError: A parameter is gone, has another shape, or hides its gradient.
        """
        there = {id(p) for p in parameters_of(self.model)}
        self._follow(losses, there)
        fresh = {leaf: mask for leaf, mask in graph.leaves.items() if mask & ~self._known.get(leaf, 0)}
        fresh = {leaf: fresh[leaf] for leaf in fresh.keys() & (there | self.selection.outside)}
        first, weights = self.shared is None, self.weights
        self.joined = self.ranks.any(first or bool(fresh)) and self._learn(losses, graph, first)
        assert self.shared is not None
        if not (self.shared.layers or self.selection.nothing or self.selection.divided) and self._all_seen:
            self.warn(
                "no two tasks reach a parameter in common that is trained, so there is nothing to measure yet. Layers "
                "are measured from the step on at which they are shared; gradprobe.doctor tells more"
            )
        if self.weights != weights:
            self.warn(
                f"{', '.join(map(repr, self.weights))} only weigh losses, and no feature depends on them: "
                "learned weights are no shared layer, and are left out"
            )
        return self.shared

    def _follow(self, losses: Mapping[str, Tensor], there: set[int]) -> None:
        """Go on with the parameters that have taken the place of others; ``there``: ``id`` of the model's."""
        if self.shared is None or self._binding is None:
            return
        names = self._binding.replaced(self.shared, there)
        if not names:
            return
        refuse(self.model, list(losses.values()))  # they may be shards now
        self.shared = self._binding.again(self.shared)
        self._remember()
        self.warn(
            f"{len(names)} shared parameters were replaced, {names[0]!r} first; the probe goes on with "
            "the new ones. An optimizer made before still updates the old ones: make it anew"
        )

    @property
    def _all_seen(self) -> bool:
        """Whether every task has reached something."""
        return all(any(found.tasks >> task & 1 for found in self._found.values()) for task in range(self.tasks))

    def _learn(self, losses: Mapping[str, Tensor], graph: LossGraph, first: bool) -> bool:
        """Take in what this step's graphs show, in all processes; whether layers have changed."""
        groups = self.selection.groups()
        places = _places(groups)
        sizes = {id(p): p.numel() for members in groups.values() for p in members if id(p) in graph.leaves}
        weighing = loss_weights(graph, sizes) if self.selection.open else set()
        if self.selection.open:
            self._hidden |= {places[leaf] for leaf in _hidden_weights(graph, sizes, self.tasks)}
        uses = [reached(loss) for loss in losses.values()]
        own = {
            places[leaf]: _Found(mask, min(use[leaf] for use in uses if leaf in use), leaf in weighing)
            for leaf, mask in graph.leaves.items()
            if leaf in places
        }
        for other in self.ranks.gathered(own):
            for place, found in other.items():
                known = self._found.setdefault(place, found)
                known.tasks |= found.tasks
                known.weighs &= found.weighs
        before = {layer: set(members) for layer, members in self._members.items()}
        joining = self._joining(groups, places)
        # A compiled region uses all of its parameters at once: those are in the order of the model.
        for place in sorted((place for place in places.values() if place in joining), key=self._order):
            self._members.setdefault(place[0], set()).add(place[1])
        self._build(groups)
        return first or before != self._members

    def _joining(self, groups: Mapping[str, list[nn.Parameter]], places: Mapping[int, _Place]) -> set[_Place]:
        trained = {place for leaf, place in places.items() if groups[place[0]][place[1]].requires_grad}
        chosen = self.selection.chosen()
        if chosen is not None:
            return {place for leaf, place in places.items() if leaf in chosen and place in trained}
        shared = {place for place, found in self._found.items() if several(found.tasks)}
        weighing = {place for place in shared if self._found[place].weighs}
        self.weights = tuple(self.selection.name(groups[layer][at]) for layer, at in sorted(weighing))
        return (shared - weighing) & trained

    def _order(self, place: _Place) -> int:
        return self._found[place].order if place in self._found else 1 << 62

    def _build(self, groups: Mapping[str, list[nn.Parameter]]) -> None:
        layers = tuple(Layer(name, tuple(groups[name][at] for at in sorted(at))) for name, at in self._members.items())
        grown = len(layers) - len(self._effect)
        self._effect = np.vstack([self._effect, np.zeros((grown, self.tasks), dtype=bool)])
        self._rows += [0] * grown
        self._by_graph = np.array([self._tasks_of(*layer) for layer in self._members.items()], dtype=bool).reshape(
            len(layers), self.tasks
        )
        self.shared = SharedLayers(layers, self._reach())
        self._binding = _Binding(self.model, self.shared)
        self._remember()

    def _remember(self) -> None:
        places = _places(self.selection.groups())
        self._known = {leaf: self._found[place].tasks for leaf, place in places.items() if place in self._found}

    # ---- what the gradients show

    def row(self, gram: Array) -> NDArray[np.bool_]:
        """Whose gradient counts on which layer in a row that was measured, which adds to what is known.

        Args:
            gram: (L, T, T); NaN where a task brought no gradient, infinite where one is not finite.

        Returns:
            (L, T), see :func:`gradprobe.measures.counted`.
        """
        with np.errstate(invalid="ignore"):
            norms = measures.norm(gram)
        result: NDArray[np.bool_] = measures.counted(norms[None], before=self._effect)[0]
        effect = self._effect | ((norms > 0) & np.isfinite(norms))
        for layer, known in enumerate(norms):  # of a row that overflowed nothing is known
            self._rows[layer] += int(np.isfinite(known).any() and not np.isinf(known).any())
        self.changed = self.shared is not None and bool((effect != self._effect).any())
        self._effect = effect
        self._doubt(np.where(result, norms, 0.0))
        if self.shared is not None and self.changed:
            self.shared = replace(self.shared, reach=self._reach())
        self.tell()
        return result

    def tell(self, *, last: bool = False) -> None:
        """Say once of layers that they are shared by the graph alone, or may be learned loss weights.

        Args:
            last: No further row will come, so that what is known must do.
        """
        doubtful, self._doubtful = self._doubtful, []
        if doubtful:
            self.warn(
                f"{', '.join(map(repr, doubtful))} may only weigh losses: so few numbers with so long a gradient often "
                "do, and a compiled region hides what is done with them. They count as shared; if they are learned "
                "weights, the cosines over all shared layers are mostly theirs: leave them out by shared="
            )
        names = self._shared_by_graph_alone(_SURE if not last else 1)
        self._told.update(names)
        if names:
            listed = ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            self.warn(
                f"{listed}: shared by the graph alone, since only one task has had a gradient other than 0 there. Kept "
                "in the file, and left out of every sum over shared layers until a second task has one"
            )

    def _shared_by_graph_alone(self, rows: int) -> list[str]:
        """Layers that only graphs call shared after so many rows, and of which nothing was said."""
        if self.shared is None or not self.selection.open:
            return []
        seen = self._effect.any(axis=0)
        by_graph = self._by_graph[:, seen].sum(axis=1) >= 2
        # Where no task has had one yet (a scale without boxes, an expert that idles) nothing is known.
        alone = by_graph & (self._effect.sum(axis=1) == 1)
        return [
            layer.name
            for layer, here, measured in zip(self.shared.layers, alone, self._rows, strict=True)
            if here and measured >= rows and layer.name not in self._told
        ]

    def _doubt(self, norms: Array) -> None:
        """(L, T), 0 where none counts."""
        if not self._hidden:
            return
        squares = np.nan_to_num(norms, posinf=0.0) ** 2
        much = (squares > _MUCH * squares.sum(axis=0)).any(axis=1)
        for (name, members), here in zip(self._members.items(), much, strict=True):
            if here and name not in self._told and all((name, at) in self._hidden for at in members):
                self._told.add(name)
                self._doubtful.append(name)

    def proven(self, task: int) -> bool:
        """Whether a task has had a gradient other than 0 on every layer that its graphs lead to.

        Where it has not, a difference of two gradients would be rounding instead of 0.
        """
        return bool((self._effect[:, task] | ~self._by_graph[:, task]).all())

    def _tasks_of(self, layer: str, members: Iterable[int]) -> list[bool]:
        """(T,) which tasks' graphs lead to some parameters of a layer."""
        mask = 0
        for at in members:
            mask |= self._found[layer, at].tasks if (layer, at) in self._found else 0
        return [bool(mask >> task & 1) for task in range(self.tasks)]

    def _reach(self) -> tuple[tuple[bool, ...], ...]:
        """By effect; of a task that has had no gradient other than 0 anywhere, by the graphs."""
        found = np.where(self._effect.any(axis=0), self._effect, self._by_graph)
        return tuple(tuple(bool(there) for there in row) for row in found)

    # ---- going on

    def state_dict(self) -> dict[str, Any]:
        """What a later one needs to go on: plain values."""
        return {
            "layers": [[name, sorted(members)] for name, members in self._members.items()],
            "found": [[*place, found.tasks, found.order, found.weighs] for place, found in self._found.items()],
            "effect": self._effect.tolist(),
            "rows": list(self._rows),
            "told": sorted(self._told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped; layers that have joined here since then stay."""
        held = {name: set(members) for name, members in state["layers"]}
        groups = self.selection.groups()
        if any(name not in groups or max(members, default=0) >= len(groups[name]) for name, members in held.items()):
            return  # of another model: what is shared in this one is yet to be seen
        later = {name: members for name, members in self._members.items() if name not in held}
        self._members = {**{name: members | self._members.get(name, set()) for name, members in held.items()}, **later}
        for layer, at, tasks, order, weighs in state["found"]:
            self._found[layer, at] = _Found(tasks, order, weighs)
        effect = np.array(state["effect"], dtype=bool).reshape(len(held), self.tasks)
        self._effect = np.vstack([effect, np.zeros((len(later), self.tasks), dtype=bool)])
        self._rows = [*state["rows"], *[0] * len(later)]
        self._told = set(state["told"])
        self._build(groups)


def _places(groups: Mapping[str, Iterable[nn.Parameter]]) -> dict[int, _Place]:
    """``id`` of a parameter -> where it stands; one of two groups (tied weights) counts in the first."""
    places: dict[int, _Place] = {}
    for layer, members in groups.items():
        for at, parameter in enumerate(members):
            places.setdefault(id(parameter), (layer, at))
    return places


class _Binding:
    """Remembers the shared layers by the names of their parameters.

    ``load_state_dict(assign=True)``, and moving a model with torch's overwrite-on-conversion flag, put new
    parameters into a model. A probe that held on to the old ones would go on measuring a model that nobody trains.
    """

    def __init__(self, model: nn.Module, shared: SharedLayers) -> None:
        self._model = model
        names = {id(p): name for name, p in model.named_parameters()}
        # None: a parameter from outside the model, which nothing can replace there.
        self._names = [names.get(id(p)) for p in shared.parameters]

    def replaced(self, shared: SharedLayers, there: set[int]) -> list[str]:
        """Names of the parameters that are others now than in ``shared``.

        Args:
            shared: As they were.
            there: ``id`` of the parameters that stand in the model now.

        Raises:
            ProbeError: A parameter is gone, or has another shape.
        """
        if all(id(p) in there for p, name in zip(shared.parameters, self._names, strict=True) if name is not None):
            return []
        now = dict(self._model.named_parameters())
        changed = []
        for name, old in zip(self._names, shared.parameters, strict=True):
            if name is None or now.get(name) is old:
                continue
            if name not in now:
                raise ProbeError(
                    f"the shared parameter {name!r} is no longer in the model. A probe keeps the layers that it began "
                    "with: close it, and attach a new one to the changed model."
                )
            if now[name].shape != old.shape:
                raise ProbeError(
                    f"the shared parameter {name!r} had shape {tuple(old.shape)} and has {tuple(now[name].shape)} now. "
                    "A probe keeps the layers that it began with: close it, and attach a new one."
                )
            changed.append(name)
        return changed

    def again(self, shared: SharedLayers) -> SharedLayers:
        """The same layers with the parameters that stand in the model now."""
        now = dict(self._model.named_parameters())
        found = iter(
            old if name is None else now[name] for name, old in zip(self._names, shared.parameters, strict=True)
        )
        layers = tuple(Layer(la.name, tuple(next(found) for _ in la.parameters)) for la in shared.layers)
        return replace(shared, layers=layers)


_FEW = 64
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


def loss_weights(graph: LossGraph, size: Mapping[int, int]) -> set[int]:
    """Learned weights of losses inside a model: parameters on which no feature depends.

    Every task's loss has a gradient on a log-variance or a softmax weight, often long and opposed, though no task
    learns anything there of what the others learn: counted among the shared layers, it drowns the trunk. Such a
    parameter is known by what is done with it, from the losses down: only sums, products and selections, up to where a
    function of the parameter alone meets a loss, which is something that other parameters make.

    Args:
        graph: Of one step.
        size: ``id`` of each parameter that is in question -> how many numbers it has.

    Returns:
        Their ``id``. Those that a compiled region hides are given by :func:`hidden`.
    """
    if not any(0 < numbers <= _FEW for leaf, numbers in size.items() if leaf in graph.leaves):
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
    return {leaf for leaf in met - used_otherwise if size.get(leaf, _FEW + 1) <= _FEW}


def _hidden_weights(graph: LossGraph, size: Mapping[int, int], most: int) -> set[int]:
    """``id`` of the parameters that may weigh losses within a compiled region, where it cannot be seen.

    Args:
        graph, size: As for :func:`loss_weights`.
        most: Numbers that such a parameter has at most.
    """
    inputs = [child for node in graph.nodes if _kind(node) in _HIDING for child, _ in node.next_functions]
    leaves = {id(child.variable) for child in inputs if child is not None and is_leaf(child)}
    return {leaf for leaf in leaves if 0 < size.get(leaf, 0) <= most}


def _below(graph: LossGraph, size: Mapping[int, int]) -> dict[Node, _Below]:
    found: dict[Node, _Below] = {}
    for node in graph.nodes:  # each after what it was computed from
        if is_leaf(node):
            leaf = id(node.variable)
            found[node] = _Below({leaf}, size.get(leaf, _FEW + 1) <= _FEW)
            continue
        children = [found[child] for child, _ in node.next_functions if child is not None]
        leaves = set().union(*(child.leaves for child in children))
        plain = bool(children) and all(child.plain for child in children) and _makes_weights(_kind(node))
        found[node] = _Below(leaves, plain and _numbers(node) <= sum(size[leaf] for leaf in leaves))
    return found


def _tail(graph: LossGraph) -> tuple[set[Node], list[Node]]:
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
    return max((_product(shape) for shape in shapes), default=_FEW + 1)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= int(length)
    return total
