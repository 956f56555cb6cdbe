"""Checks of the losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradprobe.probes.doctor.finding import Finding, Patient
from gradprobe.probes.gramian import vector
from gradprobe.probes.graph import Node, custom_operations, is_leaf, reentrant_checkpoints, several, some, unpack_hooks
from gradprobe.probes.shared_layers import by_module
from gradprobe.probes.state import state_kept
from gradprobe.processes import remember_wrapper


def faulty(patient: Patient) -> Iterator[Finding]:
    """Losses without a gradient to measure."""
    for task, fault in patient.faults.items():
        yield Finding("error", "loss", "", f"the loss of task {task!r} {fault}", "Until then it cannot be measured.")


def sharing_nothing(patient: Patient) -> Iterator[Finding]:
    """A task that has no parameter in common with another has nothing to interfere with."""
    if reentrant_checkpoints(patient.graph):
        return  # what it shares may be hidden there, and is reported there
    own = {id(p) for p in patient.model.parameters()}
    shared = 0
    for leaf, mask in patient.graph.leaves.items():
        shared |= mask if leaf in own and several(mask) else 0
    for place, task in enumerate(patient.tasks):
        if not shared >> place & 1:
            yield Finding(
                "error",
                "shares_nothing",
                "",
                f"task {task!r} shares no parameter of the model with another task, so there is nothing to measure.",
                "Check that its loss comes from this model's output, and that the trunk is not frozen or detached.",
            )


def shared_by_the_graph_alone(patient: Patient) -> Iterator[Finding]:
    """Losses out of one vector seem to reach each other's heads, with gradients of exactly 0."""
    remember_wrapper(patient.model, patient.graph.nodes)
    if custom_operations(patient.graph.nodes) or unpack_hooks(patient.graph.nodes):
        return  # a pass might use up the forward, or change something
    layers = {
        layer: [p for p in members if several(patient.graph.leaves.get(id(p), 0))]
        for layer, members in by_module(patient.model).items()
    }
    reached: dict[str, set[str]] = {layer: set() for layer, members in layers.items() if members}
    for task, loss in patient.losses.items():
        for layer, moves in _moves(patient.model, loss, layers).items():
            reached[layer] |= {task} if moves else set()
    alone = [layer for layer, tasks in reached.items() if len(tasks) == 1]
    if alone:
        yield Finding(
            "note",
            "graph_alone",
            alone[0],
            f"only one task has a gradient other than 0 on {some(alone)}, though the graph leads several there (losses "
            "out of one vector, heads that are concatenated, a sum of zeros).",
            "Nothing to do: a probe leaves such layers out of every sum over shared layers.",
        )


def _moves(model: nn.Module, loss: Tensor, layers: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, bool]:
    """Layer -> whether a loss has a gradient other than 0 on it; nothing where that cannot be told."""
    parameters = [p for members in layers.values() for p in members]
    try:
        with state_kept(model):
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if parameters else ()
    except RuntimeError:  # compiled, or freed: other checks tell
        return {}
    left = iter(found)
    own = {layer: [next(left) for _ in members] for layer, members in layers.items() if members}
    return {layer: any(g is not None and bool(vector(g).any()) for g in gradients) for layer, gradients in own.items()}


def counted_twice(patient: Patient) -> Iterator[Finding]:
    """One loss that is part of another: its gradient is in both, and they seem to agree."""
    above: dict[tuple[Node, int], int] = {}
    for node in patient.graph.nodes:
        for edge in node.next_functions if not is_leaf(node) else ():
            if edge[0] is not None:
                above[edge] = above.get(edge, 0) | patient.graph.tasks[node]
    roots = {task: (loss.grad_fn, loss.output_nr) for task, loss in patient.losses.items()}
    for i, (task, root) in enumerate(roots.items()):
        for j, (other, its_root) in enumerate(roots.items()):
            same = root == its_root and i < j
            if i != j and root[0] is not None and (same or (root != its_root and above.get(root, 0) >> j & 1)):
                yield Finding(
                    "error",
                    "counted_twice",
                    "",
                    f"the loss of task {task!r} is "
                    + (f"also that of task {other!r}" if same else f"part of that of task {other!r}")
                    + ": its gradient is in both, so that they seem to agree, and the joint step counts it twice.",
                    "Give each task a loss of its own, without totals.",
                )


