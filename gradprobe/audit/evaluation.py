"""What the other tasks' losses depend on, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradprobe.audit.arm import Arm
from gradprobe.audit.compare import equal
from gradprobe.audit.experiment import Experiment
from gradprobe.audit.patches import patched
from gradprobe.audit.snapshot import Snapshot

if TYPE_CHECKING:
    from gradprobe.audit.pair import Turns

SEED = 20_200_119
"""Evaluations draw what they draw from this seed, so that two of them can be compared."""


class _Enough(BaseException):
    """Leaves a step function when its losses are known; no ``except Exception`` of the user's stops it."""


def relevant(turns: Turns, reached: set[str], differing: set[str], known: dict[str, bool]) -> set[str]:
    """The parameters and buffers that the other tasks depend on.

    Parameters that had a gradient without the task do. Of the others that differ, those do which change the other
    tasks' losses when they are put into the training without the task; found by bisection.

    Args:
        turns: Both arms, after their last step.
        reached: Parameters that had a gradient other than 0 without the task.
        differing: All parameters and buffers that differ somewhere.
        known: What earlier pairs found; brought up to date.
    """
    without, with_ = turns.arms
    doubtful = sorted(differing - reached - known.keys())
    if not doubtful:
        return set(reached) | {name for name, matters in known.items() if matters}
    with turns.of(with_):
        theirs = {name: tensor.detach().clone() for name, tensor in _tensors(with_.experiment).items()}
    with turns.of(without):
        here = Snapshot.taken(without.experiment)
        before = _losses(without, here)

        def matter(names: list[str]) -> bool:
            with torch.no_grad():
                for name in names:
                    _tensors(without.experiment)[name].copy_(theirs[name])
            changed = Snapshot.taken(without.experiment)
            try:
                return any(not equal(_number(before[key]), _number(v)) for key, v in _losses(without, changed).items())
            finally:
                here.put_back(without.experiment)

        found = set(_bisected(doubtful, matter))
    known.update({name: name in found for name in doubtful})
    return set(reached) | {name for name, matters in known.items() if matters}


def _bisected(names: list[str], matters: Callable[[list[str]], bool]) -> list[str]:
    if not names or not matters(names):
        return []
    if len(names) == 1:
        return names
    middle = len(names) // 2
    # Where only both halves together matter, all of them do.
    return [*_bisected(names[:middle], matters), *_bisected(names[middle:], matters)] or names


def evaluated(turns: Turns) -> dict[str, dict[str, tuple[float, float]]]:
    """Mode -> name -> (without, with): the other tasks' losses and metrics as both arms stand now."""
    found = []
    for arm in turns.arms:
        with turns.of(arm):
            here = Snapshot.taken(arm.experiment)
            found.append(_losses(arm, here))
    a, b = found
    modes: dict[str, dict[str, tuple[float, float]]] = {"training": {}, "evaluation": {}}
    for mode, name in a:
        if (mode, name) in b:
            modes[mode][name] = (float(a[mode, name]), float(b[mode, name]))
    return modes


def _losses(arm: Arm, here: Snapshot) -> dict[tuple[str, str], Any]:
    """Of the other tasks, in both modes; the experiment is left in the state ``here``."""
    result: dict[tuple[str, str], Any] = {}
    for mode in ("training", "evaluation"):
        arm.experiment.model.train(mode == "training")
        torch.manual_seed(SEED)
        try:
            for name, value in _values(arm).items():
                result[mode, name] = value
        finally:
            here.put_back(arm.experiment)
    return result


def _values(arm: Arm) -> Mapping[str, Any]:
    others = [task for task in arm.weights if task != arm.task]
    evaluate = arm.experiment.evaluate
    if evaluate is not None:
        with torch.no_grad():
            values = evaluate(others)
        return {name: v for name, v in values.items() if name.split("/")[0] != arm.task}
    return _of_a_step(arm.experiment, arm.first_batch, {t: arm.weights[t] for t in others})


def _of_a_step(experiment: Experiment, batch: Any, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The losses that the step function would hand over; it is left there, and what it did before is undone later."""
    found: dict[str, Tensor] = {}

    class Listener:
        def losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found.update({task: loss.detach().clone() for task, loss in losses.items()})
            if found.keys() >= weights.keys():
                raise _Enough
            return dict(losses)

        def decide(self, name: str, value: bool) -> bool:
            return value

    kept = {module: module.training for module in experiment.model.modules()}

    def train(mode: bool = True) -> Any:
        """A step function that calls ``model.train()`` is not to leave the mode that is asked for."""
        return experiment.model

    with patched(experiment.model, "train", train), suppress(_Enough):
        experiment.step(Listener(), batch, dict(weights))
    for module, mode in kept.items():
        module.training = mode
    return found


def _tensors(experiment: Experiment) -> dict[str, Tensor]:
    return {**dict(experiment.model.named_parameters()), **dict(experiment.model.named_buffers())}


def _number(value: Any) -> Tensor:
    return value.reshape(()) if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
