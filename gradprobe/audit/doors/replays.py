"""Doors that are held shut by doing what the training without the task does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from gradprobe.audit.arm import Arm, numbers
from gradprobe.audit.closing import Closing, Door
from gradprobe.audit.compare import equal
from gradprobe.audit.record import leaves


class _Rates(Closing):
    def optimize(self, arm: Arm, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
        taken = len(arm.record.rates) - 1
        if arm.reference is None or taken >= len(arm.reference.rates):
            return step()
        groups = list(zip(optimizer.param_groups, arm.reference.rates[taken], strict=True))
        own = [numbers(group) for group, _ in groups]
        for group, replayed in groups:
            self.acted += numbers(group) != replayed
            group.update(replayed)
        try:
            return step()
        finally:  # a schedule that multiplies goes on from its own
            for (group, _), values in zip(groups, own, strict=True):
                group.update(values)


class _Decisions(Closing):
    def decide(self, arm: Arm, name: str, value: bool) -> bool:
        if arm.reference is None or name not in arm.reference.decisions:
            return value
        self.acted += arm.reference.decisions[name] != value
        return arm.reference.decisions[name]


class _Timing(Closing):
    """The optimizer steps where it does without the task; gradients gather until then."""

    def __init__(self) -> None:
        self._held = False

    def optimize(self, arm: Arm, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
        self._held = arm.reference is not None and arm.record.optimizer_steps >= arm.reference.optimizer_steps
        if self._held:
            self.acted += 1
            return None
        return step()

    def clear(self, arm: Arm, zero_grad: Callable[[], Any]) -> Any:
        return None if self._held else zero_grad()

    def finish(self, arm: Arm) -> None:
        scaler = arm.experiment.scaler  # which skips steps for reasons of its own
        behind = arm.reference is not None and arm.record.optimizer_steps < arm.reference.optimizer_steps
        if behind and len(arm.experiment.optimizers) == 1 and (scaler is None or not scaler.is_enabled()):
            self.acted += 1
            arm.experiment.optimizers[0].step()
            arm.experiment.optimizers[0].zero_grad()


class _Batch(Closing):
    def batch(self, arm: Arm, batch: Any) -> Any:
        if arm.reference is None:
            return batch
        replayed = merged(batch, arm.reference.batch)
        own, other = dict(leaves(batch)), dict(leaves(replayed))
        self.acted += own.keys() != other.keys() or not all(equal(own[k], other[k]) for k in own)
        return replayed


def merged(batch: Any, reference: Any) -> Any:
    """The reference's batch, with what the batch alone has added to it (targets of the task).

    >>> merged({"x": 1, "label": 5}, {"x": 2})
    {'x': 2, 'label': 5}
    """
    if isinstance(batch, Mapping) and isinstance(reference, Mapping):
        return {**batch, **reference}
    if dataclasses.is_dataclass(batch) and type(batch) is type(reference):
        return reference
    if isinstance(batch, (tuple, list)) and isinstance(reference, (tuple, list)):
        return type(batch)([*reference, *batch[len(reference) :]])
    return reference


SCHEDULE = Door(
    name="schedule",
    title="the learning rate follows a loss that the task is part of",
    remedy="drive the schedule by the other task's own loss, or by the step",
    close=_Rates,
    stages=("schedule", "optimizer"),
)

DECISION = Door(
    name="decision",
    title="early stopping or the best checkpoint is decided by a loss that the task is part of",
    remedy="decide by the other task's own loss or metric",
    close=_Decisions,
    stages=("decision",),
)

TIMING = Door(
    name="accumulation",
    title="the optimizer steps at other times: the task's backward passes count in the accumulation",
    remedy="count samples or batches, not backward passes",
    close=_Timing,
    stages=("scaler", "optimizer", "backward"),
)

DATA = Door(
    name="data",
    title="the task's data change the batch that the other tasks get",
    remedy="draw the other tasks' samples without regard to the task",
    close=_Batch,
    stages=("data",),
)
