"""The doors, the most specific first: where two of them explain a finding alone, the earlier one is its name.

A later closing often does an earlier one's work by the way: a batch that is replayed is right even where a random
stream moved, and so on down the list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.audit.arm import Closing, Door, LockstepArm, leaves, numbers
from gradprobe.audit.differences import bitwise_equal
from gradprobe.audit.streams import own_streams

# ---- gradients, between the losses and the optimizer


class _Unclipped(Closing):
    """Gradients reach the optimizer as the backward, or the scaler's unscaling, left them."""

    def before_optimizer(self, arm: LockstepArm, optimizer: Optimizer) -> None:
        made = arm.record.stages["backward"]
        for name, parameter in arm.experiment.model.named_parameters():
            gradient = made.get(name)
            if gradient is not None and parameter.grad is not None and not bitwise_equal(gradient, parameter.grad):
                parameter.grad.copy_(gradient)
                self.acted += 1


class _NoZeros(Closing):
    """A gradient that is zero everywhere is none: the optimizer leaves the parameter alone."""

    def before_optimizer(self, arm: LockstepArm, optimizer: Optimizer) -> None:
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

    def losses(self, arm: LockstepArm, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        named = dict(arm.experiment.model.named_parameters())
        if self._step != arm.index:
            self._step, self._sum = arm.index, {}
            self._start = {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}
        total = arm.experiment.scale * sum(arm.weights[task] * loss.reshape(()) for task, loss in losses.items())
        for name, gradient in gradients_of(total, named).items():
            self._sum[name] = self._sum[name] + gradient if name in self._sum else gradient
        return losses

    def after_backward(self, arm: LockstepArm) -> None:
        if self._step != arm.index:
            return
        for name, parameter in arm.experiment.model.named_parameters():
            start, made = self._start[name], self._sum.get(name)
            wanted = start if made is None else made if start is None else start + made
            if not bitwise_equal(parameter.grad, wanted):
                self.acted += 1
                parameter.grad = None if wanted is None else wanted.clone()


def gradients_of(loss: Tensor | float, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of a loss on every parameter that it reaches; the graph, ``.grad`` and buffers stay as they are."""
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    if not isinstance(loss, Tensor) or not loss.requires_grad or not wanted:
        return {}
    found = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}


_ZERO_GRADIENT = Door(
    name="zero gradient",
    title="a gradient of zero where there was none: momentum and weight decay move the parameter",
    remedy="set gradients that are zero to None before the optimizer, or leave the task's loss out at weight 0",
    close=_NoZeros,
    stages=("backward", "clip", "scaler", "optimizer"),
)

_CLIPPING = Door(
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
"""Its finding is named more closely by :mod:`gradprobe.audit.attribution`."""


# ---- random streams: dropout, augmentation and shuffling


class _OwnStreams(Closing):
    """Draws what belongs to a step so many steps later."""

    def __init__(self, later: int = 0) -> None:
        self._later = later

    @contextmanager
    def around(self, arm: LockstepArm) -> Iterator[None]:
        with own_streams(arm.experiment.model, self._later + arm.index) as mode:
            yield
        self.acted += 1 + mode.draws


_RANDOM = Door(
    name="random stream",
    title="both tasks draw from one random stream (dropout, augmentation, shuffling)",
    remedy="give the task's dropout, augmentation and loader a torch.Generator of their own",
    close=_OwnStreams,
    stages=("data", "forward"),
    others=(lambda: _OwnStreams(10**6), lambda: _OwnStreams(10**7)),
    intrusive=True,  # other numbers are drawn than the training draws, also where no other task draws
)


# ---- statistics of normalisation: those that are kept, and those of the batch


class _BuffersHeld(Closing):
    @contextmanager
    def around(self, arm: LockstepArm) -> Iterator[None]:
        before = {name: b.detach().clone() for name, b in arm.experiment.model.named_buffers()}
        yield
        with torch.no_grad():
            for name, buffer in arm.experiment.model.named_buffers():
                self.acted += not torch.equal(buffer, before[name])
                buffer.copy_(before[name])


class _EvaluationMode(Closing):
    """Normalises with what was kept: no sample sees another."""

    @contextmanager
    def around(self, arm: LockstepArm) -> Iterator[None]:
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


_BUFFERS = Door(
    name="running statistics",
    title="another forward through shared layers moves their buffers (BatchNorm's running statistics)",
    remedy="one forward for all tasks, or BatchNorm in evaluation mode in the task's own forward",
    close=_BuffersHeld,
    stages=("forward", "optimizer"),
)

_BATCH_STATISTICS = Door(
    name="batch statistics",
    title="the task's samples enter the batch that shared BatchNorm layers normalise with",
    remedy="separate batches, or normalisation per sample (GroupNorm, LayerNorm)",
    close=_EvaluationMode,
    stages=("data", "forward"),
    intrusive=True,
)


# ---- gradients that are not finite, with a scaler behind them and without


class _Guard(Closing):
    """Leaves the task out of a step in which its weighted and scaled gradient is not finite anywhere."""

    def __init__(self, *, scaled: bool) -> None:
        self._scaled = scaled

    def losses(self, arm: LockstepArm, losses: dict[str, Tensor]) -> dict[str, Tensor]:
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


_SCALER = Door(
    name="scaler",
    title="the task overflows, and GradScaler skips the step for all and lowers its scale",
    remedy="leave the task out of a step in which its own gradient is not finite, or give it a scaler of its own",
    close=lambda: _Guard(scaled=True),
    stages=("forward", "backward", "scaler"),
)

_NONFINITE = Door(
    name="non-finite",
    title="the task's gradient is not finite, and a weight of 0 times infinity is NaN",
    remedy="leave the task out of a step in which its own gradient is not finite",
    close=lambda: _Guard(scaled=False),
    stages=("forward", "backward"),
)


# ---- what is replayed from the training without the task


class _Rates(Closing):
    def optimize(self, arm: LockstepArm, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
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
    def decide(self, arm: LockstepArm, name: str, value: bool) -> bool:
        if arm.reference is None or name not in arm.reference.decisions:
            return value
        self.acted += arm.reference.decisions[name] != value
        return arm.reference.decisions[name]


class _Timing(Closing):
    """The optimizer steps where it does without the task; gradients gather until then."""

    def __init__(self) -> None:
        self._held = False

    def optimize(self, arm: LockstepArm, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
        self._held = arm.reference is not None and arm.record.optimizer_steps >= arm.reference.optimizer_steps
        if self._held:
            self.acted += 1
            return None
        return step()

    def clear(self, arm: LockstepArm, zero_grad: Callable[[], Any]) -> Any:
        return None if self._held else zero_grad()

    def finish(self, arm: LockstepArm) -> None:
        scaler = arm.experiment.scaler  # which skips steps for reasons of its own
        behind = arm.reference is not None and arm.record.optimizer_steps < arm.reference.optimizer_steps
        if behind and len(arm.experiment.optimizers) == 1 and (scaler is None or not scaler.is_enabled()):
            self.acted += 1
            arm.experiment.optimizers[0].step()
            arm.experiment.optimizers[0].zero_grad()


class _Batch(Closing):
    def batch(self, arm: LockstepArm, batch: Any) -> Any:
        if arm.reference is None:
            return batch
        replayed = _merged(batch, arm.reference.batch)
        own, other = dict(leaves(batch)), dict(leaves(replayed))
        self.acted += own.keys() != other.keys() or not all(bitwise_equal(own[k], other[k]) for k in own)
        return replayed


def _merged(batch: Any, reference: Any) -> Any:
    """The reference's batch, with what the batch alone has added to it (targets of the task).

    >>> _merged({"x": 1, "label": 5}, {"x": 2})
    {'x': 2, 'label': 5}
    """
    if isinstance(batch, Mapping) and isinstance(reference, Mapping):
        return {**batch, **reference}
    if dataclasses.is_dataclass(batch) and type(batch) is type(reference):
        return reference
    if isinstance(batch, (tuple, list)) and isinstance(reference, (tuple, list)):
        return type(batch)([*reference, *batch[len(reference) :]])
    return reference


_SCHEDULE = Door(
    name="schedule",
    title="the learning rate follows a loss that the task is part of",
    remedy="drive the schedule by the other task's own loss, or by the step",
    close=_Rates,
    stages=("schedule", "optimizer"),
)

_DECISION = Door(
    name="decision",
    title="early stopping or the best checkpoint is decided by a loss that the task is part of",
    remedy="decide by the other task's own loss or metric",
    close=_Decisions,
    stages=("decision",),
)

_TIMING = Door(
    name="accumulation",
    title="the optimizer steps at other times: the task's backward passes count in the accumulation",
    remedy="count samples or batches, not backward passes",
    close=_Timing,
    stages=("scaler", "optimizer", "backward"),
)

_DATA = Door(
    name="data",
    title="the task's data change the batch that the other tasks get",
    remedy="draw the other tasks' samples without regard to the task",
    close=_Batch,
    stages=("data",),
)


# ---- of interest at weights above 0: the task's own gradient, and optimizers to which a small one is not small


class _PrivateOnly(Closing):
    """The task trains the parameters that no other task reaches, and sends nothing to the others."""

    def __init__(self) -> None:
        self._others: set[str] = set()

    def losses(self, arm: LockstepArm, losses: dict[str, Tensor]) -> dict[str, Tensor]:
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

    def optimize(self, arm: LockstepArm, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
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


DOORS: tuple[Door, ...] = (
    _RANDOM,
    _ZERO_GRADIENT,
    _SCALER,
    _NONFINITE,
    _BUFFERS,
    _BATCH_STATISTICS,
    _CLIPPING,
    WEIGHTS,
    _SCHEDULE,
    _DECISION,
    _TIMING,
    _DATA,
)
"""Tried by :func:`gradprobe.audit.attribution.attribute`."""
