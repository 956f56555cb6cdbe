"""A model's modules, parameters and buffers without their names: what every measured step looks at.

``model.parameters()`` and its like build every name on the way, which takes milliseconds in a model of many modules.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def modules(model: nn.Module) -> list[nn.Module]:
    """Each module once, the model first."""
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
