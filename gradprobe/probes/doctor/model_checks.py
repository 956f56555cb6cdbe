"""Checks of the model and of what its backward runs: one function each, from what it looks at to what it says."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm

from gradprobe.probes.doctor.finding import Finding, Patient, below
from gradprobe.probes.feature_gradients import Feature
from gradprobe.probes.graph import (
    custom_operations,
    reentrant_checkpoints,
    several,
    sharded_module,
    some,
    stepping_parameters,
    unpack_hooks,
)
from gradprobe.probes.sharing import loss_weights
from gradprobe.probes.state import state_kept


def compiled(patient: Patient) -> Iterator[Finding]:
    """A compiled region is one operation to autograd, and may give its buffers away in its first backward."""
    parts = [
        name
        for name, module in patient.model.named_modules()
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
    ]
    if not parts and not patient.nodes("CompiledFunctionBackward"):
        return
    donated = bool(getattr(torch._functorch.config, "donated_buffer", False))
    yield Finding(
        "error" if donated else "warning",
        "compiled",
        parts[0] if parts else "",
        "is compiled. "
        + (
            "Once an ordinary backward has run, its backward may give buffers away; a second pass over the graph then "
            "fails, and no row is measured. "
            if donated
            else "Every parameter of a compiled region looks reached by every task that uses the region; a task that "
            "does not use one shows an exactly zero gradient there. "
        ),
        "Attach the probe to the uncompiled model"
        + (", or set torch._functorch.config.donated_buffer = False before compiling." if donated else "."),
    )


def behind_reentrant_checkpoints(patient: Patient) -> Iterator[Finding]:
    """What a reentrant checkpoint recomputes is not in the graph before the backward runs."""
    count = reentrant_checkpoints(patient.graph)
    if count:
        hidden = [
            n for n, p in patient.model.named_parameters() if p.requires_grad and id(p) not in patient.graph.leaves
        ]
        yield Finding(
            "error",
            "reentrant_checkpoint",
            hidden[0].rpartition(".")[0] if hidden else "",
            f"{count} reentrant activation checkpoints hide {len(hidden)} parameters from autograd.grad; a probe "
            "refuses such a model.",
            "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False).",
        )


def sharded(patient: Patient) -> Iterator[Finding]:
    """Sharded parameters are no leaves of the graph that the forward makes."""
    name = sharded_module(patient.model)
    if name is not None:
        yield Finding(
            "error",
            "sharded",
            name,
            "has parameters that are sharded over processes (FSDP or DTensor): autograd.grad gives None for them, and "
            "hooks on them never fire; a probe refuses such a model.",
            "Measure on a replicated model: DDP, or the same model on one device with a smaller batch.",
        )


def data_parallel(patient: Patient) -> Iterator[Finding]:
    """DDP: what its modes do to a measurement."""
    for name, module in patient.model.named_modules():
        if isinstance(module, nn.DataParallel):
            yield Finding(
                "warning",
                "data_parallel",
                name,
                "is nn.DataParallel: its copies are made anew in each forward, and BatchNorm keeps the first one's.",
                "Use DistributedDataParallel, or one device.",
            )
        if not isinstance(module, nn.parallel.DistributedDataParallel):
            continue
        modes = [m for m in ("find_unused_parameters", "static_graph") if getattr(module, m, False)]
        if modes:
            yield Finding(
                "warning",
                "data_parallel",
                name,
                f"is DDP with {' and '.join(modes)}: every parameter may look reached by every task; one that is not "
                "shows an exactly zero gradient.",
                f"Turn {modes[0]} off if all parameters are used at every step.",
            )
        yield Finding(
            "note",
            "data_parallel",
            name,
            "is DDP: a probe attached to it measures the average over its processes, and one attached to "
            "the module inside measures this process's own gradients.",
            "Attach the probe to the DDP model in every process; the first one writes.",
        )


def own_hooks(patient: Patient) -> Iterator[Finding]:
    """The user's own backward hooks run in every pass, so once per task and measured step more."""
    parts = [f"parameter {n}" for n, p in patient.model.named_parameters() if p._backward_hooks]
    parts += [f"module {n}" for n, m in patient.model.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    if parts:
        yield Finding(
            "warning",
            "own_hooks",
            parts[0].split(" ", 1)[1],
            f"has a backward hook of its own ({len(parts)} in all: {', '.join(parts[:3])}): it fires once per task at "
            "measured steps, what it changes is measured changed, and no task is derived from the joint backward.",
            "Take it off, or make sure that it keeps no state and is meant to act on each task's gradient.",
        )


def sparse_gradients(patient: Patient) -> Iterator[Finding]:
    """Sparse gradients are made dense to be multiplied."""
    for name, module in patient.model.named_modules():
        if getattr(module, "sparse", False) is True and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield Finding(
                "warning",
                "sparse",
                name,
                "has sparse gradients, which are made dense to be multiplied: right, but each takes "
                f"{module.weight.numel() * module.weight.element_size() / 2**20:.1f} MiB.",
                "Leave it out with shared=..., or set sparse=False.",
            )


def complex_parameters(patient: Patient) -> Iterator[Finding]:
    """Complex parameters count as pairs of real ones."""
    names = [name for name, p in patient.model.named_parameters() if p.is_complex()]
    if names:
        yield Finding(
            "note",
            "complex",
            names[0].rpartition(".")[0],
            f"{len(names)} parameters are complex ({names[0]} first): each number is measured as two real ones.",
            "Nothing to do; layer_size counts complex numbers.",
        )


def tied_weights(patient: Patient) -> Iterator[Finding]:
    """One parameter under several names belongs to one layer only."""
    names: dict[int, list[str]] = {}
    for name, p in patient.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for tied in names.values():
        if len(tied) > 1:
            yield Finding(
                "note",
                "tied",
                tied[0].rpartition(".")[0],
                f"{tied[0]} is one parameter with {', '.join(tied[1:])}: its gradient, the sum over all uses, "
                "counts in the first layer alone.",
                "Group the layers with layers={...} if it is to stand elsewhere.",
            )


def over_a_divided_batch(patient: Patient) -> Iterator[Finding]:
    """Tasks that use different samples of one batch, and meet in its statistics."""
    norms = {name: norm for name, norm in _norms(patient) if _reached_by_several(patient, norm)}
    if not norms:
        return
    for feature in patient.features:
        leaves, _ = below(feature.node)
        # Of a list of losses the first axis is no axis of samples, even where learned weights multiply it.
        shared = [name for name, norm in norms.items() if any(id(p) in leaves for p in norm.parameters(recurse=False))]
        for first, second in _disjoint(patient, feature) if shared else ():
            yield Finding(
                "warning",
                "batchnorm",
                shared[0],
                f"tasks {first!r} and {second!r} use different samples of one batch, which {len(shared)} shared "
                "BatchNorm layers normalise together: each task's gradient depends on the other's samples, even at "
                "weight 0.",
                "Give each task a forward with a norm of its own, or use GroupNorm or LayerNorm.",
            )
            return


def in_two_forwards(patient: Patient) -> Iterator[Finding]:
    """A norm that runs once per task: its running statistics are a mix of both tasks' data."""
    users = patient.users()
    for name, norm in _norms(patient):
        masks = {patient.graph.tasks[node] for node in users.get(id(norm.weight), ())}
        if len(masks) > 1 and norm.track_running_stats:
            yield Finding(
                "warning",
                "batchnorm",
                name,
                "runs in several forwards of different tasks: each normalises by its own samples in training, but "
                "evaluation uses running statistics of all, which another task's data move even at weight 0.",
                "Give each task a norm of its own, or make one forward for all.",
            )
            return


def _norms(patient: Patient) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in patient.model.named_modules() if isinstance(m, _BatchNorm) and m.training]


