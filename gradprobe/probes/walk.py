"""A model's modules, parameters and buffers without their names: what every measured step looks at.

``model.parameters()`` and its like build every name on the way, which takes milliseconds in a model of many modules.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class _Held(threading.local):
    def __init__(self) -> None:
        self.modules: dict[int, list[nn.Module]] = {}


_held = _Held()


@contextmanager
def once(model: nn.Module) -> Iterator[None]:
    """Within it the modules of a model are walked through once; a measured row asks for them ten times."""
    _held.modules[id(model)] = []
    try:
        yield
    finally:
        _held.modules.pop(id(model), None)


def modules(model: nn.Module) -> list[nn.Module]:
    """Each module once, the model first."""
    held = _held.modules.get(id(model))
    if held is None:
        return _modules(model)
    if not held:
        held += _modules(model)
    return held


def _modules(model: nn.Module) -> list[nn.Module]:
    found = {id(model): model}
    stack = [model]
    while stack:
        for child in stack.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                stack.append(child)
    return list(found.values())


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Each parameter, a tied one as often as it is registered."""
    return (p for m in modules(model) for p in m._parameters.values() if p is not None)


def buffers(model: nn.Module) -> Iterator[Tensor]:
    """Each buffer, one that is registered twice as often."""
    return (b for m in modules(model) for b in m._buffers.values() if b is not None)
