"""The weights that a step function really uses, measured from its gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradprobe.audit.arm import Closing, LockstepArm
from gradprobe.audit.doors import gradients_of
from gradprobe.audit.experiment import made
from gradprobe.audit.pair import Setting
from gradprobe.audit.snapshot import random_state_kept

TOLERANCE = 1e-4
"""Relative; products of float32 gradients in float64 agree to 1e-6."""


@dataclass(frozen=True)
class _InForce:
    """Weights in force in one step.

    Attributes:
        given: Task -> the weight that the step function was given.
        used: Task -> the factor of the task's gradient in ``.grad``, by least squares; NaN: it has no gradient.
        residual: The part of ``.grad`` that is no combination of the tasks' gradients, relative to it.
    """

    given: Mapping[str, float]
    used: Mapping[str, float]
    residual: float


class _Watch(Closing):
    def __init__(self) -> None:
        self.found: _InForce | None = None
        self._tasks: dict[str, dict[str, Tensor]] = {}

    def losses(self, arm: LockstepArm, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        named = dict(arm.experiment.model.named_parameters())
        for task, loss in losses.items():
            summed = self._tasks.setdefault(task, {})
            for name, gradient in gradients_of(loss, named).items():
                summed[name] = summed[name] + gradient if name in summed else gradient
        return losses

    def after_backward(self, arm: LockstepArm) -> None:
        tasks = list(self._tasks)
        names = sorted({name for task in tasks for name in self._tasks[task]})
        parameters = dict(arm.experiment.model.named_parameters())
        columns = [_flat([self._tasks[t].get(n, torch.zeros_like(parameters[n])) for n in names]) for t in tasks]
        made_ = [parameters[n].grad for n in names]
        target = _flat([torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, made_, strict=True)])
        target = target / arm.experiment.scale
        self.found = _InForce(dict(arm.weights), *_solved(tasks, columns, target))

    def before_optimizer(self, arm: LockstepArm, optimizer: Optimizer) -> None:
        raise _StepSeen


class _StepSeen(BaseException):
    """The step need not be finished."""


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors]) if tensors else torch.zeros(0).double()


def _solved(tasks: list[str], columns: list[Tensor], target: Tensor) -> tuple[dict[str, float], float]:
    basis = torch.stack(columns, dim=1)
    length = basis.norm(dim=0)
    known = [i for i in range(len(tasks)) if 0 < float(length[i]) < math.inf]
    used = dict.fromkeys(tasks, math.nan)
    if not known or not bool(target.isfinite().all()):
        return used, math.nan
    unit = basis[:, known] / length[known]
    found = torch.linalg.lstsq(unit, target[:, None], driver="gelsd").solution[:, 0]
    for i, factor in zip(known, found, strict=True):
        used[tasks[i]] = float(factor / length[i])
    norm = float(target.norm())
    return used, float((unit @ found - target).norm()) / norm if norm else 0.0


def _weights_in_force(setting: Setting, weight: float | None) -> _InForce | None:
    """What the first step uses; None where it takes no backward, or its gradients are not finite.

    Args:
        setting: Of the audit.
        weight: Of the task; None: it is absent.
    """
    with random_state_kept():
        experiment = made(setting.make)
        setting.snapshot.put_back(experiment)
        weights = {
            t: (weight if t == setting.task else w)
            for t, w in experiment.weights.items()
            if t != setting.task or weight is not None
        }
        watch = _Watch()
        try:
            LockstepArm(experiment, {t: float(w or 0.0) for t, w in weights.items()}, setting.task, [watch]).advance()
        except _StepSeen:
            pass
        finally:
            setting.snapshot.put_back(experiment)
        return watch.found


_RENORMALISED, _MEAN, _OTHER = "renormalised weights", "mean over tasks", "weights"


def named(setting: Setting, weight: float) -> tuple[str, str]:
    """What the door ``weights`` is, more closely: by the factors that the other tasks get at three weights of the task.

    Returns:
        A name, and the evidence in words.
    """
    doses = (weight, weight + 1.0, weight + 3.0)
    found = [_weights_in_force(setting, w) for w in (None, *doses)]
    if any(f is None or not f.residual < TOLERANCE for f in found):
        worst = max((f.residual for f in found if f is not None), default=math.nan)
        return _OTHER, f"{worst:.2g} of the gradient is no combination of the tasks' gradients"
    alone, *factors = [_factor(f, setting.task) for f in found if f is not None]
    said = ", ".join(f"{factor:.4g} at weight {w:g}" for w, factor in zip(doses, factors, strict=True))
    evidence = f"the others' weights are multiplied by {alone:.4g} without the task, and with it by {said}"
    if max(factors) - min(factors) > TOLERANCE * max(factors):
        others = sum(w for t, w in (found[0].given if found[0] else {}).items())
        sums = [factor * (others + w) for w, factor in zip(doses, factors, strict=True)]
        constant = max(sums) - min(sums) < 0.05 * max(sums)
        return _RENORMALISED, evidence + (f"; the weights always sum to {sums[-1]:.4g}" if constant else "")
    return (_MEAN if abs(factors[0] - alone) > TOLERANCE * alone else _OTHER), evidence


def _factor(found: _InForce, task: str) -> float:
    ratios = [u / found.given[t] for t, u in found.used.items() if t != task and found.given[t] and not math.isnan(u)]
    return sum(ratios) / len(ratios) if ratios else math.nan