def _reached_by_several(patient: Patient, norm: nn.Module) -> bool:
    return any(several(patient.graph.leaves.get(id(p), 0)) for p in norm.parameters(recurse=False))


def _disjoint(patient: Patient, feature: Feature) -> Iterator[tuple[str, str]]:
    """Pairs of tasks none of whose samples, along the first axis of a feature, have a gradient in common."""
    shape = patient.shape(feature.node, feature.output)
    if not shape or shape[0] < 2:
        return
    losses = list(patient.losses.items())
    edge = GradientEdge(feature.node, feature.output)
    used: dict[str, Tensor] = {}
    with state_kept(patient.model):
        for place in feature.tasks:
            task, loss = losses[place]
            (gradient,) = torch.autograd.grad(loss, [edge], retain_graph=True, allow_unused=True)
            if gradient is not None:
                used[task] = gradient.detach().reshape(shape[0], -1).ne(0).any(1)
    names = [task for task, samples in used.items() if samples.any()]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if not (used[first] & used[second]).any():
                yield first, second


def with_custom_operations(patient: Patient) -> Iterator[Finding]:
    """An operation of the user's may do anything in its backward, and a probe runs it once per task."""
    names = custom_operations(patient.graph.nodes)
    if names:
        yield Finding(
            "note",
            "custom_operation",
            "",
            f"{len(names)} operations are not torch's own ({some(names)}), and run their own code in every pass: "
            "one that calls backward within its backward, or adds gradients, would make measurements wrong.",
            "A probe checks that by its effect and refuses, or marks the rows: see that the first rows are measured.",
        )


def saved_tensor_hooks(patient: Patient) -> Iterator[Finding]:
    """Hooks that hand out what operations saved may do so once only."""
    names = unpack_hooks(patient.graph.nodes)
    if names:
        yield Finding(
            "warning",
            "saved_tensor_hooks",
            "",
            f"hooks that are not torch's own hand out what operations saved ({some(names)}): where each is handed "
            "out once, the forward allows one backward only, and a probe refuses it.",
            "Make them keep what they hand out until the forward's last backward, or take them off at measured steps.",
        )


def steps_within_the_backward(patient: Patient) -> Iterator[Finding]:
    """Parameters that move before the backward is over."""
    names = stepping_parameters(patient.model)
    if names:
        yield Finding(
            "note",
            "post_accumulate_hooks",
            names[0].rpartition(".")[0],
            f"{len(names)} parameters have a hook that runs as soon as their gradient is there ({some(names)}), as "
            "of an optimizer that steps within the backward.",
            "Nothing to do: passes of the probe do not run it, and are made before the backward where parameters move.",
        )


def learned_weights(patient: Patient) -> Iterator[Finding]:
    """Parameters of the model that weigh its losses are no trunk."""
    named = dict(patient.model.named_parameters())
    used = [p for p in named.values() if id(p) in patient.graph.leaves]
    found = loss_weights(patient.graph, {id(p): p.numel() for p in used})
    names = [name for name, p in named.items() if id(p) in found]
    if names:
        yield Finding(
            "note",
            "loss_weights",
            names[0].rpartition(".")[0],
            f"{some(names)} only weigh losses, and no feature depends on them: every task has a gradient there, though "
            "none learns anything of the others.",
            "Nothing to do: a probe leaves them out of the shared layers.",
        )
