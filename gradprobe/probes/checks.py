"""What is checked in every call of a probe: tasks, losses, weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes import transfer
from gradprobe.rows.limits import MAX_NAME

Weights = Mapping[str, "float | Tensor"]
Losses = Mapping[str, Tensor]
Given = Mapping[str, "Tensor | float | Callable[[], Tensor] | None"]
"""Losses as a loop hands them in; a function stands for a task that is measured at due steps, and not trained."""


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
        if (size := len(name.encode())) > MAX_NAME - 16:
            raise ProbeError(
                f"{what}: the name {name[:40]!r}... has {size:,} bytes; at most {MAX_NAME - 16:,} are kept."
            )


def all_losses(tasks: Sequence[str], losses: Given) -> dict[str, Tensor]:
    """The loss of every task: those that are there, in the order in which they were given, then the absent ones.

    A task is absent from a step where it is left out, or its loss is None, a plain number, or has no graph, as YOLOv5's
    own loss has none on a batch without boxes.

    Returns:
        Task -> 0-d tensor or tensor of one number; of an absent task NaN, without a graph.

    Raises:
        ProbeError: A task is unknown, or a loss is no real scalar.
    """
    check_mapping("losses", losses)
    unknown = [task for task in losses if task not in tasks]
    if unknown:
        raise ProbeError(
            f"the probe was attached for tasks {list(tasks)}; losses have the unknown {unknown}. Pass each task's loss "
            "under its name; one that is absent from a step may be left out."
        )
    present = {}
    for task, loss in losses.items():
        if loss is None or isinstance(loss, (int, float)):
            continue
        fault = _shape_fault(loss)
        if fault:
            raise ProbeError(f"the loss of task {task!r} {fault}")
        assert isinstance(loss, Tensor)
        if loss.requires_grad:
            present[task] = loss
    if len(present) < len(tasks):
        device = next((loss.device for loss in present.values()), None)
        nothing = torch.full((), float("nan"), device=device)
        present |= {task: nothing for task in tasks if task not in present}
    return present


def is_present(loss: object) -> bool:
    """Whether a loss is of a task that takes part in the step."""
    return isinstance(loss, Tensor) and loss.requires_grad


def check_some(losses: Losses, given: Given) -> None:
    """Raise where no task takes part in a step.

    Raises:
        ProbeError: Says how each loss came to have no gradient.
    """
    if any(map(is_present, losses.values())):
        return
    how = [
        f"{task!r} {loss_fault(loss).split(', so')[0].rstrip('.')}" for task, loss in given.items() if loss is not None
    ]
    raise ProbeError(
        f"no task takes part in this step, so that there is no gradient to make or to measure: "
        f"{'; '.join(how) or 'no loss was given'}. Leave such a step out, as the loop has to leave out its backward."
    )


def _shape_fault(loss: object) -> str:
    """What is wrong with a loss whether or not it has a graph, and what to do; empty where nothing is."""
    if not isinstance(loss, Tensor):
        return f"is a {type(loss).__name__}, not a tensor."
    if loss.numel() != 1:
        return f"has shape {tuple(loss.shape)}; reduce it to one number, for example with .mean()."
    if loss.is_complex():
        return "is complex; a gradient needs a real one, for example .abs()."
    return ""


def loss_fault(loss: object) -> str:
    """What is wrong with a loss, and what to do; empty where nothing is."""
    fault = _shape_fault(loss)
    if not fault and isinstance(loss, Tensor) and not loss.requires_grad:
        return "has no graph (was it detached, or computed under no_grad?), so it has no gradient to measure."
    return fault


def weight_values(
    tasks: Sequence[str],
    weights: Weights | None,
    step: int,
    due: Callable[[], bool] | None = None,
    absent: Collection[str] = (),
) -> Array:
    """The weights in force, (T,) in the order of ``tasks``; 1 each where there are none.

    A task that is absent from the step needs none: NaN where it has none.

    Reading tensors on a GPU makes the host wait: where some are, and ``due`` says that the step is not measured, they
    are left alone, and the result is NaN.

    Raises:
        ProbeError: A task has no weight, an unknown one has, or a weight is NaN, infinite or no number.
    """
    if weights is None:
        return np.ones(len(tasks))
    check_mapping("weights", weights)
    given = {task: weight for task, weight in weights.items() if not (weight is None and task in absent)}
    missing = [task for task in tasks if task not in given and task not in absent]
    unknown = [task for task in weights if task not in tasks]
    if missing:
        raise ProbeError(f"weights lack {missing}; give one for each of {list(tasks)}.")
    if unknown:
        raise ProbeError(f"weights have the unknown {unknown}; the tasks are {list(tasks)}.")
    known = _from_devices(given, due)
    if known is None:
        return np.full(len(tasks), np.nan)
    known |= {task: _number(task, weight) for task, weight in given.items() if task not in known}
    for task, value in known.items():
        if not np.isfinite(value):
            raise ProbeError(f"the weight of task {task!r} is {value} at step {step}; it must be finite.")
    return np.array([known.get(task, np.nan) for task in tasks])


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
