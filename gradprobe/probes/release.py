"""Frees the graph of a step as ``backward()`` would have, once the derived gradient was checked on it.

Torch frees what operations saved while a backward runs through them, and not afterwards: a graph that was kept lives as
long as the losses do, in most loops until the next forward has run, and two steps' activations are alive together. But
what an operation saved may be replaced at any time, by a pair of hooks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NoReturn

from torch import Tensor

from gradprobe.probes.trace import Trace

_SAVED = "_raw_saved_"
_LIVES_ON = {_SAVED + name for name in ("weight", "bias", "running_mean", "running_var")}
"""What belongs to the model: letting go of it frees nothing."""


def release(graph: Trace) -> None:
    """Let go of all activations that the graph holds. A later backward through it raises, as it does in torch."""
    for node in graph.nodes:
        kind: Any = type(node)
        for name in _names(kind):
            saved = getattr(node, name)
            for one in saved if isinstance(saved, tuple | list) else (saved,):
                if one is not None:
                    _empty(one)


@lru_cache(maxsize=1024)
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith(_SAVED) and name not in _LIVES_ON)


def _empty(saved: Any) -> None:
    try:
        saved.register_hooks(_nothing, _refuse)
    except (
        RuntimeError
    ):  # there is nothing, or a hook of somebody else's, who keeps what he likes, as a checkpoint does
        return


def _nothing(_: Tensor) -> None:
    return None


def _refuse(_: None) -> NoReturn:
    raise RuntimeError(
        "Trying to backward through the graph a second time: probe.backward has freed it, as backward() does. For "
        "another loss of the same forward, call its backward before, with retain_graph=True."
    )
