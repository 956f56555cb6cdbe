"""What is fixed before the first run, and kept: in plan.json, and from there in every file of the study."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradprobe import whole_files
from gradprobe.errors import GradprobeError, UsageError
from gradprobe.measures import first_settled_step
from gradprobe.study.arms import Arm
from gradprobe.trainers.problems import is_own, kind_of
from gradprobe.trainers.problems.dial_spec import parse_dial
from gradprobe.trainers.settings import Settings, as_provenance

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "plan.json"

_LARGEST = 1 << 20
"""Bytes of a plan that is read."""

_DEEPEST = 12
"""Objects and lists within each other in a plan that is read."""

_LONGEST = 80
"""Characters of a value in a message."""

_PER_ARM = ("trainer", "task", "seed", "from_run", "double", "double_sizes")
"""Settings that are no condition of the whole study."""

_BY_MACHINE = ("processes",)
"""Settings that the machine decides where nobody else does."""

_FROM_A_RUN = "gradnorm-static"
"""The trainer whose task weights become known only when it is made."""


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
        start = int(first) if first.strip() else _default_start(settings, steps)
        stop = int(last) if last.strip() else steps
    except ValueError:
        raise UsageError(f"--window {text!r}: write two steps, such as 20:200.") from None
    if text and not colon:
        raise UsageError(f"--window {text!r}: write two steps, such as 20:200.")
    if stop is None:
        return None
    if not 0 <= start < stop < 2**63:
        raise UsageError(f"--window {text!r}: from step {start} to {stop} is no span of a training.")
    return start, stop


def _default_start(settings: Settings, steps: int | None) -> int:
    """Where the window begins; 0 where the training is too short to leave anything out."""
    start = first_settled_step(settings.optimizer)
    return start if steps is None or steps >= 2 * start else 0


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
    own = (
        *_PER_ARM,
        *_BY_MACHINE,
        *(("task_weights",) if any(each.trainer == _FROM_A_RUN for each in settings) else ()),
    )
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
    """Write the plan, or find it there already. Of two studies that begin at once one writes it.

    Raises:
        UsageError: The folder was begun with another plan; says in what it differs.
    """
    path = folder / NAME
    text = json.dumps(plan, indent=2, allow_nan=False) + "\n"
    try:
        whole_files.target(path, overwrite=True)
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if check(folder, plan):
                return path
            whole_files.write(path, text)
    except OSError as error:
        raise UsageError(f"{path}: the plan cannot be written there ({error}). Take another folder: --out.") from None
    return path


def check(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Whether the plan is there already; writes nothing.

    Raises:
        UsageError: The folder was begun with another plan, or without one.
    """
    path = folder / NAME
    if path.exists():  # a link to nothing yet is written through
        try:
            old = read(path)
        except UsageError as error:
            raise UsageError(f"{error} Take a new folder: --out.") from None
        _refuse_another(path, old, json.loads(json.dumps(plan)))
        return True
    begun = sorted(found.name for found in folder.glob("*.h5"))
    if begun:
        raise UsageError(
            f"{folder}: holds run files ({begun[0]}, ...) and no {NAME}: they were recorded before anything was fixed. "
            "Take a new folder: --out."
        )
    return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While this process alone looks whether there is a plan, and writes one; a kill ends it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read(path: Path) -> dict[str, Any]:
    """A plan that ``gradprobe study`` wrote, or anyone: values to compare and to keep. Nothing in it is run.

    Raises:
        UsageError: It cannot be read, is no JSON object, or no plan of ours could be as large or as deep.
    """
    try:
        content = whole_files.read(path, _LARGEST)
        found = json.loads(content.decode("utf-8"), parse_constant=_no_number, parse_int=_stored)
        deep = _depth(found) > _DEEPEST
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from None
    except RecursionError:
        deep = True
    except ValueError as error:
        raise UsageError(f"{path}: is not JSON: {_cut(str(error))}.") from None
    if deep:
        raise UsageError(f"{path}: is no plan: it nests deeper than {_DEEPEST} levels.")
    if not isinstance(found, dict):
        raise UsageError(f"{path}: holds no JSON object, but a {type(found).__name__}.")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number there")


def _stored(digits: str) -> int:
    if not -(2**63) <= (number := int(digits)) < 2**63:
        raise ValueError(f"{digits[:24]} is larger than a file can hold")
    return number


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _refuse_another(path: Path, old: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    if old == plan:
        return
    differing = "; ".join(map(_cut, differences(old, plan)[:4]))
    raise UsageError(
        f"{path}: this study was begun with another plan ({differing}). What was fixed before the runs stays fixed: go "
        "on with the same, or take a new folder: --out."
    )


def _cut(text: str) -> str:
    return text if len(text) <= 2 * _LONGEST else f"{text[: 2 * _LONGEST]}..."


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs, each as ``name: old, now new``.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c: 2, now 3']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        found = [differences(old.get(name), new.get(name), f"{where}{name}.") for name in names]
        return [item for items in found for item in items]
    return [] if old == new else [f"{where[:-1]}: {_as_text(old)}, now {_as_text(new)}"]


def _as_text(value: Any) -> str:
    text = "nothing" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


MEASURED: Mapping[str, tuple[str, ...]] = {
    "micro_batches": ("--micro-batches", "4"),
    "probe_loader": ("--probe-loader", "val"),
    "ledger": ("--ledger",),
}
"""What every run measures where nothing else is asked for: setting -> the flags that switch it on."""


def measuring_flags(given: Collection[str]) -> list[str]:
    """What is to be added to every run.

    Args:
        given: Settings that the user chose.
    """
    known = Settings.__dataclass_fields__
    return [word for name, words in MEASURED.items() if name in known and name not in given for word in words]


def steps_of(settings: Settings) -> int | None:
    """Steps of the whole training; of a data.yaml an upper bound, since some images may be left out.

    None: the data cannot be counted, and every run will say why.
    """
    images = _images(settings)
    return None if images is None else settings.epochs * -(-images // settings.batch_size)


def _images(settings: Settings) -> int | None:
    if is_own(settings.data):
        return None
    if kind_of(settings.data).name == "dial":
        return parse_dial(settings.data).size
    if settings.data == "phantom":
        from gradprobe.trainers.data.phantom import N_TRAIN

        return N_TRAIN
    from gradprobe.trainers.data.data_yaml import read_config
    from gradprobe.trainers.data.splits import list_split

    try:
        return len(list_split(read_config(Path(settings.data)), "train")[0]) or None
    except (GradprobeError, OSError):
        return None
