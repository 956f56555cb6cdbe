"""The update that an optimizer makes, taken apart by where it comes from; functions on one parameter's tensors.

Everything between gradient and update is linear but the second moment of Adam, which all sources share. So the first
moment is kept once per source (:data:`Moments`), and the sources' parts of an update sum to the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = [
    "Alone",
    "Moments",
    "Rule",
    "alone_factors",
    "begin",
    "dot",
    "first_moment",
    "fit",
    "own_factor",
    "rules",
    "take_apart",
    "why_not",
]


Moments = list[Tensor]
"""First moments of one parameter: of each task, of weight decay, of what came earlier. They sum to the optimizer's."""


@dataclass(frozen=True)
class Rule:
    """How one parameter is updated in one step.

    Attributes:
        adam: Whether there is a second moment.
        lr: Learning rate.
        decay: Weight decay.
        decoupled: Whether decay goes past the moments, as in AdamW.
        keep: How much of the first moment stays: momentum, or beta1.
        take: How much of a gradient enters it.
        nesterov: As in SGD.
        beta2, eps: Of Adam.
        steps: That Adam made before this one.
        begins: Whether there is no first moment yet.
    """

    adam: bool
    lr: float
    decay: float
    decoupled: bool
    keep: float
    take: float
    nesterov: bool = False
    beta2: float = 0.0
    eps: float = 0.0
    steps: int = 0
    begins: bool = False


def why_not(optimizer: Optimizer) -> str:
    """Why the updates of an optimizer cannot be taken apart; empty: they can."""
    kind = type(optimizer)
    if kind not in (SGD, Adam, AdamW):
        return f"the updates of {kind.__name__} cannot be taken apart by task, only those of SGD, Adam and AdamW"
    for group in optimizer.param_groups:
        for name in ("amsgrad", "maximize", "differentiable"):
            if group.get(name):
                return f"the updates of {kind.__name__} with {name}=True cannot be taken apart by task"
        if any(p.is_complex() for p in group["params"]):
            return "updates of complex parameters cannot be taken apart by task"
    return ""


