"""Whose parameters they are, and how long the gradients are that the optimizer finds on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradprobe.probes import state
from gradprobe.probes.graph import reached
from gradprobe.probes.shared_layers import SharedLayers


def private(model: nn.Module, shared: SharedLayers, losses: Sequence[Tensor]) -> list[list[nn.Parameter]]:
    """(T): what each task alone reaches."""
    inside = {id(p) for p in shared.parameters}
    uses = [reached(loss) for loss in losses]
    own = [p for p in model.parameters() if id(p) not in inside and sum(id(p) in use for use in uses) == 1]
    return [[p for p in own if id(p) in use] for use in uses]


def everything(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter once."""
    return list({id(p): p for p in state.parameters_of(model)}.values())


def squares(parameters: Sequence[Sequence[nn.Parameter]]) -> list[float]:
    """Squared norm of ``.grad`` over each list of parameters; one that has none counts as 0."""
    sums = []
    for members in parameters:
        found = [p.grad.detach() for p in members if p.grad is not None]
        lengths = [torch.linalg.vector_norm(g.to_dense() if g.layout != torch.strided else g) for g in found]
        sums.append(float(torch.stack(lengths).double().square().sum()) if lengths else 0.0)
    return sums
