"""What a trainer adds to the common loop: the weights of the tasks, and for some another model."""

from __future__ import annotations

import importlib
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradprobe.errors import TrainingError, UsageError
from gradprobe.named_code import import_named
from gradprobe.processes import mean_over_processes
from gradprobe.trainers.registry import TRAINERS, check_trainer
from gradprobe.trainers.settings import Settings

__all__ = ["Balancer", "find_balancer"]


@dataclass(frozen=True)
class Setup:
    """What a bundled training is made from; a balancer that is used in another loop needs none.

    Attributes:
        settings: Everything that was asked for.
        tasks: Names, in order.
        steps_per_epoch: Batches of one epoch.
    """

    settings: Settings
    tasks: Sequence[str]
    steps_per_epoch: int

    @property
    def static(self) -> dict[str, float]:
        """Task -> ``--task-weights``."""
        return dict(zip(self.tasks, self.settings.task_weights, strict=True))


class Balancer(ABC):
    """Decides how much each task weighs at each step.

    Two methods are to be written: :meth:`weights` says what is in force, :meth:`update` looks at a step's losses while
    their graph is alive. In any loop:

        >>> weights = balancer.step(losses)  # doctest: +SKIP
        ... probe.backward(losses, weights)
        ... balancer.after_backward()
        ... optimizer.step()

    Under data parallelism losses are this process's; what is learned from them has to be made
    of :func:`gradprobe.processes.mean_over_processes`. The loop sees to it that the first process's weights hold
    everywhere.

    Attributes:
        loss_scale: What a GradScaler multiplies the losses with, so that gradients do not vanish in float16; set by the
            loop before each step.
        same_step: When an update acts. False: from the next step on, as in GradNorm's paper; True: at once, as in
            gradient surgery, whose weights are made from this step's gradients.
        signed: Whether weights may be negative, or all zero. Where not, such weights end the training.
    """

    loss_scale: float = 1.0
    same_step: ClassVar[bool] = False
    signed: ClassVar[bool] = False

    @abstractmethod
    def weights(self) -> dict[str, float]:
        """Task -> weight in force at the present step."""

    @abstractmethod
    def update(self, losses: Mapping[str, Tensor]) -> None:
        """Look at this step's losses. Must leave ``.grad`` and the process's random streams alone."""

    def step(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """The weights for this step's backward, and the update, in the order that :attr:`same_step` says."""
        if self.same_step:
            self.update(losses)
            return self.weights()
        weights = self.weights()
        self.update(losses)
        return weights

    def after_backward(self) -> None:  # noqa: B027 - most have nothing to do
        """Called when ``.grad`` holds the joint gradient, before clipping and the optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on: tensors, and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - one without state needs nothing
        """Go on where another balancer of this kind stopped; a state of another kind is an error of any type."""

    # ---- how `gradprobe record` makes one

    @classmethod  # noqa: B027 - most need nothing
    def require(cls, settings: Settings) -> None:
        """Called before data are loaded: raises a ``UsageError`` for what is missing or cannot be meant."""

    @classmethod
    def prepare(cls, model: nn.Module, setup: Setup) -> nn.Module:
        """The model that is trained, made from the reference model that all trainers of a seed start from."""
        return model

    @classmethod
    def divides(cls, settings: Settings) -> bool:
        """Whether the tasks of the model that :meth:`prepare` makes share no parameter, on purpose."""
        return False

    @classmethod
    def create(cls, model: nn.Module, setup: Setup) -> Balancer:
        """The balancer for a model that :meth:`prepare` gave; without arguments unless a class says otherwise."""
        return cls()


def loss_values(losses: Mapping[str, Tensor], tasks: Sequence[str]) -> Tensor:
    """The losses of all processes together, (T,) float64 on the CPU, without their graphs."""
    return mean_over_processes(torch.stack([losses[t].detach().reshape(()).double() for t in tasks])).cpu()


def restored_tensor(state: Mapping[str, Any], name: str, like: Tensor, *, finite: bool = True) -> Tensor:
    """A tensor of a state that was saved, if it is of the shape and type of one that it takes the place of.

    Raises:
        ValueError: It is not there, of another shape or type, or not finite.
    """
    value = state.get(name)
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"{name} is no {like.dtype} tensor of the shape {tuple(like.shape)}")
    if finite and not value.isfinite().all():
        raise ValueError(f"{name} is not finite")
    return value.detach().clone()


def restored_count(state: Mapping[str, Any], name: str) -> int:
    """A count of a state that was saved.

    Raises:
        ValueError: It is none.
    """
    value = state.get(name)
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{name} is {value!r}, not a count")
    return value


def find_balancer(name: str) -> type[Balancer]:
    """The class that ``--trainer`` names: an entry of the table, or a user's ``module:Class``.

    Raises:
        UsageError: There is no such trainer, module or class, or it is no Balancer.
    """
    check_trainer(name)
    path = TRAINERS[name].factory if name in TRAINERS else name
    module_name, _, class_name = path.partition(":")
    found = _attribute_of(_import_module(module_name, name), class_name, name)

    if not (isinstance(found, type) and issubclass(found, Balancer)):
        raise UsageError(f"--trainer {name}: {class_name} is not a subclass of gradprobe.trainers.balancer.Balancer.")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise UsageError(f"--trainer {name}: {class_name} lacks the methods {', '.join(missing)}.")
    return found


def _import_module(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module) if name in TRAINERS else import_named(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise UsageError(f"--trainer {name}: importing {module} failed: {error}.") from error
        raise UsageError(
            f"--trainer {name}: there is no module {module!r}, neither installed nor in the present folder."
        ) from None


def _attribute_of(module: Any, attribute: str, name: str) -> Any:
    try:
        return getattr(module, attribute)
    except AttributeError:
        alike = get_close_matches(attribute, [n for n in vars(module) if not n.startswith("_")], n=3)
        raise UsageError(
            f"--trainer {name}: {module.__name__} has no {attribute!r} (near: {', '.join(alike) or 'none'})."
        ) from None


def make_balancer(kind: type[Balancer], model: nn.Module, setup: Setup) -> Balancer:
    """The balancer that ``--trainer`` names.

    Raises:
        UsageError: A user's class cannot be made as its ``create`` says.
    """
    try:
        return kind.create(model, setup)
    except TypeError as error:
        if setup.settings.trainer in TRAINERS:
            raise
        raise UsageError(
            f"--trainer {setup.settings.trainer}: {kind.__name__} cannot be made ({error}). It is called without "
            "arguments; override the classmethod create(model, setup) where it needs some."
        ) from error


def check_weights(weights: Mapping[str, float], tasks: Sequence[str], *, step: int, signed: bool = False) -> None:
    """Refuse weights with which a step means nothing.

    Raises:
        TrainingError: A task has none; one is NaN, infinite or negative; or all are zero. Says which and when.
    """
    missing = [task for task in tasks if task not in weights]
    if missing:
        raise TrainingError(f"the trainer gave no weight for {missing} at step {step}: weights() must name every task.")
    for task in tasks:
        value = float(weights[task])
        if not math.isfinite(value) or (value < 0 and not signed):
            raise TrainingError(
                f"the trainer gave task {task!r} the weight {value} at step {step}: weights must be finite and not "
                "negative. The file is complete up to this step."
            )
    if not signed and not any(weights[task] for task in tasks):
        raise TrainingError(f"the trainer gave every task the weight 0 at step {step}: nothing would be learned.")


def check_static(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights that a user gave, as plain numbers.

    Raises:
        UsageError: One is NaN, infinite or negative, or all are zero.
    """
    bad = {task: value for task, value in weights.items() if not 0 <= value < math.inf}
    if bad or not any(weights.values()):
        raise UsageError(f"task weights {dict(weights)}: must be finite, not negative, and not all 0.")
    return {task: float(value) for task, value in weights.items()}