def rules(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[Rule | None]:
    """How each parameter will be updated in the coming step; None: the optimizer does not have it."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found: list[Rule | None] = []
    for parameter in parameters:
        group = groups.get(id(parameter))
        if group is None:
            found.append(None)
            continue
        state = optimizer.state.get(parameter, {})
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if isinstance(optimizer, Adam):
            beta1, beta2 = map(float, group["betas"])
            decoupled = bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))
            steps = int(state["step"]) if "step" in state else 0
            found.append(Rule(True, lr, decay, decoupled, beta1, 1 - beta1, False, beta2, float(group["eps"]), steps))
        else:
            momentum = float(group["momentum"])
            begins = momentum != 0 and state.get("momentum_buffer") is None
            take = 1.0 if begins or momentum == 0 else 1 - float(group["dampening"])
            found.append(Rule(False, lr, decay, False, momentum, take, bool(group["nesterov"]), begins=begins))
    return found


def first_moment(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """The optimizer's own first moment of a parameter; zeros where it has none."""
    state = optimizer.state.get(parameter, {})
    found = state.get("exp_avg", state.get("momentum_buffer"))
    return torch.zeros_like(parameter).detach() if found is None else found.detach().clone()


def begin(earlier: Tensor, tasks: int) -> Moments:
    """Moments of a ledger that begins: all there is came earlier."""
    return [*(torch.zeros_like(earlier) for _ in range(tasks + 1)), earlier]


def take_apart(
    rule: Rule, moments: Moments, shares: Sequence[Tensor], before: Tensor, second: Tensor | None = None
) -> list[Tensor]:
    """One parameter's update by source; brings its moments up to date.

    Args:
        rule: Of this step.
        moments: (T + 2), changed in place.
        shares: (T) of the gradient that the optimizer was given, by task; they sum to it.
        before: The parameter before the step.
        second: Adam's second moment after the step.

    Returns:
        The parts of the update, (T + 2) like ``moments``, which sum to it.
    """
    coupled = 0.0 if rule.decoupled else rule.decay
    nothing = torch.zeros_like(before)
    fresh = [*shares, before * coupled if coupled else nothing, nothing]
    for moment, new in zip(moments, fresh, strict=True):
        if rule.begins or (not rule.adam and rule.keep == 0):
            moment.copy_(new)
        else:
            moment.mul_(rule.keep).add_(new, alpha=rule.take)
    if not rule.adam:
        if rule.nesterov:
            return [(new + rule.keep * m) * -rule.lr for m, new in zip(moments, fresh, strict=True)]
        return [moment * -rule.lr for moment in moments]
    precondition = _precondition(rule, second)
    parts = [moment * -precondition for moment in moments]
    if rule.decoupled and rule.decay:
        parts[-2] = parts[-2] - before * (rule.lr * rule.decay)
    return parts


def own_factor(rule: Rule, second: Tensor | None = None) -> Tensor | float:
    """By how much a step's own gradient enters its update: ``part = ... - factor * share``, number by number."""
    if rule.adam:
        return _precondition(rule, second) * rule.take
    return rule.lr * (1 + rule.keep * rule.take if rule.nesterov else rule.take)


def _precondition(rule: Rule, second: Tensor | None, weight: float | None = None) -> Tensor:
    """``weight``: of the squares in ``second``; None: of all steps since the first."""
    assert second is not None
    count = rule.steps + 1
    weight = 1 - rule.beta2**count if weight is None else weight
    denominator = second.sqrt() / weight**0.5 + rule.eps
    result: Tensor = rule.lr / (1 - rule.keep**count) / denominator
    return result


_LEAST_KNOWN = 0.99
"""Of the weight of Adam's second moment, how much has to be of steps whose gradients are known by task."""


@dataclass
class Alone:
    """The second moments that Adam would have, had each task been alone with its share of the gradients.

    Under Adam a task's own part of an update is divided by what all tasks' gradients made of the second moment. The
    task alone would have divided by its own, so that another task's gradients shorten its steps without opposing them.

    Attributes:
        squares: (T) averages of the squared shares, of the steps that were seen.
        weight: Of these steps in the averages, from 0; Adam's own have ``1 - beta2**steps``.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1.
    """

    squares: list[Tensor]
    weight: float = 0.0

    @classmethod
    def begin(cls, like: Tensor, tasks: int) -> Alone:
        """Nothing was seen yet."""
        return cls([torch.zeros_like(like) for _ in range(tasks)])

    def faded(self, rule: Rule, passed: int) -> Alone:
        """What is left after so many steps whose gradients by task are not known."""
        left = rule.beta2**passed
        return Alone([square * left for square in self.squares], self.weight * left) if passed else self

    def look(self, rule: Rule, shares: Sequence[Tensor], before: Tensor) -> None:
        """At a step; arguments as for :func:`take_apart`."""
        self.weight = rule.beta2 * self.weight + (1 - rule.beta2)
        for square, share in zip(self.squares, shares, strict=True):
            given = share if rule.decoupled or not rule.decay else share + before * rule.decay
            square.mul_(rule.beta2).addcmul_(given, given, value=1 - rule.beta2)

    def known(self, rule: Rule) -> bool:
        """Whether nearly all of what the optimizer's own second moment remembers was seen here, too, and no more."""
        part = self.weight / (1 - rule.beta2 ** (rule.steps + 1))
        return _LEAST_KNOWN <= part <= 2 - _LEAST_KNOWN


def alone_factors(rule: Rule, alone: Alone) -> list[Tensor]:
    """(T) what each task's first moment would be multiplied with, had the task been alone; below 0.

    After the step was looked at. NaN where too little of the history is known.
    """
    if not alone.known(rule):
        return [torch.full_like(square, float("nan")) for square in alone.squares]
    return [-_precondition(rule, square, alone.weight) for square in alone.squares]


def fit(given: Sequence[Tensor | None], combined: Sequence[Tensor | None]) -> tuple[float, float]:
    """By which factor the gradient that the optimizer was given is the weighted sum of the tasks' gradients.

    Clipping, a loss scale and the mean over accumulated batches are such factors.

    Args:
        given: ``.grad`` of each parameter; None counts as zero.
        combined: The weighted sum.

    Returns:
        The factor, and the length of what it leaves over the length of what was given. (0, 0): nothing was given. NaN:
        something is not finite.
    """
    inner = square = own = 0.0
    for g, c in zip(given, combined, strict=True):
        inner += dot(g, c) if g is not None and c is not None else 0.0
        square += dot(c, c) if c is not None else 0.0
        own += dot(g, g) if g is not None else 0.0
    if own == 0:
        return (0.0, 0.0) if square == square and own == own else (float("nan"),) * 2
    factor = inner / square if square else 0.0
    # Not by own - inner^2 / square, which would lose all its digits where little is left.
    rest = sum(_left(g, c, factor) for g, c in zip(given, combined, strict=True))
    return factor, float((rest / own) ** 0.5)


def _left(given: Tensor | None, combined: Tensor | None, factor: float) -> float:
    if given is None and combined is None:
        return 0.0
    if combined is None:
        return dot(given, given) if given is not None else 0.0
    left = combined * -factor if given is None else given - factor * combined
    return dot(left, left)


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors of one shape, in float64."""
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    return float(torch.dot(a.reshape(-1).to(wide), b.reshape(-1).to(wide)))
