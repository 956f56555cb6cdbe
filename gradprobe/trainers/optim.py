"""The model's optimizer and learning-rate schedule, without the hidden couplings that YOLOv5's own trainer has.

No warm-up, no accumulation to a nominal batch, no averaging of weights, no clipping unless asked for: each of them
couples the tasks or hides what is measured.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gradprobe.trainers.settings import Settings


def make_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    """AdamW or SGD. Weight decay acts on convolutions and linear weights, not on biases and BatchNorm."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if settings.optimizer == "SGD":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999))


def make_schedule(optimizer: Optimizer, settings: Settings, steps: int) -> LambdaLR:
    """A cosine from ``lr`` to ``lr * lrf`` over all steps of the training."""

    def factor(step: int) -> float:
        return settings.lrf + (1 - settings.lrf) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))

    return LambdaLR(optimizer, factor)