def scaled(patient: Patient) -> Iterator[Finding]:
    """A loss multiplied by a GradScaler's scale, or by the number of samples."""
    size = patient.batch_size
    for task, loss in patient.losses.items():
        factors = {abs(term.whole) for term in _terms(loss.grad_fn)}
        for factor in sorted(factors):
            if _is_scale(factor) or (size > 1 and _is_scale(factor / size)):
                yield Finding(
                    "warning",
                    "grad_scaler",
                    "",
                    f"the loss of task {task!r} is multiplied by {factor:g}, as a GradScaler does: norms come out that "
                    "much too large, and change with the scale.",
                    "Give the probe the unscaled loss, and the scaler as scaler=.",
                )
            elif size > 1 and factor == size:
                yield Finding(
                    "warning",
                    "batch_scaled",
                    "",
                    f"the loss of task {task!r} is multiplied by {factor:g}, which is the batch size: its gradient "
                    "grows with the batch, and its norm cannot be compared between batch sizes or with a mean loss.",
                    "Divide it by the batch size.",
                )


def summed_over_the_batch(patient: Patient) -> Iterator[Finding]:
    """A loss that is a sum over the samples."""
    size = patient.batch_size
    for task, loss in patient.losses.items():
        summed = [t for t in _terms(loss.grad_fn) if t.summed[:1] == (size,) and not t.divided and abs(t.factor) >= 1]
        if size > 1 and summed:
            yield Finding(
                "warning",
                "batch_scaled",
                "",
                f"the loss of task {task!r} is a sum over the {size} samples of the batch: its gradient grows with the "
                "batch, and its norm cannot be compared between batch sizes or with a mean loss.",
                "Take the mean over the samples.",
            )


@dataclass(frozen=True)
class _Term:
    """One of the terms that a loss is the sum of.

    Attributes:
        factor: The constants that it is multiplied by.
        whole: Those of them that the loss as a whole is multiplied by, before it falls into terms.
        divided: Whether it is divided by something that may be a count.
        summed: Shape of what a sum reduced to it; () where no sum did.
    """

    factor: float
    whole: float
    divided: bool
    summed: tuple[int, ...]


_AS_IT_IS = {"View", "UnsafeView", "Reshape", "ReshapeAlias", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "Alias"}
_TERMS = {"Add", "Sub", "Neg", "Stack", "Cat"}


def _terms(root: Node | None) -> list[_Term]:
    """The terms of a loss, as far as they are made by sums and constants; what else it is made of is left alone."""
    found: list[_Term] = []
    pending: list[tuple[Node | None, float, float | None, bool]] = [(root, 1.0, None, False)]
    while pending and len(found) < 100:
        node, factor, whole, divided = pending.pop()
        if node is None or is_leaf(node) or _numbers(node) != 1:
            continue
        kind = type(node).__name__.split("Backward")[0]
        children = [(slot, child) for slot, (child, _) in enumerate(node.next_functions) if child is not None]
        if kind in _TERMS and len(children) > 1 and whole is None:
            whole = factor
        if kind in _TERMS or (kind in _AS_IT_IS and len(children) == 1) or _of_one_number(kind, children):
            pending += [(child, factor, whole, divided) for _, child in children]
        elif kind in ("Mul", "Div") and len(children) == 1:
            slot, child = children[0]
            constant = _constant(node, slot)
            if constant and kind == "Mul":
                pending.append((child, factor * constant, whole, divided or abs(constant) < 1))
            elif constant and slot == 0:
                pending.append((child, factor / constant, whole, True))
        else:
            found.append(_Term(factor, factor if whole is None else whole, divided, _summed(node, kind, children)))
    return found


def _of_one_number(kind: str, children: list[tuple[int, Node]]) -> bool:
    """Whether it is a sum or mean that has nothing to sum."""
    return kind in ("Sum", "Mean") and len(children) == 1 and _numbers(children[0][1]) == 1


def _numbers(node: Node) -> int:
    return math.prod(Patient.shape(node)) if getattr(node, "_input_metadata", None) else 0


def _constant(node: Node, slot: int) -> float | None:
    """The other operand, where it is one number without a gradient."""
    value = getattr(node, "_saved_other" if slot == 0 else "_saved_self", None)
    if value is None or getattr(value, "numel", lambda: 1)() != 1:
        return None
    return float(value)


def _summed(node: Node, kind: str, children: list[tuple[int, Node]]) -> tuple[int, ...]:
    if kind == "Sum" and children:
        below = children[0][1]
        return () if is_leaf(below) or type(below).__name__.startswith("Mean") else Patient.shape(below)
    if getattr(node, "_saved_reduction", None) == 2:  # what torch's losses call "sum"
        return Patient.shape(children[0][1]) if children and not is_leaf(children[0][1]) else ()
    return ()


def _is_scale(factor: float) -> bool:
    """Whether a GradScaler may have made it: it begins with 2^16 and goes by powers of two."""
    return math.isfinite(factor) and factor >= 2**8 and math.frexp(factor)[0] == 0.5
