"""Everything that decides a bundled training, with its defaults. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from gradprobe.errors import UsageError
from gradprobe.trainers.data.clusters import AUTO, parse_grouping
from gradprobe.trainers.flags import check_settings, near, option
from gradprobe.trainers.problems import YOLOV5, kind_of
from gradprobe.trainers.problems.dial_spec import parse_dial
from gradprobe.trainers.registry import TRAINERS, TrainerOptions, check_trainer

__all__ = ["LONGEST", "PRESETS", "Settings", "as_provenance", "parse_task_weights", "resolve", "restored"]


TASKS = YOLOV5.tasks
"""Of the default data; those of others: :func:`gradprobe.trainers.problems.kind_of`."""

_LARGEST_IMAGE = 16384
"""Pixels of a side: one such image takes 800 MB."""

LONGEST = 4095
"""Characters of a text; what Linux takes for a path."""

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""As Lightning names them. Parameters, losses and the optimizer are float32 in all; 16-mixed scales the losses."""


def _check_size(pixels: int) -> None:
    if pixels % 32:
        raise UsageError(f"--imgsz {pixels}: must be a multiple of 32; the next one is {-(-pixels // 32) * 32}.")


def _check_data(data: str) -> None:
    if kind_of(data).name == "dial":
        parse_dial(data)


_DATA = "data.yaml, phantom, dial:angle=120,ratio=10,noise=1, or your own my_module:make"
_TRAINER_NAMES = f"{', '.join(TRAINERS)}, or your own my_module:MyBalancer"

_COUNT = {"least": 1, "below": 2**53}
"""Of what there is one at least, and as many as a float64 counts."""

_common, _training = partial(option, panel="Common"), partial(option, panel="Training")
_measuring = partial(option, panel="Measuring", audit=False)


@dataclass(frozen=True)
class Settings(TrainerOptions):
    """One training: what all trainers share, and each trainer's own from the registry.

    Names are those of YOLOv5's train.py where it has one.
    """

    trainer: str = _common(
        "gradnorm", f"{_TRAINER_NAMES}.", rule=check_trainer, audit=f"{_TRAINER_NAMES}. [default: joint]"
    )
    from_run: str = option("", "Name of the run file that --from read; what it gave is in other settings.", flag=False)
    data: str = _common("phantom", f"{_DATA}.", rule=_check_data)
    imgsz: int = _common(
        128, "Image size in pixels, a multiple of 32.", rule=_check_size, least=32, most=_LARGEST_IMAGE
    )
    epochs: int = _common(12, "Passes through the training split.", **_COUNT, audit="Of the learning rate's schedule.")
    batch_size: int = _common(16, "Images, of all processes together.", **_COUNT, audit="Images.")
    device: str = _common("cpu", "cpu, 0, mps; 0,1: one process on each.", audit="cpu, 0, mps.")
    seed: int = _common(0, "Of weights, data order, phantoms.", least=0, below=2**63)
    every: int = _common(2, "Measure every so many steps.", **_COUNT, audit=False)

    group_by: str = option(
        AUTO,
        "Which images are of one clip or patient, as for `gradprobe data check`: auto, folder, prefix, none, or a "
        "regular expression with a group.",
        rule=parse_grouping,
        panel="Data",
        audit=False,
    )
    skip_bad: bool = option(False, "Leave bad images out instead of refusing the data.", switch=True, panel="Data")
    cfg: str = option("yolov5n.yaml", "YOLOv5 model.", panel="Model")
    weights: str = option("", "Start from this state_dict (a .pt file).", shown="random", panel="Model")

    optimizer: str = _training("AdamW", "{choices}.", choices=("AdamW", "SGD"))
    lr: float = _training(2e-3, "First learning rate.", above=0)
    lrf: float = _training(0.05, "Last one, as a fraction of it; a cosine in between.", least=0)
    momentum: float = _training(0.9, "SGD's, or AdamW's beta1.", least=0, below=1)
    weight_decay: float = _training(5e-4, "On weights of two and more dimensions.", least=0)
    clip_norm: float = _training(
        0.0, "Clip the global gradient norm; couples tasks.", shown="off", least=0, endless=True
    )
    task_weights: tuple[float, ...] = _training(
        (1.0, 1.0),
        "Such as det=1,cls=0.01, or equal; GradNorm starts from them.",
        shown="1 each",
        audit="Such as det=1,cls=0.01; --weight is the audited task's.",
    )
    precision: str = _training("32-true", "{choices}.", choices=_PRECISIONS)
    processes: int = _training(
        0,
        "How many train together.",
        shown="as torchrun started, or as devices",
        least=0,
        why="0 is as torchrun started, or as devices",
        audit=False,
    )
    keep_going: bool = _training(False, "Go on after a loss that is not finite.", switch=True, audit=False)
    bn_batches: int = _training(
        16, "Batches to recompute BatchNorm over before evaluating; 0: not.", least=0, audit=False
    )

    micro_batches: int = _measuring(
        1,
        "Train and measure each batch in so many micro-batches, which tells noise from gradient; 4 or more.",
        shown="1, as a whole",
        **_COUNT,
        audit="Forwards per step, of equal parts of the batch.",
    )
    probe_loader: str = _measuring(
        "",
        "Also measure on samples drawn from this split: {choices}. Claims rest on it.",
        shown="off",
        choices=("train", "val"),
    )
    probe_every: int = _measuring(20, "Do so every so many steps.", **_COUNT)
    probe_batches: int = _measuring(
        8,
        "On so many micro-batches, as large as those of the training.",
        least=2,
        why="noise is told from 2 or more",
    )
    updates: bool = _measuring(
        False, "Also take the optimizer's updates apart by task, and record clipping.", shown="off"
    )
    ledger: bool = _measuring(
        False, "Keep a loss ledger: what each task's part of every update did to each loss.", shown="off"
    )
    ledger_burst: int = _measuring(0, "Steps of a burst that the ledger measures.", shown="0, all steps", least=0)
    ledger_every: int = _measuring(0, "Steps from the beginning of a burst to that of the next.", least=0)
    ledger_ends: str = _measuring(
        "probe",
        "Whose gradients value an update: probe, of a fixed probe batch; or batch, the training's own, with "
        "--micro-batches.",
        choices=("probe", "batch"),
    )
    ledger_images: int = _measuring(64, "Of the fixed probe batch, drawn once from the training split.", least=1)


