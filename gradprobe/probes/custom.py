"""What in a model and its graph is not torch's own: operations, hooks on saved tensors, hooks on gradients.

Nothing is decided by it. What a check of the effect has found is given a name by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

from torch import nn
from torch.autograd.function import BackwardCFunction

from gradprobe.probes.trace import Node

_SAVED = "_raw_saved_"


def operations(nodes: Iterable[Node]) -> list[str]:
    """Names of the operations that are not torch's own, in the order in which the forward ran them."""
    found: dict[str, None] = {}
    kinds: dict[Any, None] = dict.fromkeys(map(type, nodes))
    for kind in kinds:
        name = _operation(kind)
        if name:
            found[name] = None
    return list(found)


@lru_cache(maxsize=1024)
def _operation(kind: Any) -> str:
    if issubclass(kind, BackwardCFunction):
        forward = getattr(kind, "_forward_cls", kind)
        return "" if forward.__module__.split(".")[0] == "torch" else f"{forward.__module__}.{forward.__qualname__}"
    name: str = kind.__name__
    return name if name.startswith("torch::autograd::CppNode") else ""


def unpack_hooks(nodes: Iterable[Node]) -> list[str]:
    """Names of the hooks, not torch's own, that hand out what operations saved; empty on a torch that hides them."""
    found: dict[str, None] = {}
    seen: set[int] = set()
    for node in nodes:
        kind: Any = type(node)
        for name in _saved_names(kind):
            try:
                saved = getattr(node, name)
            except RuntimeError:  # it was freed by an earlier backward
                continue
            for one in saved if isinstance(saved, tuple | list) else (saved,):
                hook = getattr(one, "unpack_hook", None)
                if hook is not None and id(hook) not in seen:
                    seen.add(id(hook))
                    owner = _module(hook)
                    if owner.split(".")[0] != "torch":
                        found[f"{owner}.{_name(hook)}"] = None
    return list(found)


@lru_cache(maxsize=1024)
def _saved_names(kind: Any) -> tuple[str, ...]:
    """The attributes of a type of operation that hold what it saved."""
    return tuple(name for name in dir(kind) if name.startswith(_SAVED))


def _plain(hook: Any) -> Any:
    return hook.func if isinstance(hook, partial) else hook


def _module(hook: Any) -> str:
    return str(getattr(_plain(hook), "__module__", "") or type(hook).__module__)


def _name(hook: Any) -> str:
    return str(getattr(_plain(hook), "__qualname__", "") or type(hook).__qualname__)


def hooked(model: nn.Module) -> list[str]:
    """The parameters and modules that carry backward hooks, which every backward pass runs."""
    found = [f"parameter {name}" for name, p in model.named_parameters() if p._backward_hooks]
    return found + [
        f"module {name or type(m).__name__}"
        for name, m in model.named_modules()
        if m._backward_hooks or m._backward_pre_hooks
    ]


def stepping(model: nn.Module) -> list[str]:
    """The parameters with a hook that runs once their gradient is accumulated, where optimizers may step."""
    return [name for name, p in model.named_parameters() if getattr(p, "_post_accumulate_grad_hooks", None)]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
