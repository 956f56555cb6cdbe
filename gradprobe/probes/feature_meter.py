"""Measures at the features of one step, by hooks in the joint backward or by a pass through each head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor, nn

from gradprobe.measures import Array
from gradprobe.probes.features import Feature, Origin, explicit_features, find_features, select, under_first_names
from gradprobe.probes.graph import by_module
from gradprobe.probes.guard import Guard
from gradprobe.probes.state import state_kept
from gradprobe.probes.trace import trace


class FeatureMeter:
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
        self._first: dict[str, Origin] = {}  # of all features at the first step, wanted or not
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
            found = select(found, self._wanted)
            self.names = tuple(f.name for f in found)
            if not found:
                self._warn("no feature was found at which two tasks part, so none is recorded")
        return [f for f in under_first_names(found, self._first) if f.name in self.names]

    def explicit(self, features: Sequence[Feature], losses: Sequence[Tensor], factors: Array) -> Array:
        """(F, T, T) of this step's features by a pass through each head; see :func:`explicit_features`."""

        def passes(_: bool) -> Array:
            with state_kept(self._model):
                return explicit_features(features, losses, factors)

        return self._guard.passes(losses, passes, kind="features")

    def arranged(self, features: Sequence[Feature], gram: Array) -> Array:
        """Gramians of this step's features in the places of the names; NaN for one that this step lacks."""
        full = np.full((len(self.names), *gram.shape[1:]), np.nan)
        for feature, value in zip(features, gram, strict=True):
            full[self.names.index(feature.name)] = value
        return full
