"""Checks of the model: one function each, from what it looks at to what it says."""

from __future__ import annotations

from collections.abc import Iterator

import torch._functorch.config
from torch import nn

from gradprobe.probes import limits
from gradprobe.probes.doctor.finding import Finding, Patient


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


def reentrant_checkpoints(patient: Patient) -> Iterator[Finding]:
    """What a reentrant checkpoint recomputes is not in the graph before the backward runs."""
    count = limits.reentrant_checkpoints(patient.graph)
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
    name = limits.sharded_module(patient.model)
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
