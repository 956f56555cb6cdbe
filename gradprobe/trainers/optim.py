"""The model's optimizer and learning-rate schedule, without the hidden couplings that YOLOv5's own trainer has.

No warm-up, no accumulation to a nominal batch, no averaging of weights, no clipping unless asked for: each of them
couples the tasks or hides what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
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


_ADAM = frozenset({"step", "exp_avg", "exp_avg_sq"})
_KEPT: dict[type[Optimizer], tuple[frozenset[str], frozenset[str]]] = {
    torch.optim.AdamW: (_ADAM, _ADAM),
    torch.optim.Adam: (_ADAM, _ADAM),
    torch.optim.SGD: (frozenset(), frozenset({"momentum_buffer"})),
}
"""What each keeps of a parameter that it has moved: what must be there, and what may."""


def restore_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict``, which takes tensors of any shape and settings of any kind, with a look before.

    Args:
        optimizer: As it was made; its settings, the learning rates but for, are to be those of the state.
        state: What the ``state_dict`` of its like gave.

    Raises:
        ValueError: It is of another optimizer, or of other parameters.
    """
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, state["param_groups"], strict=True)):
        for name, value in group.items():
            if name in ("params", "lr") or value is None or isinstance(value, bool):
                continue
            if name not in saved or not _same(saved[name], value):
                raise ValueError(f"group {number} has {name} {saved.get(name)!r}, not {value!r}")
        rate = saved.get("lr")
        if type(rate) is not float or not 0 <= rate < math.inf:
            raise ValueError(f"group {number} has the learning rate {rate!r}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    needed, known = _KEPT[type(optimizer)]
    for index, kept in state["state"].items():
        if not 0 <= index < len(parameters):
            raise ValueError(f"it has a parameter {index}, of {len(parameters)}")
        if not needed <= kept.keys() <= known:
            raise ValueError(f"of parameter {index} it has {', '.join(kept) or 'nothing'}, not {', '.join(known)}")
        shape = parameters[index].shape
        for name, value in kept.items():
            if name == "momentum_buffer" and value is None:
                continue
            wanted = torch.Size() if name == "step" else shape
            if not isinstance(value, Tensor) or value.shape != wanted or not value.is_floating_point():
                raise ValueError(f"{name} of parameter {index} is no tensor of the shape {tuple(wanted)}")
    optimizer.load_state_dict(dict(state))


def restore_schedule(schedule: LambdaLR, state: Mapping[str, Any], most: int) -> None:
    """``schedule.load_state_dict``, which takes anything under any name, with a look before.

    Args:
        schedule: As it was made, behind an optimizer that was restored.
        state: What the ``state_dict`` of its like gave.
        most: Steps of the whole training.

    Raises:
        ValueError: It is of another schedule, or does not give the optimizer's learning rates.
    """
    step = state["last_epoch"]
    if type(step) is not int or not 0 <= step <= most:
        raise ValueError(f"it is at step {step!r}, of {most}")
    if list(state["base_lrs"]) != schedule.base_lrs or any(part is not None for part in state["lr_lambdas"]):
        raise ValueError(f"it begins with the learning rates {state['base_lrs']}, not {schedule.base_lrs}")
    if type(state["_step_count"]) is not int:
        raise ValueError(f"it has made {state['_step_count']!r} steps")
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for rate, group in zip(rates, schedule.optimizer.param_groups, strict=True):
        if not math.isclose(rate, group["lr"], rel_tol=1e-6):
            raise ValueError(f"at step {step} the learning rate is {rate:g}, and the optimizer's {group['lr']:g}")
    known = schedule.state_dict()
    schedule.load_state_dict({**known, **{name: state[name] for name in known if name in state}, "_last_lr": rates})


def _same(one: Any, other: Any) -> bool:
    if isinstance(other, (list, tuple)):
        return isinstance(one, (list, tuple)) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) in (int, float) and one == other
