"""The table of trainers. Imports nothing heavy: the command line reads it for its help.

A trainer is one file with a :class:`~gradprobe.trainers.balancer.Balancer`, and one entry here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradprobe.errors import UsageError

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
    near = get_close_matches(name, TRAINERS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(
        f"unknown trainer {name!r} (there are: {', '.join(TRAINERS)}; your own: my_module:MyBalancer).{hint}"
    )


def import_named(module: str) -> Any:
    """Import a module that this command line names: an installed one, or else one of the present folder.

    Installed ones go first, and the present folder is looked into only for what is not installed: where a folder is a
    stranger's, no file of it may stand in for a package. A name that was read from a file is never given to this.
    """
    try:
        installed = importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        installed = False
    if not installed and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # to stay: what the module imports may lie there, too
    return importlib.import_module(module)


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
        near = get_close_matches(attribute, [n for n in vars(module) if not n.startswith("_")], n=3)
        raise UsageError(
            f"--trainer {name}: {module.__name__} has no {attribute!r} (near: {', '.join(near) or 'none'})."
        ) from None
