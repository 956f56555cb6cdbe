"""One update of the shared layers, taken apart by where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.ledger.terms import products
from gradprobe.ledger.update_parts import (
    Alone,
    Moments,
    Rule,
    alone_factors,
    begin,
    first_moment,
    fit,
    own_factor,
    rules,
    take_apart,
)
from gradprobe.measures import Array
from gradprobe.probes.passes import Gradients, combined
from gradprobe.probes.shared_layers import SharedLayers
from gradprobe.rows import EARLIER_SOURCES

_Places = tuple[int, ...]
"""Which of the shared parameters."""


@dataclass(frozen=True)
class Kept:
    """What is kept from step to step of parameters that are updated by one rule, side by side in one long vector.

    Attributes:
        moments: First moments by source.
        alone: Second moments of each task alone; None: there are none, or nobody asked.
    """

    moments: Moments
    alone: Alone | None = None


KeptMoments = dict[_Places, Kept]

_PLAIN_RULE = Rule(adam=False, lr=0.0, decay=0.0, decoupled=False, keep=0.0, take=1.0)
"""Stands for the rule of an optimizer that is not known."""

IN_CACHE = 1 << 16
"""About so many numbers are handled together on a CPU: fewer cost calls, more the way to the memory and back."""

MOST_MISSING = 1e-3
"""How much of an update its parts may leave out, over its length, beyond the rounding of the parameters."""


@dataclass(frozen=True)
class _Group:
    """Parameters that the coming step updates alike; as one long vector they cost a tenth of what each by itself does.

    Attributes:
        rule: How.
        places: Which of the shared parameters.
        before: (n,) their numbers before the step.
        given: (n,) the gradient that the optimizer was given.
        own: (T) gradients of the tasks, unweighted, (n,) each.
    """

    rule: Rule
    places: _Places
    before: Tensor
    given: Tensor
    own: list[Tensor]


@dataclass(frozen=True)
class UpdateBefore:
    """A step that the optimizer is about to make.

    Attributes:
        groups: Of the shared parameters that will be updated.
        kept: What was known of each group before the step.
        scale: The given gradient over the weighted sum of the tasks' gradients.
        unexplained: What that leaves, over the length of the given gradient.
    """

    groups: list[_Group]
    kept: list[Kept]
    scale: float
    unexplained: float


def look_before(
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Gradients],
    weights: Array,
    kept: KeptMoments,
    passed: int,
    foreign: str = "",
    *,
    alone: bool = False,
) -> UpdateBefore:
    """What must be known before the optimizer's step; ``.grad`` is read and not changed.

    Args:
        optimizer: SGD, Adam or AdamW.
        parameters: Of the shared layers.
        gradients: (T) of the unweighted tasks.
        weights: (T,) in force.
        kept: Moments of the last step that was taken apart.
        passed: Updates that were made since, and not taken apart: their gradients go to the earlier momentum.
        foreign: Why updates of this optimizer cannot be taken apart; then the gradient alone is looked at.
        alone: Also keep what Adam's second moments of each task alone would be.
    """
    known: list[Rule | None] = [_PLAIN_RULE] * len(parameters) if foreign else rules(optimizer, parameters)
    groups = _groups(known, parameters, gradients)
    sums = [combined(weights, group.own) for group in groups]
    scale, unexplained = fit([group.given for group in groups], sums)
    if foreign:
        return UpdateBefore(groups, [], scale, unexplained)
    now = [_kept(optimizer, parameters, group, kept.get(group.places), passed, alone=alone) for group in groups]
    return UpdateBefore(groups, now, scale, unexplained)


def _groups(
    known: Sequence[Rule | None], parameters: Sequence[nn.Parameter], gradients: Sequence[Gradients]
) -> list[_Group]:
    found: dict[tuple[Rule, torch.dtype, torch.device, int], list[int]] = {}
    filled: dict[Rule, int] = {}
    for place, (rule, parameter) in enumerate(zip(known, parameters, strict=True)):
        if rule is None or parameter.grad is None:
            continue
        room = filled.get(rule, 0) // IN_CACHE if parameter.is_cpu else 0
        found.setdefault((rule, parameter.dtype, parameter.device, room), []).append(place)
        filled[rule] = filled.get(rule, 0) + parameter.numel()
    return [
        _Group(
            rule=rule,
            places=tuple(places),
            before=long_vector([parameters[i] for i in places]),
            given=long_vector([_dense(parameters[i].grad, parameters[i]) for i in places]),
            own=[long_vector([_dense(task[i], parameters[i]) for i in places]) for task in gradients],
        )
        for (rule, *_), places in found.items()
    ]


def _kept(
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
    group: _Group,
    kept: Kept | None,
    passed: int,
    *,
    alone: bool,
) -> Kept:
    moments = _moments(optimizer, parameters, group, None if kept is None else kept.moments, passed)
    if not (alone and group.rule.adam):
        return Kept(moments)
    seconds = kept.alone if kept is not None else None
    if seconds is None:
        return Kept(moments, Alone.begin(group.before, len(group.own)))
    return Kept(moments, seconds.faded(group.rule, passed))


def _moments(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], group: _Group, kept: Moments | None, passed: int
) -> Moments:
    """The first moment by source; they sum to the optimizer's own, whatever was in the gradients meanwhile."""
    now = long_vector([first_moment(optimizer, parameters[i]) for i in group.places])
    if kept is None or group.rule.begins:
        return begin(now, len(group.own))
    # Not in place: this update may yet turn out to be none that can be taken apart, and one that passed, too.
    faded = [moment * group.rule.keep**passed for moment in kept[:-1]] if passed else kept[:-1]
    for moment in faded:
        now.sub_(moment)
    return [*faded, now]


