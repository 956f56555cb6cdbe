"""A training step in which every task's own gradient is known, and in which the optimizer finds their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradprobe.audit import Experiment
from gradprobe.audit.arm import patched
from gradprobe.errors import TrainingError, UsageError
from gradprobe.forks.shadow_moments import ByParameter
from gradprobe.ledger.update_parts import fit

MOST_LEFT = 1e-3
"""How much of a gradient its tasks may leave out, over its length, and how much its factor may move."""

_HISTORY = "a branch needs the history that other static weights would have had, and here there is none"


class GradientNotFiniteError(TrainingError):
    """A gradient is NaN or infinite, so that nothing can be said of it."""


class PlainTrace:
    """The trace of a step at which nobody looks, see :class:`gradprobe.audit.Trace`."""

    def losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(losses)

    def decide(self, name: str, value: bool) -> bool:
        return value


Before = Callable[[int, list[ByParameter]], None]
"""Is called with the number of an optimizer and the (T) gradients of its parameters, unweighted, before its step."""


class WatchedSteps:
    """Makes steps of an experiment and sees each task's gradient.

    What the optimizer finds must be ``factor * sum_i w_i g_i``, with one factor at all steps and weights: 1, or what a
    mean over micro-batches or tasks makes of it. Whatever does otherwise has an effect here: clipping, weights that
    move or are normalised, gradient surgery, a penalty that is no task's loss.

    Attributes:
        factors: Of each optimizer; None before the first step.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self.tasks = tuple(experiment.weights)
        self.factors: list[float | None] = [None] * len(experiment.optimizers)
        self._of_optimizer = [[p for g in o.param_groups for p in g["params"]] for o in experiment.optimizers]
        self._parameters = list(dict.fromkeys(p for group in self._of_optimizer for p in group if p.requires_grad))

    def step(
        self,
        batch: Any,
        weights: Mapping[str, float],
        before: Before = lambda number, gradients: None,
        after: Callable[[int], None] = lambda number: None,
    ) -> None:
        """One step of the experiment.

        Raises:
            UsageError: The step function never handed over the losses.
            TrainingError: The optimizer found something else, or did not step exactly once.
        """
        trace = _Gradients(self._experiment, self.tasks, self._parameters)
        made = [0] * len(self._of_optimizer)

        def look(number: int) -> None:
            made[number] += 1
            if not trace.called:
                raise UsageError(
                    "the step function did not call trace.losses(losses) before its backward and outside of a closure "
                    "of optimizer.step; a forked training needs the unweighted loss of every task there."
                )
            own = [{p: g[p] for p in self._of_optimizer[number] if p in g} for g in trace.gradients]
            self._check(number, own, weights)
            factor = self.factors[number]
            if factor not in (None, 1.0):
                own = [{p: g * factor for p, g in task.items()} for task in own]
            before(number, own)

        with _stepping(self._experiment, look, after):
            self._experiment.step(trace, batch, dict(weights))
        if any(count != 1 for count in made):
            raise TrainingError(
                f"an optimizer stepped {made[[c != 1 for c in made].index(True)]} times in one step of the training, "
                "not once (a GradScaler that skips a step, or accumulation over several calls, is such a case): "
                f"{_HISTORY}."
            )

    def _check(self, number: int, own: list[ByParameter], weights: Mapping[str, float]) -> None:
        given = [p for p in self._of_optimizer[number] if p.grad is not None]
        found = [_dense(p.grad) for p in given if p.grad is not None]
        with torch.no_grad():
            summed = [torch.zeros_like(p) for p in given]
            for task, gradients in zip(self.tasks, own, strict=True):
                places = [k for k, p in enumerate(given) if p in gradients]
                if places and weights[task]:
                    torch._foreach_add_(
                        [summed[k] for k in places], [gradients[given[k]] for k in places], alpha=float(weights[task])
                    )
            factor = self.factors[number]
            if factor is None:
                factor, left = fit(found, summed)
                if factor:  # 0: there is no gradient at all yet
                    self.factors[number] = 1.0 if abs(factor - 1) < MOST_LEFT else factor
            else:
                left = _left(found, summed, factor)
        if not left <= MOST_LEFT:
            self._refuse(found, summed, factor or 1.0, weights)

    def _refuse(self, found: list[Tensor], summed: list[Tensor], factor: float, weights: Mapping[str, float]) -> None:
        now, left = fit(found, summed)
        at = ", ".join(f"{task}={weight:g}" for task, weight in weights.items())
        if left != left:
            raise GradientNotFiniteError(f"at the weights {at} a gradient is not finite. Lower the learning rate.")
        if left <= MOST_LEFT:
            raise TrainingError(
                f"at the weights {at} the optimizer finds {now / factor:.4g} times the weighted sum of the tasks' "
                f"gradients that it found before (clipping, or weights that are normalised or move, do that): "
                f"{_HISTORY}."
            )
        raise TrainingError(
            f"at the weights {at} the optimizer's gradient is not the weighted sum of the tasks' gradients: {left:.2g} "
            "of its length is something else (gradient surgery, weights that move or are learned, a penalty beside the "
            f"tasks, half precision): {_HISTORY}."
        )


class _Gradients:
    """A trace that makes each task's gradient before the step's own backward; sums over the calls of one step."""

    def __init__(self, experiment: Experiment, tasks: tuple[str, ...], parameters: list[Tensor]) -> None:
        self._scale, self._tasks, self._parameters = experiment.scale, tasks, parameters
        self.gradients: list[ByParameter] = [{} for _ in tasks]
        self.called = False

    def losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.called = True
        for task, loss in losses.items():
            if task not in self._tasks:
                raise UsageError(f"the step function handed over a loss of {task!r}, which has no weight.")
            if not loss.requires_grad:
                continue
            made = torch.autograd.grad(loss * self._scale, self._parameters, retain_graph=True, allow_unused=True)
            mine = self.gradients[self._tasks.index(task)]
            for parameter, gradient in zip(self._parameters, made, strict=True):
                if gradient is not None:
                    gradient = _dense(gradient) if self._scale == 1 else _dense(gradient) / self._scale
                    mine[parameter] = mine[parameter] + gradient if parameter in mine else gradient
        return dict(losses)

    def decide(self, name: str, value: bool) -> bool:
        return value


@contextmanager
def _stepping(experiment: Experiment, before: Callable[[int], None], after: Callable[[int], None]) -> Iterator[None]:
    """``before`` and ``after`` are called with the number of each optimizer that steps."""
    with ExitStack() as stack:
        for number, optimizer in enumerate(experiment.optimizers):
            stack.enter_context(patched(optimizer, "step", _around(optimizer, number, before, after)))
        yield


def _around(
    optimizer: Optimizer, number: int, before: Callable[[int], None], after: Callable[[int], None]
) -> Callable[..., Any]:
    original = optimizer.step

    @wraps(original)
    def step(*args: Any, **options: Any) -> Any:
        before(number)
        result = original(*args, **options)
        after(number)
        return result

    return step


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _left(found: list[Tensor], summed: list[Tensor], factor: float) -> float:
    """What the sum leaves of the gradient, over the gradient's length; NaN where something is not finite."""
    square = sum(float(n) ** 2 for n in torch._foreach_norm(found))
    rest = sum(float(n) ** 2 for n in torch._foreach_norm(torch._foreach_add(found, summed, alpha=-factor)))
    return float((rest / square) ** 0.5) if square else float(rest > 0)