PRESETS: dict[str, dict[str, Any]] = {
    # The configuration of the report that this toolkit answers: facts in docs/ARCHITECTURE.md.
    "report": {
        "trainer": "gradnorm",
        "epochs": 50,
        "batch_size": 8,
        "device": "cpu",
        "task_weights": (1.0, 0.01),
        "gradnorm_alpha": 1.5,
        "gradnorm_momentum": 0.9,
        "min_weight": 0.001,
        "max_weight": 10.0,
    },
}

_HYP_TO_SETTING = {"lr0": "lr", "lrf": "lrf", "momentum": "momentum", "weight_decay": "weight_decay"}


def resolve(flags: Mapping[str, Any], *, preset: str = "", hyp: Mapping[str, float] | None = None) -> Settings:
    """Defaults, then the hyp file, then the preset, then what was given as a flag.

    Args:
        flags: Setting -> value; None means "not given".
        preset: One of :data:`PRESETS`, or empty.
        hyp: Optimizer keys of a YOLOv5 hyp file.

    Raises:
        UsageError: An unknown preset, trainer or optimizer, or a value out of its range.
    """
    if preset and preset not in PRESETS:
        raise _unknown_name("preset", preset, PRESETS)
    values: dict[str, Any] = {_HYP_TO_SETTING[k]: v for k, v in (hyp or {}).items() if k in _HYP_TO_SETTING}
    values.update(PRESETS.get(preset, {}))
    values.update({name: value for name, value in flags.items() if value is not None})
    settings = Settings(**values)
    _validate(settings)
    return settings


