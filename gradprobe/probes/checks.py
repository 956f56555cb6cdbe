"""What is checked in every call of a probe: tasks, losses, weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes import transfer

Weights = Mapping[str, "float | Tensor"]
Losses = Mapping[str, Tensor]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""All but tab and line feed; and halves of surrogate pairs, which UTF-8 does not have."""


def task_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks of a probe.

    Raises:
        ProbeError: Fewer than two, two of one name, or a name with ``|`` or that a file cannot hold.
    """
    names = tuple(tasks)
    if isinstance(tasks, str) or len(names) < 2 or len(set(names)) != len(names):
        raise ProbeError(f"tasks={tasks!r}: give a list of two or more different names.")
    check_names("tasks", names)
    if any("|" in task for task in names):
        raise ProbeError(f"tasks={list(names)}: a name must not contain '|', which joins the names of a pair.")
    return names


def check_names(what: str, names: Iterable[object]) -> None:
    """Raise for names with which no run file could be read again.

    Args:
        what: The argument that they are from.
        names: Of tasks or layers.

    Raises:
        ProbeError: One is no text, empty, or has control characters; says which.
    """
    for name in names:
        if not isinstance(name, str) or not name or _CONTROL.search(name):
            raise ProbeError(f"{what}: the name {name!r} must be text, not empty, and without control characters.")


def check_losses(tasks: tuple[str, ...], losses: Losses) -> None:
    """Raise for a call that cannot be meant.

    Raises:
        ProbeError: A task is missing or unknown, or a loss is no real scalar or has no graph.
    """
    check_mapping("losses", losses)
    missing, unknown = [t for t in tasks if t not in losses], [t for t in losses if t not in tasks]
    if missing or unknown:
        wrong = [f"lack {missing}"] * bool(missing) + [f"have the unknown {unknown}"] * bool(unknown)
        raise ProbeError(
            f"the probe was attached for tasks {list(tasks)}; losses {' and '.join(wrong)}. "
            "Pass one loss per task, under these names."
        )
    for task, loss in losses.items():
        fault = loss_fault(loss)
        if fault:
            raise ProbeError(f"the loss of task {task!r} {fault}")


def loss_fault(loss: object) -> str:
    """What is wrong with a loss, and what to do; empty where nothing is."""
    if not isinstance(loss, Tensor):
        return f"is a {type(loss).__name__}, not a tensor."
    if loss.numel() != 1:
        return f"has shape {tuple(loss.shape)}; reduce it to one number, for example with .mean()."
    if loss.is_complex():
        return "is complex; a gradient needs a real one, for example .abs()."
    if not loss.requires_grad:
        return "has no graph (was it detached, or computed under no_grad?), so it has no gradient to measure."
    return ""


def weight_values(
    tasks: Sequence[str], weights: Weights | None, step: int, due: Callable[[], bool] | None = None
) -> Array:
    """The weights in force, (T,) in the order of ``tasks``; 1 each where there are none.

    Reading tensors on a GPU makes the host wait: where some are, and ``due`` says that the step is not measured, they
    are left alone, and the result is NaN.

    Raises:
        ProbeError: A task has no weight, an unknown one has, or a weight is NaN, infinite or no number.
    """
    if weights is None:
        return np.ones(len(tasks))
    check_mapping("weights", weights)
    missing, unknown = [t for t in tasks if t not in weights], [t for t in weights if t not in tasks]
    if missing:
        raise ProbeError(f"weights lack {missing}; give one for each of {list(tasks)}.")
    if unknown:
        raise ProbeError(f"weights have the unknown {unknown}; the tasks are {list(tasks)}.")
    known = _from_devices(weights, due)
    if known is None:
        return np.full(len(tasks), np.nan)
    values = np.array([known[task] if task in known else _number(task, weights[task]) for task in tasks])
    for task, value in zip(tasks, values, strict=True):
        if not np.isfinite(value):
            raise ProbeError(f"the weight of task {task!r} is {value} at step {step}; it must be finite.")
    return values


def _from_devices(weights: Weights, due: Callable[[], bool] | None) -> dict[str, float] | None:
    """The weights that lie on a GPU, in one transfer; None: there are some, and nobody will look at them."""
    there = {t: w for t, w in weights.items() if isinstance(w, Tensor) and not w.is_cpu and w.numel() == 1}
    if there and due is not None and not due():
        return None
    return dict(zip(there, transfer.values(list(there.values())), strict=True))


def check_mapping(what: str, given: object) -> None:
    """Raise where something is no mapping.

    Raises:
        ProbeError: Says what it is instead.
    """
    if not isinstance(given, Mapping):
        raise ProbeError(f"{what} are a {type(given).__name__}; give a dict: task -> one of them.")


def _number(task: str, weight: float | Tensor) -> float:
    try:
        return float(weight.detach()) if isinstance(weight, Tensor) else float(weight)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ProbeError(f"the weight of task {task!r} is {weight!r}; it must be one number.") from error
