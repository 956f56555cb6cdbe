"""The table of trainers. Imports nothing heavy: the command line reads it for its help.

A trainer is one file with a :class:`~gradprobe.trainers.balancer.Balancer`, one entry here, and, where it has options
of its own, their fields in :class:`TrainerOptions`: flag, help, check and provenance follow from them.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from gradprobe.errors import UsageError
from gradprobe.named_code import import_named
from gradprobe.trainers.options import flag, near, option, options
from gradprobe.trainers.problems import YOLOV5

if TYPE_CHECKING:
    from gradprobe.trainers.balancer import Balancer


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
_SURGERY = "T backward passes"

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
    "pcgrad": Trainer(
        "each task's gradient without its part against another's",
        _SURGERY,
        "Yu et al. 2020, arXiv:2001.06782",
        _HERE + "surgery:Surgery",
    ),
    "gradvac": Trainer(
        "each task's gradient turned until its cosine with another's is the usual one",
        _SURGERY,
        "Wang et al. 2021, arXiv:2010.05874",
        _HERE + "surgery:Surgery",
    ),
    "cagrad": Trainer(
        "the step near the mean one that helps the worst task most (--cagrad-c)",
        _SURGERY,
        "Liu et al. 2021, arXiv:2110.14048",
        _HERE + "surgery:Surgery",
    ),
    "mgda": Trainer(
        "the shortest convex combination of the task gradients",
        _SURGERY,
        "Sener and Koltun 2018, arXiv:1810.04650",
        _HERE + "surgery:Surgery",
    ),
    "upgrad": Trainer(
        "each task's gradient projected onto the cone where none conflicts, then their mean",
        _SURGERY,
        "Quinton and Rey 2024, arXiv:2406.16232",
        _HERE + "surgery:Surgery",
    ),
    "imtl": Trainer(
        "the step with equal projections onto all task gradients",
        _SURGERY,
        "Liu et al. 2021, ICLR",
        _HERE + "surgery:Surgery",
    ),
    "aligned": Trainer(
        "the task gradients made orthogonal and equally long",
        _SURGERY,
        "Senushkin et al. 2023, arXiv:2305.19000",
        _HERE + "surgery:Surgery",
    ),
    "fairgrad": Trainer(
        "the step that is fair to all tasks' progress (alpha 1: proportionally)",
        _SURGERY,
        "Ban and Ji 2024, arXiv:2402.15638",
        _HERE + "surgery:Surgery",
    ),
    "nash": Trainer(
        "the step on which tasks that bargain would agree; extra `nash`",
        _SURGERY,
        "Navon et al. 2022, arXiv:2202.01017",
        _HERE + "surgery:Surgery",
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
        _HERE + "detach:Detach",
    ),
}


_GRADNORM: dict[str, Any] = {"trainers": ("gradnorm",), "panel": "GradNorm"}
SURGERY = tuple(name for name, trainer in TRAINERS.items() if trainer.factory == _HERE + "surgery:Surgery")


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
        True, "Gradient surgery: a combined gradient as long as the joint one.", shown="on", trainers=SURGERY
    )
    cagrad_c: float = option(
        0.4, "cagrad: how far from the mean step, over its length.", least=0, endless=True, trainers=("cagrad",)
    )


def unused(trainer: str, given: Iterable[str]) -> list[str]:
    """What to say of options that were given and that a trainer does not read; one of a user's own may read any."""
    readers = {each.name: known.trainers for each, known in options(TrainerOptions) if known.trainers}
    return [
        f"{flag(name)} changes nothing here: {trainer} does not use it; {', '.join(readers[name])} would."
        for name in given
        if trainer in TRAINERS and trainer not in readers.get(name, (trainer,))
    ]


def find(name: str) -> type[Balancer]:
    """The class that ``--trainer`` names: an entry of the table, or a user's ``module:Class``.

    Raises:
        UsageError: There is no such trainer, module or class, or it is no Balancer.
    """
    check(name)
    path = TRAINERS[name].factory if name in TRAINERS else name
    module_name, _, class_name = path.partition(":")
    found = _attribute(_module(module_name, name), class_name, name)
    from gradprobe.trainers.balancer import Balancer

    if not (isinstance(found, type) and issubclass(found, Balancer)):
        raise UsageError(f"--trainer {name}: {class_name} is not a subclass of gradprobe.trainers.balancer.Balancer.")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise UsageError(f"--trainer {name}: {class_name} lacks the methods {', '.join(missing)}.")
    return found


def check(name: str) -> None:
    """Whether a name can be one; what it names is looked at by :func:`find`.

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


def _module(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module) if name in TRAINERS else import_named(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise UsageError(f"--trainer {name}: importing {module} failed: {error}.") from error
        raise UsageError(
            f"--trainer {name}: there is no module {module!r}, neither installed nor in the present folder."
        ) from None


def _attribute(module: Any, attribute: str, name: str) -> Any:
    try:
        return getattr(module, attribute)
    except AttributeError:
        alike = get_close_matches(attribute, [n for n in vars(module) if not n.startswith("_")], n=3)
        raise UsageError(
            f"--trainer {name}: {module.__name__} has no {attribute!r} (near: {', '.join(alike) or 'none'})."
        ) from None
