"""One of the two trainings: takes steps, records what each stage left, and lets what holds doors shut interfere."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.audit.experiment import STAGES, Experiment, RandomState
from gradprobe.errors import UsageError

__all__ = ["patched"]


@contextmanager
def patched(owner: Any, name: str, new: Any) -> Iterator[None]:
    """``owner.name`` is ``new`` inside, and as it was afterwards, even where it was the class's."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


_Traced = dict[str, Tensor | None]


@dataclass
class StepRecord:
    """One step of one arm.

    Attributes:
        batch: As the step function got it.
        stages: Stage -> name -> a copy of the tensor; None: a gradient that is not there.
        optimizer_steps: How often an optimizer stepped.
        rates: Learning rate and the other numbers of every group, one entry per optimizer step.
        decisions: In the order in which they were made.
        stopped: Whether the training asked to stop.
    """

    batch: Any = None
    stages: dict[str, _Traced] = field(default_factory=lambda: {stage: {} for stage in STAGES})
    optimizer_steps: int = 0
    rates: list[list[dict[str, float]]] = field(default_factory=list)
    decisions: dict[str, bool] = field(default_factory=dict)
    stopped: bool = False


def leaves(batch: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Tensors and numbers of a batch with their places in it.

    >>> [name for name, _ in leaves({"image": torch.zeros(1), "targets": [1, torch.zeros(2)]})]
    ["batch['image']", "batch['targets'][0]", "batch['targets'][1]"]
    """
    if isinstance(batch, Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for f in dataclasses.fields(batch):
            yield from leaves(getattr(batch, f.name), f"{path}.{f.name}")
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        for index, value in enumerate(batch):
            yield from leaves(value, f"{path}[{index}]")
    elif isinstance(batch, (bool, int, float)):
        yield path, torch.tensor(batch)


def _copied(tensors: Mapping[str, Tensor | None]) -> _Traced:
    """Copies that later steps do not change."""
    return {name: None if t is None else t.detach().clone() for name, t in tensors.items()}


def _gradients(model: nn.Module) -> _Traced:
    """Copies of ``.grad``."""
    return _copied({name: p.grad for name, p in model.named_parameters()})


def _random_states() -> _Traced:
    """The global random streams as tensors, to be compared."""
    state = RandomState.taken()
    legacy = state.numpy  # (name, 624 words, position, has_gauss, cached)
    return {
        "random state of torch": state.torch,
        "random state of numpy": torch.tensor([*map(int, legacy[1]), int(legacy[2])]),
        "random state of python": torch.tensor([int(x) for x in state.python[1]]),
    }


class Closing:
    """One door held shut in one arm; does nothing by itself.

    Attributes:
        acted: In how many places of the training it changed something. A closing that never acted in either arm says
            that there was nothing to shut.
    """

    acted = 0

    def around(self, arm: LockstepArm) -> AbstractContextManager[Any]:
        """Is entered around each step, the fetching of its batch included."""
        return nullcontext()

    def batch(self, arm: LockstepArm, batch: Any) -> Any:
        """The batch that the step function gets."""
        return batch

    def losses(self, arm: LockstepArm, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses that the step function goes on with."""
        return losses

    def after_backward(self, arm: LockstepArm) -> None:
        """``.grad`` may be changed; called after each backward, and before the optimizer where there was none."""

    def before_optimizer(self, arm: LockstepArm, optimizer: Optimizer) -> None:
        """``.grad`` may be changed, after clipping and unscaling."""

    def optimize(self, arm: LockstepArm, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
        """Make the optimizer's step, or another."""
        return step()

    def clear(self, arm: LockstepArm, zero_grad: Callable[[], Any]) -> Any:
        """Clear the gradients, or not."""
        return zero_grad()

    def decide(self, arm: LockstepArm, name: str, value: bool) -> bool:
        """The decision to follow."""
        return value

    def finish(self, arm: LockstepArm) -> None:
        """The step function has returned."""


@dataclass(frozen=True)
class Door:
    """A way by which a task can change another.

    Attributes:
        name: One word or two, for programs.
        title: What happens, in a few words.
        remedy: How to shut it for good.
        close: Makes a closing for one arm.
        stages: Those in which a difference that it makes is seen first. A closing may hide another door's difference
            (in BatchNorm's evaluation mode gradients may be too small to be clipped); where it shows tells them apart.
        intrusive: Whether holding it shut makes another training of it. Such a door is opened again first.
        others: More ways to hold it shut, which have to take a difference away too: in a training of other random
            numbers another door's difference may happen not to show.
    """

    name: str
    title: str
    remedy: str
    close: Callable[[], Closing]
    stages: tuple[str, ...]
    intrusive: bool = False
    others: tuple[Callable[[], Closing], ...] = ()


class LockstepArm:
    """A training with or without the task.

    Attributes:
        experiment: Its own, or one that both arms share in turn.
        weights: Of the tasks that are present.
        task: The task whose influence is audited, present or not.
        index: The step that is being made, from 0.
        record: Of that step.
        reference: The record that the other arm made of the same step, where there is one: closings replay from it.
    """

    def __init__(
        self, experiment: Experiment, weights: Mapping[str, float], task: str, closings: Sequence[Closing] = ()
    ) -> None:
        self.experiment, self.weights, self.task = experiment, dict(weights), task
        self.closings = list(closings)
        self.index = -1
        self.record = StepRecord()
        self.reference: StepRecord | None = None
        self.first_batch: Any = None
        self._batches: Iterator[Any] = iter(())
        self._backwards = 0

    @property
    def present(self) -> bool:
        """Whether this arm trains the audited task."""
        return self.task in self.weights

    def advance(self, reference: StepRecord | None = None) -> StepRecord:
        """Make one step.

        Raises:
            UsageError: The step function never called ``trace.losses``, or there are no batches.
        """
        self.index += 1
        self.record, self.reference, self._backwards = StepRecord(), reference, 0
        with ExitStack() as stack:
            if self.closings:  # one that holds the optimizer back leaves a schedule waiting for its first step
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step")
            for closing in self.closings:
                stack.enter_context(closing.around(self))
            batch = self._fetch()
            for closing in self.closings:
                batch = closing.batch(self, batch)
            self.record.batch = batch
            self.first_batch = batch if self.index == 0 else self.first_batch
            self.record.stages["data"] = _copied(dict(leaves(batch)))
            stack.enter_context(self._watched())
            self.experiment.step(self, batch, dict(self.weights))
            for closing in self.closings:
                closing.finish(self)
        self._look_back()
        return self.record

    # ---- what the step function calls

    def losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`gradprobe.audit.experiment.Trace`."""
        unknown = set(losses) - set(self.weights)
        if unknown:
            raise UsageError(
                f"the step function handed over a loss of {sorted(unknown)}, which is absent in this arm; compute and "
                "hand over the losses of the tasks in its argument `weights` alone."
            )
        forward = self.record.stages["forward"]
        for task, loss in losses.items():
            forward.setdefault(f"loss of {task}", loss.detach().clone())
        forward.update(_copied(dict(self.experiment.model.named_buffers())))
        forward.update(_random_states())
        result = dict(losses)
        for closing in self.closings:
            result = closing.losses(self, result)
        return result

    def decide(self, name: str, value: bool) -> bool:
        """See :class:`gradprobe.audit.experiment.Trace`."""
        followed = bool(value)
        for closing in self.closings:
            followed = closing.decide(self, name, followed)
        self.record.decisions[name] = followed
        self.record.stopped |= followed and name == "stop"
        return followed

    # ---- what is seen without it

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(patched(torch.autograd, "backward", self._backward(torch.autograd.backward)))
            for optimizer in self.experiment.optimizers:
                stack.enter_context(patched(optimizer, "step", self._step(optimizer)))
                stack.enter_context(patched(optimizer, "zero_grad", self._zero_grad(optimizer)))
            scaler = self.experiment.scaler
            if scaler is not None and scaler.is_enabled():
                stack.enter_context(patched(scaler, "unscale_", self._unscale(scaler.unscale_)))
            yield

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def backward(*args: Any, **options: Any) -> None:
            original(*args, **options)
            self._backwards += 1
            self._gradients_made()

        return backward

    def _gradients_made(self) -> None:
        for closing in self.closings:
            closing.after_backward(self)
        self.record.stages["backward"] = _gradients(self.experiment.model)

    def _unscale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def unscale(optimizer: Optimizer) -> None:
            original(optimizer)
            self.record.stages["backward"] = _gradients(self.experiment.model)

        return unscale

    def _step(self, optimizer: Optimizer) -> Callable[..., Any]:
        original = optimizer.step

        @wraps(original)
        def step(*args: Any, **options: Any) -> Any:
            if not self._backwards:  # gradients made by autograd.grad and put into place
                self._gradients_made()
            for closing in self.closings:
                closing.before_optimizer(self, optimizer)
            self.record.stages["clip"] = _gradients(self.experiment.model)
            self.record.rates.append([numbers(group) for group in optimizer.param_groups])

            def taken() -> Any:
                self.record.optimizer_steps += 1
                return original(*args, **options)

            return _nested(taken, [_bind(closing.optimize, self, optimizer) for closing in self.closings])

        return step

    def _zero_grad(self, optimizer: Optimizer) -> Callable[..., Any]:
        original = optimizer.zero_grad

        @wraps(original)
        def zero_grad(*args: Any, **options: Any) -> Any:
            return _nested(
                lambda: original(*args, **options), [_bind(closing.clear, self) for closing in self.closings]
            )

        return zero_grad

    def _look_back(self) -> None:
        stages, experiment = self.record.stages, self.experiment
        if not stages["forward"]:
            raise UsageError(
                "the step function did not call trace.losses(losses) before its backward; the audit needs the "
                "unweighted loss of every task that is present."
            )
        stages["scaler"] = {
            "optimizer steps": torch.tensor(self.record.optimizer_steps),
            "scale": torch.tensor(experiment.scale),
        }
        stages["optimizer"] = _copied(experiment.tensors())
        stages["schedule"] = {
            f"lr of group {i}.{k}": torch.tensor(float(group["lr"]), dtype=torch.float64)
            for i, optimizer in enumerate(experiment.optimizers)
            for k, group in enumerate(optimizer.param_groups)
        }
        stages["decision"] = {name: torch.tensor(value) for name, value in self.record.decisions.items()}

    def _fetch(self) -> Any:
        for _ in range(2):
            for batch in self._batches:
                return batch
            batches = self.experiment.batches
            self._batches = iter(batches(tuple(self.weights)) if callable(batches) else batches)
        raise UsageError("the experiment has no batches: `batches` must be an iterable that can be iterated again.")


def numbers(group: Mapping[str, Any]) -> dict[str, float]:
    """The hyper-parameters of a group that are numbers: lr, momentum, weight decay."""
    return {k: float(v) for k, v in group.items() if isinstance(v, (int, float, Tensor)) and not isinstance(v, bool)}


def _nested(innermost: Callable[[], Any], layers: Sequence[Callable[[Callable[[], Any]], Any]]) -> Any:
    """Call ``layers[0](layers[1](... innermost))``, each deciding whether to call what it encloses."""
    call = innermost
    for layer in reversed(layers):
        call = _bind(layer, call)
    return call()


def _bind(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    return lambda *more: function(*args, *more)
