"""The task's own gradient, and optimizers to which a small one is not small. Of interest at weights above 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradprobe.audit.arm import Arm
from gradprobe.audit.closing import Closing, Door
from gradprobe.audit.doors.gradients import gradients_of


class _PrivateOnly(Closing):
    """The task trains the parameters that no other task reaches, and sends nothing to the others."""

    def __init__(self) -> None:
        self._others: set[str] = set()

    def losses(self, arm: Arm, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        named = dict(arm.experiment.model.named_parameters())
        for task, loss in losses.items():
            if task != arm.task:
                self._others |= gradients_of(loss, named).keys()
        if arm.task not in losses:
            return losses
        loss = losses[arm.task]
        found = gradients_of(loss, named)
        own = {n: g for n, g in found.items() if n not in self._others and bool(g.isfinite().all())}
        # Linear in the private parameters, with their gradients and the loss's own value.
        linear = torch.stack([((named[n] - named[n].detach()) * g).sum() for n, g in own.items()]).sum() if own else 0.0
        self.acted += 1
        return {**losses, arm.task: torch.zeros_like(loss, requires_grad=True) + loss.detach() + linear}


class _GradientDescent(Closing):
    """Plain gradient descent with the same learning rates, without momentum, decay or preconditioning."""

    def optimize(self, arm: Arm, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
        self.acted += 1
        arm.record.optimizer_steps += 1
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(group["lr"] * parameter.grad)


DIRECT = Door(
    name="direct",
    title="the task's own weighted gradient on parameters of the others: the intended way",
    remedy="lower its weight, or give the task layers of its own",
    close=_PrivateOnly,
    stages=("backward",),
)

PRECONDITIONER = Door(
    name="adam",
    title="the optimizer divides by the gradient's own size: a small weight makes no small step",
    remedy="scale the step and not the loss, raise eps, or use SGD for what only this task trains",
    close=_GradientDescent,
    stages=("optimizer",),
    intrusive=True,
)
