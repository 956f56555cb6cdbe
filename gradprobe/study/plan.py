"""What is fixed before the first run, and kept: in plan.json, and from there in every file of the study."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradprobe import whole_files
from gradprobe.errors import UsageError
from gradprobe.study.arms import Arm
from gradprobe.trainers.settings import Settings, as_provenance

NAME = "plan.json"

PER_ARM = ("trainer", "task", "seed", "from_run", "double", "double_sizes")
"""Settings that are no condition of the whole study."""

BY_MACHINE = ("processes",)
"""Settings that the machine decides where nobody else does."""

FROM_A_RUN = "gradnorm-static"
"""The trainer whose task weights become known only when it is made."""

BURN_IN = 20
"""Steps before the window under Adam, whose second moment is that of few gradients until then."""


def parse_window(text: str, settings: Settings, steps: int | None) -> tuple[int, int] | None:
    """The training steps that count, from the first to before the last.

    Args:
        text: ``20:200``; an empty side is the default.
        settings: Of the baseline.
        steps: Of the whole training; None: unknown.

    Returns:
        None: not fixed, since the number of steps is unknown.

    Raises:
        UsageError: Malformed, or empty.
    """
    first, colon, last = text.partition(":")
    try:
        start = int(first) if first.strip() else default_start(settings, steps)
        stop = int(last) if last.strip() else steps
    except ValueError:
        raise UsageError(f"--window {text!r}: write two steps, such as 20:200.") from None
    if text and not colon:
        raise UsageError(f"--window {text!r}: write two steps, such as 20:200.")
    if stop is None:
        return None
    if not 0 <= start < stop:
        raise UsageError(f"--window {text!r}: from step {start} to {stop} is no span of a training.")
    return start, stop


def default_start(settings: Settings, steps: int | None) -> int:
    """Where the window begins; 0 where the training is too short to leave anything out."""
    adaptive = settings.optimizer != "SGD"
    return BURN_IN if adaptive and (steps is None or steps >= 2 * BURN_IN) else 0


def parse_pairs(text: str, tasks: Sequence[str]) -> list[str]:
    """``cls>det``: what cls does to det; empty: every ordered pair.

    Raises:
        UsageError: A pair is malformed, or names no two tasks.
    """
    every = [f"{source}>{target}" for target in tasks for source in tasks if source != target]
    chosen = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [pair for pair in chosen if pair not in every]
    if wrong:
        raise UsageError(f"--pairs {wrong[0]!r}: no pair of tasks (there are: {', '.join(every)}).")
    return chosen or every


def common(settings: Sequence[Settings]) -> dict[str, Any]:
    """The settings that all arms share, as they are stored in a run file; those of one arm or seed are left out."""
    stored = [as_provenance(each) for each in settings]
    own = (*PER_ARM, *BY_MACHINE, *(("task_weights",) if any(each.trainer == FROM_A_RUN for each in settings) else ()))
    found = {}
    for name, value in stored[0].items():
        endless = isinstance(value, float) and not math.isfinite(value)  # has no form in JSON
        if name not in own and not endless and all(other[name] == value for other in stored):
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def arm_flags(arms: Sequence[Arm]) -> dict[str, str]:
    """Arm -> what it is recorded with."""
    return {arm.name: " ".join([arm.trainer, *map(without_folder, arm.flags)]) for arm in arms}


def without_folder(word: str) -> str:
    """A path cut to its own name: folders tell who and where, not what."""
    return word.replace("\\", "/").rpartition("/")[2] or word


def write(folder: Path, plan: Mapping[str, Any]) -> Path:
    """Write the plan, or find it there already.

    Raises:
        UsageError: The folder was begun with another plan; says in what it differs.
    """
    path = folder / NAME
    text = json.dumps(plan, indent=2, allow_nan=False) + "\n"
    with whole_files.telling(path):
        whole_files.target(path, overwrite=True)
    if path.exists():
        _refuse_another(path, json.loads(text))
        return path
    folder.mkdir(parents=True, exist_ok=True)
    begun = sorted(found.name for found in folder.glob("*.h5"))
    if begun:
        raise UsageError(
            f"{folder}: holds run files ({begun[0]}, ...) and no {NAME}: they were recorded before anything was fixed. "
            "Take a new folder: --out."
        )
    with whole_files.telling(path):
        whole_files.write(path, text)
    return path


def _refuse_another(path: Path, plan: dict[str, Any]) -> None:
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a plan ({error}). Take a new folder: --out.") from None
    if old == plan:
        return
    told = "; ".join(differences(old, plan)[:4])
    raise UsageError(
        f"{path}: this study was begun with another plan ({told}). What was fixed before the runs stays fixed: go on "
        "with the same, or take a new folder: --out."
    )


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs, each as ``name: old, now new``.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c: 2, now 3']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        found = [differences(old.get(name), new.get(name), f"{where}{name}.") for name in names]
        return [item for items in found for item in items]
    return [] if old == new else [f"{where[:-1]}: {_said(old)}, now {_said(new)}"]


def _said(value: Any) -> str:
    return "nothing" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
