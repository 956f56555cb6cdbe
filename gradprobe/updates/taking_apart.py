"""One update of the shared layers, taken apart by where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.ledger.update_parts import Moments, Rule, begin, dot, first_moment, fit, rules, take_apart
from gradprobe.measures import Array
from gradprobe.probes.gramian import GramianSum
from gradprobe.probes.graph import SharedLayers
from gradprobe.probes.passes import Gradients, combined
from gradprobe.rows import EARLIER_SOURCES

Places = tuple[int, ...]
"""Which of the shared parameters."""

Kept = dict[Places, Moments]
"""First moments of parameters that are updated by one rule, side by side in one long vector."""

PLAIN = Rule(adam=False, lr=0.0, decay=0.0, decoupled=False, keep=0.0, take=1.0)
"""Stands for the rule of an optimizer that is not known."""

WHOLE = 1e-3
"""How much of an update its parts may leave out, over its length, beyond the rounding of the parameters."""


@dataclass(frozen=True)
class Group:
    """Parameters that the coming step updates alike; as one long vector they cost a tenth of what each by itself does.

    Attributes:
        rule: How.
        places: Which of the shared parameters.
        before: (n,) their numbers before the step.
        given: (n,) the gradient that the optimizer was given.
        own: (T) gradients of the tasks, unweighted, (n,) each.
    """

    rule: Rule
    places: Places
    before: Tensor
    given: Tensor
    own: list[Tensor]


@dataclass(frozen=True)
class Before:
    """A step that the optimizer is about to make.

    Attributes:
        groups: Of the shared parameters that will be updated.
        moments: First moments of each group by source, before the step.
        scale: The given gradient over the weighted sum of the tasks' gradients.
        unexplained: What that leaves, over the length of the given gradient.
    """

    groups: list[Group]
    moments: list[Moments]
    scale: float
    unexplained: float


def look_before(
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Gradients],
    weights: Array,
    kept: Kept,
    passed: int,
    foreign: str = "",
) -> Before:
    """What must be known before the optimizer's step; ``.grad`` is read and not changed.

    Args:
        optimizer: SGD, Adam or AdamW.
        parameters: Of the shared layers.
        gradients: (T) of the unweighted tasks.
        weights: (T,) in force.
        kept: Moments of the last step that was taken apart.
        passed: Updates that were made since, and not taken apart: their gradients go to the earlier momentum.
        foreign: Why updates of this optimizer cannot be taken apart; then the gradient alone is looked at.
    """
    known: list[Rule | None] = [PLAIN] * len(parameters) if foreign else rules(optimizer, parameters)
    groups = _groups(known, parameters, gradients)
    sums = [combined(weights, group.own) for group in groups]
    scale, unexplained = fit([group.given for group in groups], sums)
    if foreign:
        return Before(groups, [], scale, unexplained)
    moments = [_moments(optimizer, parameters, group, kept.get(group.places), passed) for group in groups]
    return Before(groups, moments, scale, unexplained)


def _groups(
    known: Sequence[Rule | None], parameters: Sequence[nn.Parameter], gradients: Sequence[Gradients]
) -> list[Group]:
    found: dict[tuple[Rule, torch.dtype, torch.device], list[int]] = {}
    for place, (rule, parameter) in enumerate(zip(known, parameters, strict=True)):
        if rule is not None and parameter.grad is not None:
            found.setdefault((rule, parameter.dtype, parameter.device), []).append(place)
    return [
        Group(
            rule=rule,
            places=tuple(places),
            before=long([parameters[i] for i in places]),
            given=long([_dense(parameters[i].grad, parameters[i]) for i in places]),
            own=[long([_dense(task[i], parameters[i]) for i in places]) for task in gradients],
        )
        for (rule, _, _), places in found.items()
    ]


def _moments(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], group: Group, kept: Moments | None, passed: int
) -> Moments:
    """The first moment by source; they sum to the optimizer's own, whatever was in the gradients meanwhile."""
    now = long([first_moment(optimizer, parameters[i]) for i in group.places])
    if kept is None or group.rule.begins:
        return begin(now, len(group.own))
    faded = [moment * group.rule.keep**passed for moment in kept[:-1]]
    return [*faded, now - torch.stack(faded).sum(0)]


def long(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of several tensors as one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


@dataclass(frozen=True)
class TakenApart:
    """An update.

    Attributes:
        parts: (L, S, S) inner products of its parts by source.
        effect: (L, T, S) inner products of the unweighted task gradients with the parts; NaN: no path.
        missing: How much of the update the parts leave out, over its length.
        kept: Moments for the next one.
    """

    parts: Array
    effect: Array
    missing: float
    kept: Kept


def look_after(
    optimizer: Optimizer,
    shared: SharedLayers,
    before: Before,
    gradients: Sequence[Gradients],
    weights: Array,
) -> TakenApart:
    """Take the update apart that was made since :func:`look_before`."""
    tasks, parameters = len(weights), shared.parameters
    total = GramianSum(shared.layers, 2 * tasks + len(EARLIER_SOURCES))
    rest: set[int] = set(range(len(parameters)))
    left = square = allowed = 0.0
    for group, moments in zip(before.groups, before.moments, strict=True):
        made = take_apart(
            group.rule, moments, _shares(group, weights, before.scale), group.before, _second(optimizer, shared, group)
        )
        update = long([parameters[i] for i in group.places]) - group.before
        left += dot(*[update - torch.stack(made).sum(0)] * 2)
        square += dot(update, update)
        # Each parameter is rounded when the update is added to it.
        allowed += torch.finfo(update.dtype).eps ** 2 * dot(group.before, group.before)
        sizes = [parameters[i].numel() for i in group.places]
        for place, *pieces in zip(group.places, *(part.split(sizes) for part in made), strict=True):
            total.add(place, [*pieces, *_own(gradients, place)])
        rest -= set(group.places)
    for place in sorted(rest):
        nothing = torch.zeros_like(parameters[place])
        total.add(place, [*[nothing] * (tasks + len(EARLIER_SOURCES)), *_own(gradients, place)])
    gram, sources = total.result(), tasks + len(EARLIER_SOURCES)
    beyond = max(math.sqrt(left) - 2 * math.sqrt(allowed), 0.0)
    missing = beyond / math.sqrt(square) if square else float(beyond > 0)
    kept = {group.places: moments for group, moments in zip(before.groups, before.moments, strict=True)}
    return TakenApart(gram[:, :sources, :sources], gram[:, sources:, :sources], missing, kept)


def _own(gradients: Sequence[Gradients], place: int) -> list[Tensor | None]:
    return [None if task[place] is None else task[place] for task in gradients]


def _shares(group: Group, weights: Array, scale: float) -> list[Tensor]:
    """The given gradient by task; what rounding leaves of it goes to the tasks in equal parts."""
    shares = [own * (scale * float(weight)) for own, weight in zip(group.own, weights, strict=True)]
    active = [task for task, weight in enumerate(weights) if weight] or list(range(len(weights)))
    left = group.given - torch.stack(shares).sum(0)
    for task in active:
        shares[task].add_(left, alpha=1 / len(active))
    return shares


def _second(optimizer: Optimizer, shared: SharedLayers, group: Group) -> Tensor | None:
    """Adam's second moment after the step."""
    if not group.rule.adam:
        return None
    return long([optimizer.state[shared.parameters[i]]["exp_avg_sq"] for i in group.places])
