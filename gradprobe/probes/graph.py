"""The autograd graph of a step: who reaches what, what in it is not torch's own, and letting go of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from gradprobe.errors import ProbeError

__all__ = ["reached"]


Node = Any
"""A ``grad_fn``; torch has no public type for it."""
_EXACT = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class LossGraph:
    """The graph below the losses of one step. It holds the graph alive: let go of it with the losses.

    Attributes:
        nodes: Every operation, each after all that it was computed from.
        tasks: Operation -> bit mask of the tasks whose loss depends on it.
        leaves: ``id`` of each leaf tensor -> bit mask of the tasks that reach it.
    """

    nodes: tuple[Node, ...]
    tasks: dict[Node, int]
    leaves: dict[int, int]

    def reached(self, task: int, leaves: Iterable[Tensor]) -> list[bool]:
        """Of each of some leaves, whether a task's loss depends on it."""
        return [bool(self.leaves.get(id(leaf), 0) >> task & 1) for leaf in leaves]

    @property
    def exact(self) -> bool:
        """Whether nothing in it is computed in less than float32: no half type, no autocast.

        From parameters of an exact type one gets to a shorter one only through a conversion, or inside an operation
        of the user's own: those are looked at.
        """
        kinds = {kind for kind in set(map(type, self.nodes)) if _may_convert(kind.__name__)}
        return all(
            meta.dtype in _EXACT or not meta.dtype.is_floating_point
            for node in (self.nodes if kinds else ())
            if type(node) in kinds
            for meta in getattr(node, "_input_metadata", ())
        )


def _may_convert(name: str) -> bool:
    return name.startswith("ToCopy") or not name[-1].isdecimal()  # torch's own are numbered: AddBackward0


def is_leaf(node: Node) -> bool:
    """Whether a node stands for a leaf tensor, which is then its ``variable``."""
    return type(node).__name__ == "AccumulateGrad"


def several(mask: int) -> bool:
    """Whether a bit mask names two tasks or more."""
    return mask & (mask - 1) != 0


def trace(losses: Sequence[Tensor]) -> LossGraph:
    """Walk once, whatever the number of tasks.

    Args:
        losses: (T,) with their graphs. One without a graph reaches nothing.
    """
    roots = [loss.grad_fn for loss in losses]
    nodes = _children_first([root for root in roots if root is not None])
    masks: dict[Node, int] = dict.fromkeys(nodes, 0)
    leaves = {id(loss): 1 << t for t, loss in enumerate(losses) if loss.grad_fn is None and loss.requires_grad}
    for task, root in enumerate(roots):
        if root is not None:
            masks[root] |= 1 << task
    for node in reversed(nodes):
        mask = masks[node]
        if is_leaf(node):
            leaf = id(node.variable)
            leaves[leaf] = leaves.get(leaf, 0) | mask
            continue
        for child, _ in node.next_functions:
            if child is not None:
                masks[child] |= mask
    return LossGraph(tuple(nodes), masks, leaves)


def _children_first(roots: Sequence[Node]) -> list[Node]:
    """All nodes in an order in which each comes after its ``next_functions``. Without recursion: graphs are deep."""
    order: list[Node] = []
    seen: set[Node] = set()
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(root.next_functions))]
        while stack:
            node, children = stack[-1]
            for child, _ in children:
                if child is not None and child not in seen:
                    seen.add(child)
                    stack.append((child, iter(child.next_functions)))
                    break
            else:
                order.append(node)
                stack.pop()
    return order


def reached(loss: Tensor) -> dict[int, int]:
    """The leaf tensors that a loss depends on.

    Args:
        loss: Any tensor with a graph.

    Returns:
        ``id`` of each leaf -> the sequence number of the first operation that used it. The numbers grow in the
        order in which the forward ran. Parameters behind a reentrant checkpoint are invisible here.
    """
    root = loss.grad_fn
    if root is None:
        return {id(loss): 0} if loss.requires_grad else {}
    first_use: dict[int, int] = {}
    seen = {root}
    stack = [root]
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            leaf = getattr(child, "variable", None)
            if leaf is not None:
                order = node._sequence_nr()
                first_use[id(leaf)] = min(order, first_use.get(id(leaf), order))
            elif child not in seen:
                seen.add(child)
                stack.append(child)
    return first_use