def restored(values: Any) -> Settings:
    """The settings that a checkpoint, or the provenance of a run, holds; those that it lacks are at their defaults.

    Args:
        values: Name -> plain value; lists for tuples.

    Raises:
        UsageError: A name is unknown, or a value is of the wrong type or out of its range.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"settings are a {type(values).__name__}, not a dict.")
    known = {field.name: str(field.type) for field in dataclasses.fields(Settings)}
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise _unknown_name("setting", str(name)[:80], known)
        plain[name] = tuple(value) if isinstance(value, list) else value
        if not _is_a(known[name], plain[name]):
            raise UsageError(f"setting {name} is {repr(value)[:80]}, not of type {known[name]}.")
        if known[name] == "float":
            plain[name] = float(value)  # torch takes no 0 for a beta
    settings = Settings(**plain)
    _validate(settings)
    return settings


def _is_a(kind: str, value: Any) -> bool:
    """Whether a value is of the type that an annotation of :class:`Settings` names."""
    if kind.startswith("tuple["):
        inner = kind[len("tuple[") :].partition(",")[0]
        return isinstance(value, tuple) and all(_is_a(inner, each) for each in value)
    if kind == "str":
        return isinstance(value, str) and "\0" not in value and len(value) <= LONGEST
    if kind == "float":
        return type(value) in (int, float)
    return type(value) is {"int": int, "bool": bool}[kind]


def parse_task_weights(text: str, tasks: tuple[str, ...] = TASKS) -> tuple[float, ...]:
    """``det=1,cls=0.01`` as numbers in the order of ``tasks``; ``equal``: 1 each.

    Raises:
        UsageError: A task is missing, unknown or given twice, or a weight is no finite number >= 0.
    """
    if text.strip() == "equal":
        return (1.0,) * len(tasks)
    how = f"write {tasks[0]}=1,{tasks[1]}=0.01, or equal"
    values: dict[str, float] = {}
    for item in text.split(","):
        task, _, number = (part.strip() for part in item.partition("="))
        if task not in tasks or task in values:
            raise UsageError(f"--task-weights {text!r}: {task!r} is unknown or given twice; {how}")
        try:
            values[task] = float(number)
        except ValueError:
            raise UsageError(f"--task-weights {text!r}: {number!r} is not a number; {how}") from None
    missing = [task for task in tasks if task not in values]
    if missing:
        raise UsageError(f"--task-weights {text!r}: no weight for {missing}; {how}")
    return tuple(values[task] for task in tasks)


def _validate(s: Settings) -> None:
    check_settings(s)
    kind = kind_of(s.data)
    if s.trainer == "single" and s.task not in kind.tasks:
        raise UsageError(f"--trainer single: which task? --task {' or --task '.join(kind.tasks)}.")
    if s.group_by != AUTO and kind.name == "dial":
        raise UsageError(f"--group-by {s.group_by}: goes with images; the dial problem has clips of its own.")
    if s.micro_batches > s.batch_size:
        raise UsageError(f"--micro-batches {s.micro_batches}: a batch has no more than {s.batch_size} images.")
    if len(s.double_sizes) not in (0, len(s.double)):
        raise UsageError(f"{len(s.double_sizes)} sizes for {len(s.double)} layers to double.")
    _validate_ledger(s)
    if len(s.task_weights) != len(kind.tasks):
        raise UsageError(
            f"--task-weights {s.task_weights}: are {len(s.task_weights)}, of the tasks {', '.join(kind.tasks)}."
        )
    bad = [w for w in s.task_weights if not 0 <= w < math.inf]
    if bad or not any(s.task_weights):
        raise UsageError(f"--task-weights {s.task_weights}: weights must be finite, not negative, and not all 0.")


def _validate_ledger(s: Settings) -> None:
    if bool(s.ledger_burst) != bool(s.ledger_every):
        raise UsageError("--ledger-burst and --ledger-every go together: so many steps of every so many.")
    if s.ledger_burst > s.ledger_every:
        raise UsageError(f"--ledger-burst {s.ledger_burst}: longer than --ledger-every {s.ledger_every}.")
    if s.ledger and s.ledger_ends == "batch" and s.micro_batches < 2:
        raise UsageError(
            "--ledger-ends batch needs --micro-batches 4: a batch's own noise is known from its parts only."
        )


def _unknown_name(kind: str, value: str, known: Iterable[str]) -> UsageError:
    return UsageError(f"unknown {kind} {value!r} (there are: {', '.join(known)}).{near(value, known)}")


def as_provenance(settings: Settings) -> dict[str, Any]:
    """The settings as they are stored in a run file: file names without their folders."""
    values = dataclasses.asdict(settings)
    for name in ("data", "cfg", "weights", "from_run"):
        values[name] = values[name].replace("\\", "/").rpartition("/")[2]
    return values
