"""The table of trainers. Imports nothing heavy: the command line reads it for its help.

A trainer is one file with a :class:`~gradprobe.trainers.balancer.Balancer`, one entry here, and, where it has options
of its own, their fields in :class:`TrainerOptions`: flag, help, check and provenance follow from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradprobe.errors import UsageError
from gradprobe.trainers.flags import flag, near, option, options
from gradprobe.trainers.problems import YOLOV5

if TYPE_CHECKING:
    pass

__all__ = ["TRAINERS", "unused_options"]


@dataclass(frozen=True)
class Trainer:
    """One entry.

    Attributes:
        what: What it does, in one line.
        cost: Of a step, beside the forward and the joint backward of ``joint``. T is the number of tasks.
        source: The paper.
        factory: ``module:Class``, imported when it is used.
    """

    what: str
    cost: str
    source: str
    factory: str


_HERE = "gradprobe.trainers."


def _surgery(what: str, source: str) -> Trainer:
    return Trainer(what, "T backward passes", source, _HERE + "surgery:Surgery")


TRAINERS: dict[str, Trainer] = {
    "single": Trainer(
        "one task alone (--task): the control that defines interference", "none", "", _HERE + "single:Single"
    ),
    "joint": Trainer("static weights (--task-weights, also `equal`): the baseline", "none", "", _HERE + "joint:Joint"),
    "gradnorm": Trainer(
        "weights learned so that all tasks train at a similar rate",
        "T backward passes, from the losses to one layer",
        "Chen et al. 2018, arXiv:1711.02257",
        _HERE + "gradnorm:GradNorm",
    ),
    "gradnorm-static": Trainer(
        "constant weights: the time average of a gradnorm run (--from)", "none", "", _HERE + "joint:Joint"
    ),
    "uncertainty": Trainer(
        "weights learned as the inverse of each task's noise",
        "none",
        "Kendall et al. 2018, arXiv:1705.07115",
        _HERE + "uncertainty:Uncertainty",
    ),
    "dwa": Trainer(
        "more weight for a task whose loss falls more slowly from epoch to epoch",
        "none",
        "Liu et al. 2019, arXiv:1803.10704",
        _HERE + "dwa:DWA",
    ),
    "rlw": Trainer(
        "random weights, drawn anew at every step", "none", "Lin et al. 2022, arXiv:2111.10603", _HERE + "rlw:RLW"
    ),
    "pcgrad": _surgery("each task's gradient without its part against another's", "Yu et al. 2020, arXiv:2001.06782"),
    "gradvac": _surgery(
        "each task's gradient turned until its cosine with another's is the usual one",
        "Wang et al. 2021, arXiv:2010.05874",
    ),
    "cagrad": _surgery(
        "the step near the mean one that helps the worst task most (--cagrad-c)", "Liu et al. 2021, arXiv:2110.14048"
    ),
    "mgda": _surgery(
        "the shortest convex combination of the task gradients", "Sener and Koltun 2018, arXiv:1810.04650"
    ),
    "upgrad": _surgery(
        "each task's gradient projected onto the cone where none conflicts, then their mean",
        "Quinton and Rey 2024, arXiv:2406.16232",
    ),
    "imtl": _surgery("the step with equal projections onto all task gradients", "Liu et al. 2021, ICLR"),
    "aligned": _surgery(
        "the task gradients made orthogonal and equally long", "Senushkin et al. 2023, arXiv:2305.19000"
    ),
    "fairgrad": _surgery(
        "the step that is fair to all tasks' progress (alpha 1: proportionally)", "Ban and Ji 2024, arXiv:2402.15638"
    ),
    "nash": _surgery(
        "the step on which tasks that bargain would agree; extra `nash`", "Navon et al. 2022, arXiv:2202.01017"
    ),
    "dual": Trainer(
        "a backbone for each task; with --share-until LAYER the layers up to that one stay shared",
        "the second backbone's forward and backward",
        "",
        _HERE + "dual:Dual",
    ),
    "split": Trainer(
        "as dual, for the --top-k layers that an earlier run (--from) shows in conflict",
        "as dual, from the first doubled layer on",
        "after Shi et al. 2023 (Recon), ICLR",
        _HERE + "dual:Split",
    ),
    "detach": Trainer(
        "the classification head learns from a detached trunk: no interference by construction",
        "none",
        "",
        _HERE + "dual:Detach",
    ),
}


_GRADNORM: dict[str, Any] = {"trainers": ("gradnorm",), "panel": "GradNorm"}
_SURGERY_METHODS = tuple(name for name, trainer in TRAINERS.items() if trainer.factory == _HERE + "surgery:Surgery")


@dataclass(frozen=True)
class TrainerOptions:
    """The options of single trainers; all other settings: :class:`gradprobe.trainers.settings.Settings`."""

    gradnorm_alpha: float = option(
        1.5, "Pull to equal rates.", least=0, why="the paper calls 3 and more unstable", **_GRADNORM
    )
    gradnorm_lr: float = option(0.025, "Learning rate of the weights' own Adam.", above=0, **_GRADNORM)
    gradnorm_momentum: float = option(0.9, "Its beta1.", least=0, below=1, **_GRADNORM)
    gradnorm_layer: str = option(
        "", "W: where the norms are balanced.", shown="the last convolution of SPPF", **_GRADNORM
    )
    min_weight: float = option(1e-3, "The weights' lower bound.", least=0, **_GRADNORM)
    max_weight: float = option(math.inf, "Their upper bound.", shown="none", least=0, endless=True, **_GRADNORM)
    weight_sum: float = option(
        float(len(YOLOV5.tasks)), "What they sum to.", shown="number of tasks", above=0, **_GRADNORM
    )

    task: str = option(
        "",
        f"single: the one that is trained: {', '.join(YOLOV5.tasks)}; of dial: a, b.",
        shown="none",
        trainers=("single",),
        refused=True,
    )
    dwa_temperature: float = option(2.0, "dwa: larger is more even.", above=0, trainers=("dwa",))
    share_until: str = option(
        "", "dual: the last layer of the trunk that stays shared.", shown="none", trainers=("dual",), refused=True
    )
    top_k: int = option(5, "split: how many layers to double.", least=1, below=2**53, trainers=("split",))
    double: tuple[str, ...] = option((), "split: the layers that are doubled.", flag=False)
    double_sizes: tuple[int, ...] = option(
        (), "split: their numbers of parameters in the run that they were chosen from.", flag=False
    )
    match_norm: bool = option(
        True, "Gradient surgery: a combined gradient as long as the joint one.", shown="on", trainers=_SURGERY_METHODS
    )
    cagrad_c: float = option(
        0.4, "cagrad: how far from the mean step, over its length.", least=0, endless=True, trainers=("cagrad",)
    )


def unused_options(trainer: str, given: Iterable[str]) -> list[str]:
    """What to say of options that were given and that a trainer does not read; one of a user's own may read any."""
    readers = {each.name: known.trainers for each, known in options(TrainerOptions) if known.trainers}
    return [
        f"{flag(name)} changes nothing here: {trainer} does not use it; {', '.join(readers[name])} would."
        for name in given
        if trainer in TRAINERS and trainer not in readers.get(name, (trainer,))
    ]


def check_trainer(name: str) -> None:
    """Whether a name can be one; what it names is looked at by :func:`find_balancer`.

    Raises:
        UsageError: It is in no table and names no module.
    """
    module, colon, attribute = name.partition(":")
    if name in TRAINERS or (colon and all(part.isidentifier() for part in (*module.split("."), attribute))):
        return
    raise UsageError(
        f"unknown trainer {name!r} (there are: {', '.join(TRAINERS)}; your own: my_module:MyBalancer)."
        f"{near(name, TRAINERS)}"
    )