_SAVED = "_raw_saved_"
_LIVES_ON = {_SAVED + name for name in ("weight", "bias", "running_mean", "running_var")}
"""What belongs to the model: letting go of it frees nothing."""


def free_graph(graph: LossGraph) -> None:
    """Let go of all activations that a graph holds, as ``backward()`` would have, once nothing more is made from it.

    Torch frees what operations saved while a backward runs through them, and not afterwards: a graph that was kept
    lives as long as the losses do, in most loops until the next forward has run, and two steps' activations are alive
    together. But what an operation saved may be replaced at any time, by a pair of hooks. A later backward through the
    graph raises, as it does in torch.
    """
    for node in graph.nodes:
        kind: Any = type(node)
        for name in _saved_names(kind):
            if name in _LIVES_ON:
                continue
            saved = getattr(node, name)
            for one in saved if isinstance(saved, tuple | list) else (saved,):
                if one is not None:
                    _empty(one)


@lru_cache(maxsize=1024)
def _saved_names(kind: Any) -> tuple[str, ...]:
    """The attributes of a type of operation that hold what it saved."""
    return tuple(name for name in dir(kind) if name.startswith(_SAVED))


def _empty(saved: Any) -> None:
    try:
        saved.register_hooks(_nothing, _refuse)
    except RuntimeError:  # there is nothing, or somebody else's hook, who keeps what he likes, as a checkpoint does
        return


def _nothing(_: Tensor) -> None:
    return None


def _refuse(_: None) -> NoReturn:
    raise RuntimeError(
        "Trying to backward through the graph a second time: probe.backward has freed it, as backward() does. For "
        "another loss of the same forward, call its backward before, with retain_graph=True."
    )


def custom_operations(nodes: Iterable[Node]) -> list[str]:
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


def _plain(hook: Any) -> Any:
    return hook.func if isinstance(hook, partial) else hook


def _module(hook: Any) -> str:
    return str(getattr(_plain(hook), "__module__", "") or type(hook).__module__)


def _name(hook: Any) -> str:
    return str(getattr(_plain(hook), "__qualname__", "") or type(hook).__qualname__)


def hooked_names(model: nn.Module) -> list[str]:
    """The parameters and modules that carry backward hooks, which every backward pass runs."""
    found = [f"parameter {name}" for name, p in model.named_parameters() if p._backward_hooks]
    return found + [
        f"module {name or type(m).__name__}"
        for name, m in model.named_modules()
        if m._backward_hooks or m._backward_pre_hooks
    ]


def stepping_parameters(model: nn.Module) -> list[str]:
    """The parameters with a hook that runs once their gradient is accumulated, where optimizers may step."""
    return [name for name, p in model.named_parameters() if getattr(p, "_post_accumulate_grad_hooks", None)]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def reentrant_checkpoints(graph: LossGraph) -> int:
    """How many reentrant activation checkpoints there are: what is in one is in no graph before the backward runs."""
    return sum(type(node).__name__ == "CheckpointFunctionBackward" for node in graph.nodes)


def sharded_module(model: nn.Module) -> str | None:
    """Name of the first module whose parameters are sharded over processes; None where there is none."""
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        direct = {type(p).__name__ for p in module.parameters(recurse=False)}
        if kinds & {"FSDPModule", "FullyShardedDataParallel"} or direct & {"DTensor", "FlatParameter"}:
            return str(name)
    return None


def refuse(model: nn.Module, losses: Sequence[Tensor]) -> None:
    """Raise where a measurement could not see all gradients.

    Raises:
        ProbeError: Reentrant checkpoints, or sharded parameters; says where and what to do.
    """
    count = reentrant_checkpoints(trace(losses))
    if count:
        raise ProbeError(
            f"{count} reentrant activation checkpoints hide their parameters from autograd.grad, so that shared layers "
            "would be missing. Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    sharded = sharded_module(model)
    if sharded is not None:
        raise ProbeError(
            f"the parameters of {sharded or 'the model'} are sharded over processes (FSDP or DTensor), and "
            "autograd.grad gives None for them. Measure on a replicated model: DDP, or the same model on one device. "
            "Where that lacks memory for gradients, sketch=4096 with memory='low' measures one parameter at a time."
        )
