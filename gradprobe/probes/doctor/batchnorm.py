"""Checks of BatchNorm, which lets tasks reach each other beside the gradients of shared parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm

from gradprobe.probes.doctor.finding import Finding, Patient, below
from gradprobe.probes.features import Feature
from gradprobe.probes.state import state_kept
from gradprobe.probes.trace import several


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
