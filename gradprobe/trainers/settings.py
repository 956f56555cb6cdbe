"""Everything that decides a bundled training, with its defaults. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from gradprobe.errors import UsageError
from gradprobe.trainers import registry
from gradprobe.trainers.data import grouping
from gradprobe.trainers.problems import YOLOV5, kind_of
from gradprobe.trainers.problems.dial_spec import parse

TASKS = YOLOV5.tasks
"""Of the default data; those of others: :func:`gradprobe.trainers.problems.kind_of`."""

LEDGER_ENDS = ("probe", "batch")
LARGEST_IMAGE = 16384
"""Pixels of a side: one such image takes 800 MB."""

LONGEST = 4095
"""Characters of a text; what Linux takes for a path."""

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""As Lightning names them. Parameters, losses and the optimizer are float32 in all; 16-mixed scales the losses."""


@dataclass(frozen=True)
class Settings:
    """One training.

    Names are those of YOLOv5's train.py where it has one; units and ranges in the comments.
    """

    trainer: str = "gradnorm"  # see gradprobe.trainers.registry
    task: str = ""  # for `single`
    from_run: str = ""  # name of the run file that --from read; what it gave is in the other settings
    data: str = "phantom"  # or the path of a data.yaml, or dial:angle=120,ratio=10,noise=1
    cfg: str = "yolov5n.yaml"
    weights: str = ""  # a state_dict to start from; empty: random initial weights
    imgsz: int = 128  # pixels, multiple of 32
    epochs: int = 12
    batch_size: int = 16  # images, of all processes together
    device: str = "cpu"  # 0,1: one for each process
    processes: int = 0  # that train together; 0: as many as torchrun started, or as devices
    precision: str = "32-true"  # of the forward: see PRECISIONS
    seed: int = 0

    optimizer: str = "AdamW"  # or SGD
    lr: float = 2e-3
    lrf: float = 0.05  # final learning rate as a fraction of lr; a cosine in between
    momentum: float = 0.9  # SGD's momentum, AdamW's beta1
    weight_decay: float = 5e-4  # on weights of two and more dimensions only
    clip_norm: float = 0.0  # global gradient clipping; 0: none

    task_weights: tuple[float, ...] = (1.0, 1.0)  # of each task, det and cls; GradNorm starts from them
    gradnorm_alpha: float = 1.5
    gradnorm_lr: float = 0.025
    gradnorm_momentum: float = 0.9  # beta1 of the weights' own Adam
    gradnorm_layer: str = ""  # empty: the last convolution of SPPF
    min_weight: float = 1e-3
    max_weight: float = math.inf
    weight_sum: float = float(len(TASKS))

    dwa_temperature: float = 2.0
    share_until: str = ""  # dual: the last shared layer; empty: nothing is shared
    top_k: int = 5  # split: how many layers are doubled
    double: tuple[str, ...] = ()  # split: which
    double_sizes: tuple[int, ...] = ()  # their numbers of parameters in the run that they were chosen from
    match_norm: bool = True  # gradient surgery: the combined gradient as long as the joint one
    cagrad_c: float = 0.4

    every: int = 2  # steps between two measurements
    updates: bool = False  # what the optimizer makes of the gradients, at the same steps
    micro_batches: int = 1  # forwards per step, of equal parts of the batch; from 2 on the noise is measured too
    probe_loader: str = ""  # also measure on samples drawn from this split; empty: not
    probe_every: int = 20  # steps between two such measurements
    probe_batches: int = 8  # micro-batches of one, each as large as those of the training
    ledger: bool = False  # what each update did to the losses, at all steps unless in bursts
    ledger_burst: int = 0  # steps of a burst; 0: all steps
    ledger_every: int = 0  # steps from the beginning of a burst to that of the next
    ledger_ends: str = "probe"  # whose gradients value an update: those of the fixed "probe" batch, or the "batch"'s
    ledger_images: int = 64  # of the fixed probe batch, drawn once from those that are trained on
    bn_batches: int = 16  # BatchNorm statistics are recomputed over so many batches before evaluating; 0: not
    group_by: str = grouping.AUTO  # which images are of one clip or patient: see gradprobe.trainers.data.grouping
    skip_bad: bool = False
    keep_going: bool = False


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
        raise UsageError(_unknown("preset", preset, PRESETS))
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
            raise UsageError(_unknown("setting", str(name)[:80], known))
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
    registry.check(s.trainer)
    tasks = kind_of(s.data).tasks
    if kind_of(s.data).name == "dial":
        parse(s.data)
    _validate_trainer(s, tasks)
    grouping.parse(s.group_by)
    if s.group_by != grouping.AUTO and kind_of(s.data).name == "dial":
        raise UsageError(f"--group-by {s.group_by}: goes with images; the dial problem has clips of its own.")
    if s.optimizer not in ("AdamW", "SGD"):
        raise UsageError(_unknown("optimizer", s.optimizer, ("AdamW", "SGD")))
    if s.precision not in PRECISIONS:
        raise UsageError(_unknown("precision", s.precision, PRECISIONS))
    if s.processes < 0:
        raise UsageError(f"--processes {s.processes}: must be at least 1.")
    if s.imgsz < 32 or s.imgsz % 32:
        nearest = max(32, -(-s.imgsz // 32) * 32)
        raise UsageError(f"--imgsz {s.imgsz}: must be a multiple of 32; the next one is {nearest}.")
    if s.imgsz > LARGEST_IMAGE:
        raise UsageError(f"--imgsz {s.imgsz}: images of at most {LARGEST_IMAGE} pixels are trained on.")
    for name in ("epochs", "batch_size", "every", "top_k", "micro_batches", "probe_every"):
        if not 1 <= getattr(s, name) < 2**53:
            raise UsageError(f"{_flag(name)} {getattr(s, name)}: must be at least 1, and below 2^53.")
    if s.probe_loader not in ("", "train", "val"):
        raise UsageError(_unknown("--probe-loader", s.probe_loader, ("train", "val")))
    if s.probe_batches < 2:
        raise UsageError(f"--probe-batches {s.probe_batches}: noise is told from at least 2; 8 are the default.")
    if s.micro_batches > s.batch_size:
        raise UsageError(f"--micro-batches {s.micro_batches}: a batch has no more than {s.batch_size} images.")
    _validate_ledger(s)
    for name in ("lr", "weight_sum", "gradnorm_lr", "dwa_temperature"):
        if not 0 < getattr(s, name) < math.inf:
            raise UsageError(f"{_flag(name)} {getattr(s, name)}: must be a positive number.")
    for name in (
        "lrf",
        "weight_decay",
        "clip_norm",
        "min_weight",
        "max_weight",
        "bn_batches",
        "gradnorm_alpha",
        "cagrad_c",
    ):
        if math.isnan(getattr(s, name)) or getattr(s, name) < 0:
            raise UsageError(f"{_flag(name)} {getattr(s, name)}: must not be negative.")
    for name in ("lrf", "weight_decay", "min_weight"):
        if math.isinf(getattr(s, name)):
            raise UsageError(f"{_flag(name)} {getattr(s, name)}: must be finite.")
    if len(s.double_sizes) not in (0, len(s.double)):
        raise UsageError(f"{len(s.double_sizes)} sizes for {len(s.double)} layers to double.")
    for name in ("momentum", "gradnorm_momentum"):
        if not 0 <= getattr(s, name) < 1:
            raise UsageError(f"{_flag(name)} {getattr(s, name)}: must be at least 0 and below 1.")
    if not 0 <= s.seed < 2**63:
        raise UsageError(f"--seed {s.seed}: must be a whole number from 0 to 2^63 - 1.")
    if math.isinf(s.gradnorm_alpha):
        raise UsageError("--gradnorm-alpha inf: must be finite; the paper calls 3 and more unstable.")
    if len(s.task_weights) != len(tasks):
        raise UsageError(
            f"--task-weights {s.task_weights}: are {len(s.task_weights)}, of the tasks {', '.join(tasks)}."
        )
    bad = [w for w in s.task_weights if not 0 <= w < math.inf]
    if bad or not any(s.task_weights):
        raise UsageError(f"--task-weights {s.task_weights}: weights must be finite, not negative, and not all 0.")


def _validate_ledger(s: Settings) -> None:
    if s.ledger_ends not in LEDGER_ENDS:
        raise UsageError(_unknown("--ledger-ends", s.ledger_ends, LEDGER_ENDS))
    for name in ("ledger_burst", "ledger_every"):
        if getattr(s, name) < 0:
            raise UsageError(f"{_flag(name)} {getattr(s, name)}: must not be negative.")
    if bool(s.ledger_burst) != bool(s.ledger_every):
        raise UsageError("--ledger-burst and --ledger-every go together: so many steps of every so many.")
    if s.ledger_burst > s.ledger_every:
        raise UsageError(f"--ledger-burst {s.ledger_burst}: longer than --ledger-every {s.ledger_every}.")
    if s.ledger_images < 1:
        raise UsageError(f"--ledger-images {s.ledger_images}: must be at least 1.")
    if s.ledger and s.ledger_ends == "batch" and s.micro_batches < 2:
        raise UsageError(
            "--ledger-ends batch needs --micro-batches 4: a batch's own noise is known from its parts only."
        )


def _validate_trainer(s: Settings, tasks: tuple[str, ...]) -> None:
    if s.trainer == "single" and s.task not in tasks:
        raise UsageError(f"--trainer single: which task? --task {' or --task '.join(tasks)}.")
    if s.share_until and s.trainer != "dual":
        raise UsageError(f"--share-until {s.share_until} goes with --trainer dual.")
    if s.task and s.trainer != "single":
        raise UsageError(f"--task {s.task} goes with --trainer single; all tasks are trained by {s.trainer}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _unknown(kind: str, value: str, known: Any) -> str:
    near = get_close_matches(value, list(known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {value!r} (there are: {', '.join(known)}).{hint}"


def as_provenance(settings: Settings) -> dict[str, Any]:
    """The settings as they are stored in a run file: file names without their folders."""
    values = dataclasses.asdict(settings)
    for name in ("data", "cfg", "weights", "from_run"):
        values[name] = values[name].replace("\\", "/").rpartition("/")[2]
    return values
