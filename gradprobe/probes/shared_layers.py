"""Layers, the shared ones among them, and what the user says of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from gradprobe.errors import ProbeError
from gradprobe.probes.graph import reached
from gradprobe.rows.limits import MAX_NAME

__all__ = ["Layer", "SharedLayers", "by_module", "find_shared"]


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

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of all layers, layer by layer: the same list at every call."""
        return [p for layer in self.layers for p in layer.parameters]


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


Shared = Iterable["str | nn.Parameter"] | Callable[[str, nn.Parameter], bool]
"""What is shared, said by the user: module names, parameters, or a predicate of name and parameter."""
Groups = Mapping[str, Iterable[nn.Parameter]]
"""Layer name -> its parameters."""


class Selection:
    """Which parameters may be measured, and how they form layers; kept by name until the first measurement.

    Args:
        model: Whose parameters they are.
        shared: None: whatever two or more tasks reach.
        layers: None: by the module that owns them.
        nothing: Choose no parameter at all.
        divided: The model is meant to share nothing, so that it is no mistake where it does not.

    Attributes:
        open: Whether any parameter counts that two tasks reach, not only chosen ones.
        outside: ``id`` of parameters in layers that are not the model's.

    Raises:
        ProbeError: ``shared`` chooses nothing; ``layers`` has a name that a file cannot hold, something that is no
            parameter, or no parameter of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: Shared | None,
        layers: Groups | None,
        *,
        nothing: bool = False,
        divided: bool = False,
    ) -> None:
        self._model = model
        self.divided = divided
        names = {id(p): name for name, p in model.named_parameters()}
        chosen = None if shared is None else _choose(model, shared)
        self._chosen = [names.get(id(p), p) for p in chosen] if chosen is not None else None
        self.nothing = nothing
        if nothing:
            self._chosen = []
        self.open = self._chosen is None
        self.outside: set[int] = set()
        self._layers = None
        if layers is not None:
            check_names("layers", layers)
            members = {layer: _parameters(layer, given) for layer, given in layers.items()}
            self._layers = {layer: [names.get(id(p), p) for p in found] for layer, found in members.items()}
            if not any(isinstance(item, str) for found in self._layers.values() for item in found):
                raise ProbeError(
                    f"layers={list(layers)} hold no parameter of this model ({type(model).__name__}, which has: "
                    f"{list(names.values())[:4]}, ...)."
                )
            self.outside = {id(item) for found in self._layers.values() for item in found if not isinstance(item, str)}

    def chosen(self) -> set[int] | None:
        """``id`` of the parameters that may count, as they stand in the model now; None: all that tasks share."""
        if self._chosen is None:
            return None
        named = dict(self._model.named_parameters())
        return {id(_now(named, item)) for item in self._chosen}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Layer name -> its parameters, as they stand in the model now."""
        if self._layers is None:
            return by_module(self._model)
        named = dict(self._model.named_parameters())
        return {layer: [_now(named, item) for item in members] for layer, members in self._layers.items()}

    def name(self, parameter: nn.Parameter) -> str:
        """What the model calls it."""
        return next((name for name, p in self._model.named_parameters() if p is parameter), "a parameter outside")

    def find(self, losses: Mapping[str, Tensor]) -> SharedLayers:
        """The shared layers as the graphs of these losses alone show them."""
        return find_shared(self.groups(), losses, self.chosen())


def _now(named: Mapping[str, nn.Parameter], item: str | nn.Parameter) -> nn.Parameter:
    return named[item] if isinstance(item, str) else item


def _parameters(layer: str, given: object) -> list[nn.Parameter]:
    members: list[Any] = list(given) if isinstance(given, Iterable) and not isinstance(given, Tensor | str) else [given]
    for item in members:
        if not isinstance(item, nn.Parameter):
            raise ProbeError(
                f"layers[{layer!r}] holds a {type(item).__name__}; give parameters: list(module.parameters())."
            )
    return members


def _choose(model: nn.Module, shared: Shared) -> list[nn.Parameter]:
    """The parameters that ``shared`` names.

    Raises:
        ProbeError: It names nothing; says what is there.
    """
    named = dict(model.named_parameters())
    chosen: dict[int, nn.Parameter] = {}
    if callable(shared):
        chosen = {id(p): p for name, p in named.items() if shared(name, p)}
    else:
        for item in [shared] if isinstance(shared, str) else shared:
            members = _below(named, item) if isinstance(item, str) else [item]
            chosen |= {id(p): p for p in members}
    if not chosen:
        raise ProbeError(f"shared={shared!r} chooses no parameter (the model has: {list(named)[:4]}, ...).")
    return list(chosen.values())


def _below(named: Mapping[str, nn.Parameter], item: str) -> list[nn.Parameter]:
    found = [p for name, p in named.items() if name == item or name.startswith(item + ".")]
    if not found:
        raise ProbeError(f"shared={item!r}: the model has no parameter there (first: {list(named)[:4]}).")
    return found


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""All but tab and line feed; and halves of surrogate pairs, which UTF-8 does not have."""


def check_names(what: str, names: Iterable[object]) -> None:
    """Raise for names with which no run file could be read again.

    Args:
        what: The argument that they are from.
        names: Of tasks or layers.

    Raises:
        ProbeError: One is no text, empty, or has control characters; says which.
    """
    for name in names:
        if not isinstance(name, str) or not name or _CONTROL.search(name):
            raise ProbeError(f"{what}: the name {name!r} must be text, not empty, and without control characters.")
        if (size := len(name.encode())) > MAX_NAME - 16:
            raise ProbeError(
                f"{what}: the name {name[:40]!r}... has {size:,} bytes; at most {MAX_NAME - 16:,} are kept."
            )
