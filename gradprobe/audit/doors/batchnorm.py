"""Statistics of normalisation: those that are kept, and those of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gradprobe.audit.arm import Arm
from gradprobe.audit.closing import Closing, Door


class _BuffersHeld(Closing):
    @contextmanager
    def around(self, arm: Arm) -> Iterator[None]:
        before = {name: b.detach().clone() for name, b in arm.experiment.model.named_buffers()}
        yield
        with torch.no_grad():
            for name, buffer in arm.experiment.model.named_buffers():
                self.acted += not torch.equal(buffer, before[name])
                buffer.copy_(before[name])


class _EvaluationMode(Closing):
    """Normalises with what was kept: no sample sees another."""

    @contextmanager
    def around(self, arm: Arm) -> Iterator[None]:
        modes: list[bool] = []

        def enter(module: nn.Module, args: Any) -> None:
            modes.append(module.training)
            self.acted += module.training
            module.training = False

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            module.training = modes.pop()

        with ExitStack() as stack:
            for module in arm.experiment.model.modules():
                if isinstance(getattr(module, "running_mean", None), torch.Tensor):
                    stack.callback(module.register_forward_pre_hook(enter).remove)
                    stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield


BUFFERS = Door(
    name="running statistics",
    title="another forward through shared layers moves their buffers (BatchNorm's running statistics)",
    remedy="one forward for all tasks, or BatchNorm in evaluation mode in the task's own forward",
    close=_BuffersHeld,
    stages=("forward", "optimizer"),
)

BATCH_STATISTICS = Door(
    name="batch statistics",
    title="the task's samples enter the batch that shared BatchNorm layers normalise with",
    remedy="separate batches, or normalisation per sample (GroupNorm, LayerNorm)",
    close=_EvaluationMode,
    stages=("data", "forward"),
    intrusive=True,
)
