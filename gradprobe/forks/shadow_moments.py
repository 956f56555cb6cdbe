"""The optimizer state to which other static weights of the tasks would have led, on the same gradients.

A step's gradient is ``g = sum_i w_i g_i + d``, where d is weight decay, if that is part of the gradient: one more task
of weight 1. The first moment is linear in g, so it is ``sum_i w_i m_i``, and the second is ``sum_ij w_i w_j v_ij``,
where m_i and v_ij are the same exponential averages of g_i and of ``g_i * g_j``. Both hold exactly, for any weights
that did not change meanwhile; what remains is rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradprobe.errors import UsageError
from gradprobe.ledger.update_parts import Rule, rules, why_not

ByParameter = dict[Tensor, Tensor]
"""Parameter -> a tensor of its shape; a parameter that is not in it has zeros."""


@dataclass(frozen=True)
class _Fading:
    """What the moments of a parameter need to know of its :class:`Rule`."""

    adam: bool
    keep: float
    take: float
    beta2: float
    decay: float  # as part of the gradient

    @classmethod
    def of(cls, rule: Rule) -> _Fading:
        return cls(rule.adam, rule.keep, rule.take, rule.beta2, 0.0 if rule.decoupled else rule.decay)


class ShadowMoments:
    """Exponential averages of each task's gradients, and of their products, beside one optimizer.

    They take T buffers of the size of the parameters, and under Adam T (T + 1) / 2 more, with T + 1 for T where weight
    decay is part of the gradient. A parameter that a task does not reach has none of that task.

    Args:
        optimizer: SGD, Adam or AdamW, before its first step.
        tasks: T.

    Raises:
        UsageError: The optimizer is another one or has amsgrad or maximize, so its state is not made of such averages;
            or it has a state already, whose history nobody knows.
    """

    def __init__(self, optimizer: Optimizer, tasks: int) -> None:
        if why := why_not(optimizer):
            raise UsageError(f"no branch can be taken with a matched optimizer history: {why}.")
        if any(optimizer.state.values()):
            raise UsageError(
                "the optimizer has a state already, and which task made it is unknown; fork a training from its "
                "beginning, with a new optimizer."
            )
        self.optimizer = optimizer
        self._tasks = tasks
        self._first: list[ByParameter] = [{} for _ in range(tasks + 1)]
        self._second: dict[tuple[int, int], ByParameter] = {
            pair: {} for pair in combinations_with_replacement(range(tasks + 1), 2)
        }

    @property
    def has_second(self) -> bool:
        """Whether there is a second moment."""
        return isinstance(self.optimizer, torch.optim.Adam)

    @torch.no_grad()
    def add(self, gradients: Sequence[ByParameter]) -> None:
        """Take in a step; to be called when ``.grad`` is what the optimizer will find, before it steps.

        Args:
            gradients: (T) of the unweighted tasks. Parameters whose ``.grad`` is None are left out, as the optimizer
                leaves them out.
        """
        for fading, members in self._members().items():
            decay = {p: p.detach() * fading.decay for p in members} if fading.decay else {}
            sources = [*({p: g[p] for p in members if p in g} for g in gradients), decay]
            if fading.adam or fading.keep:
                for moment, new in zip(self._first, sources, strict=True):
                    _fade(moment, members, new, fading.keep)
                    if new:
                        torch._foreach_add_([moment[p] for p in new], list(new.values()), alpha=fading.take)
            for (i, j), moment in self._second.items() if fading.adam else ():
                both = [p for p in sources[i] if p in sources[j]]
                _fade(moment, members, both, fading.beta2)
                if both:
                    torch._foreach_addcmul_(
                        [moment[p] for p in both],
                        [sources[i][p] for p in both],
                        [sources[j][p] for p in both],
                        value=1 - fading.beta2,
                    )

    def _members(self) -> dict[_Fading, list[Tensor]]:
        stepped = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        found: dict[_Fading, list[Tensor]] = {}
        for parameter, rule in zip(stepped, rules(self.optimizer, stepped), strict=True):
            assert rule is not None
            found.setdefault(_Fading.of(rule), []).append(parameter)
        return found

    @torch.no_grad()
    def first(self, weights: Sequence[float]) -> ByParameter:
        """The first moment (the momentum buffer) at these weights, (T)."""
        return _combined(zip(self._first, self._with_decay(weights), strict=True))

    @torch.no_grad()
    def second(self, weights: Sequence[float]) -> ByParameter:
        """Adam's second moment at these weights, (T). At least 0: where tasks cancel, rounding could leave less."""
        w = self._with_decay(weights)
        terms = [(moment, w[i] * w[j] * (1 if i == j else 2)) for (i, j), moment in self._second.items()]
        return {p: v.clamp_(min=0) for p, v in _combined(terms).items()}

    def _with_decay(self, weights: Sequence[float]) -> list[float]:
        assert len(weights) == self._tasks
        return [*map(float, weights), 1.0]

    @torch.no_grad()
    def put(self, weights: Sequence[float], second: Sequence[float] | None = None) -> None:
        """Give the optimizer the state of these weights; how many steps it counts stays.

        Args:
            weights: (T).
            second: Those of the second moment, where they are others. Numbers on which their gradients never acted keep
                the second moment of ``weights``.
        """
        moments = self._moments(weights)
        if second is not None:
            other = self.second(second)
            moments["exp_avg_sq"] = {
                p: torch.where(other[p] > 0, other[p], own) if p in other else own
                for p, own in moments["exp_avg_sq"].items()
            }
        for parameter, state in self.optimizer.state.items():
            for name, values in moments.items():
                if state.get(name) is not None:
                    state[name].copy_(values[parameter]) if parameter in values else state[name].zero_()

    def _moments(self, weights: Sequence[float]) -> dict[str, ByParameter]:
        """By their names in torch's optimizers."""
        first = self.first(weights)
        return {"exp_avg": first, "exp_avg_sq": self.second(weights), "momentum_buffer": first}

    @torch.no_grad()
    def error(self, weights: Sequence[float]) -> float:
        """How far the state of the weights that were trained is from the optimizer's own, relative to that; 0: equal.

        The largest over the moments, each taken over all parameters.
        """
        largest = 0.0
        for name, values in self._moments(weights).items():
            away = size = 0.0
            for parameter, state in self.optimizer.state.items():
                if (own := state.get(name)) is not None:
                    own = own.double()
                    away += float((own - values[parameter].double() if parameter in values else own).square().sum())
                    size += float(own.square().sum())
            largest = max(largest, (away / size) ** 0.5 if size else float(away > 0))
        return largest


def _fade(moment: ByParameter, members: Sequence[Tensor], new: Iterable[Tensor], keep: float) -> None:
    """One step older; begin with zeros where something new comes in for the first time."""
    old = [moment[p] for p in members if p in moment]
    if old:
        torch._foreach_mul_(old, keep)
    moment.update({p: torch.zeros_like(p) for p in new if p not in moment})


def _combined(terms: Iterable[tuple[ByParameter, float]]) -> ByParameter:
    """The weighted sum of what is there."""
    found: ByParameter = {}
    for moment, weight in terms:
        for parameter, value in moment.items():
            found.setdefault(parameter, torch.zeros_like(value)).add_(value, alpha=weight)
    return found
