"""Layers and their parameters by name, so that parameters that were replaced in mid-run are found again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gradprobe.errors import ProbeError
from gradprobe.probes import walk
from gradprobe.probes.checks import check_names
from gradprobe.probes.graph import Layer, SharedLayers, by_module, find_shared

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
        chosen = None if shared is None else choose(model, shared)
        self._chosen = [names.get(id(p), p) for p in chosen] if chosen is not None else None
        self.nothing = nothing
        if nothing:
            self._chosen = []
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

    @property
    def open(self) -> bool:
        """Whether any parameter counts that two tasks reach, not only chosen ones."""
        return self._chosen is None

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

    @property
    def outside(self) -> set[int]:
        """``id`` of parameters in layers that are not the model's."""
        if self._layers is None:
            return set()
        return {id(item) for members in self._layers.values() for item in members if not isinstance(item, str)}

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


def choose(model: nn.Module, shared: Shared) -> list[nn.Parameter]:
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


class Binding:
    """Remembers the shared layers by the names of their parameters.

    ``load_state_dict(assign=True)``, and moving a model with torch's overwrite-on-conversion flag, put new
    parameters into a model. A probe that held on to the old ones would go on measuring a model that nobody trains.
    """

    def __init__(self, model: nn.Module, shared: SharedLayers) -> None:
        self._model = model
        names = {id(p): name for name, p in model.named_parameters()}
        # None: a parameter from outside the model, which nothing can replace there.
        self._names = [names.get(id(p)) for p in shared.parameters]

    def replaced(self, shared: SharedLayers) -> list[str]:
        """Names of the parameters that are others now than in ``shared``.

        Raises:
            ProbeError: A parameter is gone, or has another shape.
        """
        there = {id(p) for p in walk.parameters(self._model)}
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
