"""Losses whose gradient is not finite, with a scaler behind them and without."""

from __future__ import annotations

import torch
from torch import Tensor

from gradprobe.audit.arm import Arm
from gradprobe.audit.closing import Closing, Door
from gradprobe.audit.doors.gradients import gradients_of


class _Guard(Closing):
    """Leaves the task out of a step in which its weighted and scaled gradient is not finite anywhere."""

    def __init__(self, *, scaled: bool) -> None:
        self._scaled = scaled

    def losses(self, arm: Arm, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        scaler = arm.experiment.scaler
        if arm.task not in losses or self._scaled != (scaler is not None and scaler.is_enabled()):
            return losses
        loss = losses[arm.task]
        weighted = arm.experiment.scale * arm.weights[arm.task] * loss.reshape(())
        found = gradients_of(weighted, dict(arm.experiment.model.named_parameters())).values()
        if bool(weighted.isfinite()) and all(bool(g.isfinite().all()) for g in found):
            return losses
        self.acted += 1
        return {**losses, arm.task: torch.zeros_like(loss, requires_grad=True)}


SCALER = Door(
    name="scaler",
    title="the task overflows, and GradScaler skips the step for all and lowers its scale",
    remedy="leave the task out of a step in which its own gradient is not finite, or give it a scaler of its own",
    close=lambda: _Guard(scaled=True),
    stages=("forward", "backward", "scaler"),
)

NONFINITE = Door(
    name="non-finite",
    title="the task's gradient is not finite, and a weight of 0 times infinity is NaN",
    remedy="leave the task out of a step in which its own gradient is not finite",
    close=lambda: _Guard(scaled=False),
    stages=("forward", "backward"),
)