def long_vector(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of several tensors as one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


@dataclass(frozen=True)
class UpdateParts:
    """Some of an update's numbers by source.

    Attributes:
        places: Which of the shared parameters.
        made: (S, n) by source; they sum to the update.
        factor: (n,) or a number: by how much the step's own gradient entered it.
        alone: (T, n) what each task alone would have made at this point; NaN: its history is not known. None: no other
            than its part, as in SGD, where no task changes what another one's gradient becomes.
        alone_factor: (T, n) as ``factor``, of ``alone``.
    """

    places: _Places
    made: Tensor
    factor: Tensor | float
    alone: Tensor | None = None
    alone_factor: Tensor | None = None


@dataclass(frozen=True)
class TakenApart:
    """An update.

    Attributes:
        parts: (L, S, S) inner products of its parts by source.
        effect: (L, T, S) inner products of the unweighted task gradients with the parts; NaN: no path.
        missing: How much of the update the parts leave out, over its length.
        kept: Moments for the next one.
        pieces: The parts themselves, where they were asked for.
        scale: The given gradient over the weighted sum of the tasks' gradients.
    """

    parts: Array
    effect: Array
    missing: float
    kept: KeptMoments
    pieces: Sequence[UpdateParts]
    scale: float


def look_after(
    optimizer: Optimizer,
    shared: SharedLayers,
    before: UpdateBefore,
    gradients: Sequence[Gradients],
    weights: Array,
    *,
    keep: bool = False,
) -> TakenApart:
    """Take the update apart that was made since :func:`look_before`; ``keep`` its parts too, S copies."""
    tasks, parameters = len(weights), shared.parameters
    sources = tasks + len(EARLIER_SOURCES)
    owner = _owners(shared)
    gram = np.zeros((len(shared.layers), sources + tasks, sources + tasks))
    left = square = allowed = 0.0
    pieces = []
    for group, kept in zip(before.groups, before.kept, strict=True):
        shares = _shares(group, weights, before.scale)
        second = second_moment(optimizer, [parameters[i] for i in group.places], group.rule)
        made = take_apart(group.rule, kept.moments, shares, group.before, second)
        update = long_vector([parameters[i] for i in group.places]).sub_(group.before)
        square += vector_norm(update) ** 2
        # Each parameter is rounded when the update is added to it.
        allowed += (torch.finfo(update.dtype).eps * vector_norm(group.before)) ** 2
        for part in made:
            update.sub_(part)
        left += vector_norm(update) ** 2
        sizes = numbers_by_layer(shared, group.places)
        gram[list(sizes)] += products(torch.stack([*made, *group.own]), list(sizes.values()))
        if keep:
            lone = _alone(group, kept, shares)
            pieces.append(UpdateParts(group.places, torch.stack(made), own_factor(group.rule, second), *lone))
    there = np.array(
        [[any(g[i] is not None for i, o in enumerate(owner) if o == layer) for g in gradients] for layer in set(owner)]
    ).reshape(len(shared.layers), tasks)
    beyond = max(math.sqrt(left) - 2 * math.sqrt(allowed), 0.0)
    missing = beyond / math.sqrt(square) if square else float(beyond > 0)
    by_places = {group.places: kept for group, kept in zip(before.groups, before.kept, strict=True)}
    effect = np.where(there[:, :, None], gram[:, sources:, :sources], np.nan)
    return TakenApart(gram[:, :sources, :sources], effect, missing, by_places, pieces, before.scale)


def _alone(group: _Group, kept: Kept, shares: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """See :class:`UpdateParts`; brings the second moments up to date."""
    if kept.alone is None:
        return None, None
    kept.alone.look(group.rule, shares, group.before)
    factors = torch.stack(alone_factors(group.rule, kept.alone))
    return torch.stack(kept.moments[: len(shares)]) * factors, factors * -group.rule.take


def _owners(shared: SharedLayers) -> list[int]:
    """The layer of each shared parameter."""
    return [index for index, layer in enumerate(shared.layers) for _ in layer.parameters]


def numbers_by_layer(shared: SharedLayers, places: _Places) -> dict[int, int]:
    """Layer -> how many numbers of these parameters are its own; parameters of a layer are neighbours."""
    owner, parameters = _owners(shared), shared.parameters
    sizes: dict[int, int] = {}
    for place in places:
        sizes[owner[place]] = sizes.get(owner[place], 0) + parameters[place].numel()
    return sizes


def side_by_side(tasks: Sequence[Gradients], parameters: Sequence[nn.Parameter], places: _Places) -> Tensor:
    """(T, n): each task's gradient on these parameters as one vector; zeros where it has none."""
    return torch.stack([long_vector([_dense(task[i], parameters[i]) for i in places]) for task in tasks])


def vector_norm(vector: Tensor) -> float:
    """Euclidean norm."""
    return float(torch.linalg.vector_norm(vector))


def _shares(group: _Group, weights: Array, scale: float) -> list[Tensor]:
    """The given gradient by task; what rounding leaves of it goes to the tasks in equal parts."""
    shares = [own * (scale * float(weight)) for own, weight in zip(group.own, weights, strict=True)]
    active = [task for task, weight in enumerate(weights) if weight] or list(range(len(weights)))
    left = group.given.clone()
    for share in shares:
        left.sub_(share)
    for task in active:
        shares[task].add_(left, alpha=1 / len(active))
    return shares


def second_moment(optimizer: Optimizer, parameters: Sequence[nn.Parameter], rule: Rule) -> Tensor | None:
    """Adam's second moment after the step, as one vector."""
    return long_vector([optimizer.state[p]["exp_avg_sq"] for p in parameters]) if rule.adam else None
