"""Layers of a trunk by their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from gradprobe.errors import UsageError


def after(layers: Sequence[str], last: str) -> tuple[str, ...]:
    """The layers behind the last one at or below the module ``last``; all where ``last`` is empty.

    Raises:
        UsageError: No layer is called so; lists the near ones.
    """
    if not last:
        return tuple(layers)
    chosen = at_or_below(layers, [last], "--share-until")
    return tuple(layers[layers.index(chosen[-1]) + 1 :])


def at_or_below(layers: Sequence[str], names: Iterable[str], flag: str) -> tuple[str, ...]:
    """The layers at or below some modules, in the order of ``layers``.

    Raises:
        UsageError: There is none at one of the names; lists the near ones.
    """
    chosen: set[str] = set()
    for name in names:
        found = [layer for layer in layers if layer == name or layer.startswith(name + ".")]
        if not found:
            parts = {".".join(layer.split(".")[:n]) for layer in layers for n in range(2, layer.count(".") + 2)}
            near = get_close_matches(name, sorted(parts), n=3, cutoff=0.5) or list(layers[:3])
            raise UsageError(f"{flag} {name!r}: the trunk has no such layer (near: {', '.join(near)}).")
        chosen.update(found)
    return tuple(layer for layer in layers if layer in chosen)
