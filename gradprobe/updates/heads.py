"""What tasks have for themselves: their private parameters, how these were moved, and what for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.ledger.terms import noise_products
from gradprobe.ledger.update_parts import Rule, dot, own_factor, rules
from gradprobe.measures import FIRST_STEPS_OF_ADAM, Array
from gradprobe.probes import state
from gradprobe.probes.graph import reached
from gradprobe.probes.passes import done
from gradprobe.probes.shared_layers import SharedLayers
from gradprobe.probes.state import state_kept
from gradprobe.updates.taking_apart import MOST_MISSING, long_vector, second_moment, vector_norm

__all__ = ["private_parameters"]


def private_parameters(model: nn.Module, shared: SharedLayers, losses: Sequence[Tensor]) -> list[list[nn.Parameter]]:
    """(T): what each task alone reaches."""
    inside = {id(p) for p in shared.parameters}
    uses = [reached(loss) for loss in losses]
    own = [p for p in model.parameters() if id(p) not in inside and sum(id(p) in use for use in uses) == 1]
    return [[p for p in own if id(p) in use] for use in uses]


def all_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter once."""
    return list({id(p): p for p in state.parameters_of(model)}.values())


def gradient_squares(parameters: Sequence[Sequence[nn.Parameter]]) -> list[float]:
    """Squared norm of ``.grad`` over each list of parameters; one that has none counts as 0."""
    sums = []
    for members in parameters:
        found = [p.grad.detach() for p in members if p.grad is not None]
        lengths = [torch.linalg.vector_norm(g.to_dense() if g.layout != torch.strided else g) for g in found]
        sums.append(float(torch.stack(lengths).double().square().sum()) if lengths else 0.0)
    return sums


PrivateParameters = Sequence[Sequence[nn.Parameter]]
"""(T) parameters that a task alone reaches."""

ByTask = list[Tensor]
"""(T) long vectors, one number per private number of the task."""


def private_gradients(
    model: nn.Module, losses: Sequence[Sequence[Tensor]], own: PrivateParameters, factor: float
) -> list[ByTask]:
    """(m) of (T) gradients on private parameters, by passes that end there: they change no ``.grad``.

    Args:
        model: Whose buffers and random numbers are kept.
        losses: (m) of (T,), scaled by ``factor``.
        own: See :data:`PrivateParameters`.
        factor: Is taken off.
    """
    with state_kept(model) as back:
        found = []
        for one in losses:
            row = []
            for loss, parameters in zip(one, own, strict=True):
                row.append(_pass(loss, parameters) / factor)
                back()
            found.append(row)
    return found


def _pass(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        return _nothing(parameters)
    found = iter(torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True))
    done.count += 1
    return as_vector([next(found) if p.requires_grad else None for p in parameters], parameters)


def as_vector(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    """As one vector, zeros where there is none."""
    if not parameters:
        return torch.zeros(0)
    pieces = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return long_vector([g.to_dense() if g.layout != torch.strided else g for g in pieces])


def mean_of(micro: Sequence[ByTask], shares: Sequence[float]) -> ByTask:
    """(T) of the batch."""
    return [sum((g * s for g, s in zip(task, shares, strict=True)), task[0] * 0) for task in zip(*micro, strict=True)]


def common_to_several(model: nn.Module, shared: SharedLayers, losses: Sequence[Tensor]) -> bool:
    """Whether tasks share parameters that are not among the layers that are measured."""
    inside = {id(p) for p in shared.parameters}
    uses = [reached(loss) for loss in losses]
    return any(sum(id(p) in use for use in uses) > 1 for p in state.parameters_of(model) if id(p) not in inside)


@dataclass(frozen=True)
class Heads:
    """Private parameters as the optimizer is about to find them.

    Attributes:
        own: See :data:`PrivateParameters`.
        before: (T) what they are.
        given: (T) their ``.grad``.
        known: (T) of how the coming step updates each parameter; None: it does not.
    """

    own: PrivateParameters
    before: ByTask
    given: ByTask
    known: list[list[Rule | None]]

    def moved(self) -> ByTask:
        """(T) the update that was made since."""
        return [_flat(parameters) - before for parameters, before in zip(self.own, self.before, strict=True)]

    def scales(self, mean: ByTask) -> Array:
        """(T,) what the optimizer was given over each task's gradient; NaN: it was no multiple of it."""
        return np.array([_multiple(given, own) for given, own in zip(self.given, mean, strict=True)])

    def correction(self, optimizer: Optimizer, micro: Sequence[ByTask], shares: Sequence[float], mean: ByTask) -> Array:
        """(T,) what the left end lacks for gradient and update being of one batch; NaN: not told.

        After the step, since Adam's second moment of then is what the gradient was divided by.
        """
        scales, found = self.scales(mean), np.zeros(len(mean))
        for task, (own, known) in enumerate(zip(self.own, self.known, strict=True)):
            if own and scales[task] != 0:
                factor = _factor(optimizer, own, known, like=mean[task])
                apart = [one[task][None] for one in micro] if len(micro) > 1 else []
                noise = noise_products(mean[task][None], apart, shares, [mean[task].numel()], factor)
                found[task] = scales[task] * float(noise[0, 0, 0])
        return found


def look_at_heads(optimizer: Optimizer, own: PrivateParameters) -> Heads:
    """Before the optimizer's step."""
    return Heads(
        own=own,
        before=[_flat(parameters) for parameters in own],
        given=[as_vector([p.grad for p in parameters], parameters) for parameters in own],
        known=[rules(optimizer, parameters) for parameters in own],
    )


def in_first_adam_steps(known: Sequence[Rule | None]) -> bool:
    """Whether an Adam among these rules has made too few steps."""
    return any(rule is not None and rule.adam and rule.steps < FIRST_STEPS_OF_ADAM for rule in known)


def private_effects(gradients: ByTask, moved: ByTask) -> Array:
    """(T,) what the update changes each task's loss by, to first order."""
    return np.array([dot(g, u) for g, u in zip(gradients, moved, strict=True)])


def _flat(parameters: Sequence[nn.Parameter]) -> Tensor:
    return long_vector(list(parameters)) if parameters else torch.zeros(0)


def _nothing(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.zeros_like(_flat(parameters))


def _multiple(given: Tensor, own: Tensor) -> float:
    square = dot(own, own)
    factor = dot(given, own) / square if square else 0.0
    return factor if vector_norm(given - factor * own) <= MOST_MISSING * vector_norm(given) else float("nan")


def _factor(optimizer: Optimizer, own: Sequence[nn.Parameter], known: Sequence[Rule | None], *, like: Tensor) -> Tensor:
    pieces = []
    for parameter, rule in zip(own, known, strict=True):
        moves = rule is not None and parameter.grad is not None
        found = own_factor(rule, second_moment(optimizer, [parameter], rule)) if moves and rule is not None else 0.0
        pieces.append(torch.as_tensor(found, dtype=like.dtype, device=like.device).expand(parameter.numel()))
    return torch.cat(pieces)
