"""What is done to gradients between the losses and the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradprobe.audit.arm import Arm
from gradprobe.audit.closing import Closing, Door
from gradprobe.audit.compare import equal


class _Unclipped(Closing):
    """Gradients reach the optimizer as the backward, or the scaler's unscaling, left them."""

    def before_optimizer(self, arm: Arm, optimizer: Optimizer) -> None:
        made = arm.record.stages["backward"]
        for name, parameter in arm.experiment.model.named_parameters():
            gradient = made.get(name)
            if gradient is not None and parameter.grad is not None and not equal(gradient, parameter.grad):
                parameter.grad.copy_(gradient)
                self.acted += 1


class _NoZeros(Closing):
    """A gradient that is zero everywhere is none: the optimizer leaves the parameter alone."""

    def before_optimizer(self, arm: Arm, optimizer: Optimizer) -> None:
        for parameter in arm.experiment.model.parameters():
            if parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None
                self.acted += 1


class _PlainSum(Closing):
    """Gradients are those of the sum of the losses with the weights that the step function was given."""

    def __init__(self) -> None:
        self._start: dict[str, Tensor | None] = {}
        self._sum: dict[str, Tensor] = {}
        self._step = -1

    def losses(self, arm: Arm, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        named = dict(arm.experiment.model.named_parameters())
        if self._step != arm.index:
            self._step, self._sum = arm.index, {}
            self._start = {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}
        total = arm.experiment.scale * sum(arm.weights[task] * loss.reshape(()) for task, loss in losses.items())
        for name, gradient in gradients_of(total, named).items():
            self._sum[name] = self._sum[name] + gradient if name in self._sum else gradient
        return losses

    def after_backward(self, arm: Arm) -> None:
        if self._step != arm.index:
            return
        for name, parameter in arm.experiment.model.named_parameters():
            start, made = self._start[name], self._sum.get(name)
            wanted = start if made is None else made if start is None else start + made
            if not equal(parameter.grad, wanted):
                self.acted += 1
                parameter.grad = None if wanted is None else wanted.clone()


def gradients_of(loss: Tensor | float, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of a loss on every parameter that it reaches; the graph, ``.grad`` and buffers stay as they are."""
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    if not isinstance(loss, Tensor) or not loss.requires_grad or not wanted:
        return {}
    found = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}


ZERO_GRADIENT = Door(
    name="zero gradient",
    title="a gradient of zero where there was none: momentum and weight decay move the parameter",
    remedy="set gradients that are zero to None before the optimizer, or leave the task's loss out at weight 0",
    close=_NoZeros,
    stages=("backward", "clip", "scaler", "optimizer"),
)

CLIPPING = Door(
    name="clipping",
    title="the task's gradient enters the global norm that all gradients are clipped by",
    remedy="clip each task's own parameters apart, or take the norm over the other tasks' parameters alone",
    close=_Unclipped,
    stages=("clip",),
)

WEIGHTS = Door(
    name="weights",
    title="the gradient is not that of the sum of the losses with the weights given",
    remedy="sum the losses with the weights as they are",
    close=_PlainSum,
    stages=("backward", "clip"),
    intrusive=True,
)
"""Its finding is named more closely by :mod:`gradprobe.audit.in_force`."""
