"""Hears the steps of whichever optimizers update the shared parameters, and says when a gradient is whole.

An optimizer may be made anew, be one of several, or have another inside. So every optimizer of the process is heard, by
a hook of torch's, and those that hold shared parameters get hooks of their own.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a ``step()``."""
_OTHER = (
    "the shared parameters are updated by {other}, which is not the optimizer that the probe was given: its steps are "
    "counted from here on, and its learning rate is stored. Where an optimizer is made anew, nothing needs to be done"
)


class OptimizerSteps:
    """What the optimizers do between the calls of a probe.

    A step within another's ``step()`` belongs to it. Of several optimizers that step after one call the first one's
    step counts; so does every further step of one that counted before, for loops that do not call at every step.

    Args:
        given: The loop's own, as far as the probe knows.
        shared: Gives the shared parameters; none before they are found.
        count: Told that so many steps are over.
        warn: Told what the user should know.

    Attributes:
        followed: The optimizer whose learning rate is in force.
        followed_by: Called with each optimizer that is followed from then on.
        finish: Called whenever the gradient of a step is whole, before the optimizer uses it.
        before: Called with the optimizer that is followed, after ``finish``.
        after: Called with it when its step is over and counted, and with whether ``before`` was called.
    """

    def __init__(
        self,
        given: Optimizer,
        shared: Callable[[], Sequence[Tensor]],
        count: Callable[[int], None],
        warn: Callable[[str], None],
    ) -> None:
        self.followed = given
        self._shared, self._count, self._warn = shared, count, warn
        self.followed_by: list[Callable[[Optimizer], None]] = []
        self.finish: list[Callable[[], None]] = []
        self.before: list[Callable[[Optimizer], None]] = []
        self.after: list[Callable[[Optimizer, bool], None]] = []
        self._hooks: weakref.WeakKeyDictionary[Optimizer, list[Any]] = weakref.WeakKeyDictionary()
        self._apart: weakref.WeakKeyDictionary[Optimizer, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._leader = given  # whose step was counted last
        self._uncounted: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # since the leader's last step
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # since the last step of the one followed
        self._running: list[tuple[Optimizer, FrameType | None]] = []  # steps within steps, the outermost first
        self._told = self._whole = self._own = False
        self._evaluating = 0
        self._called = self._calling = False
        self._within: Optimizer | None = None
        self._hook(given)
        self._global = register_optimizer_step_pre_hook(torch.compiler.disable(self._heard))

    @property
    def stepping(self) -> bool:
        """Whether a step's closure is running."""
        return self._evaluating > 0

    @property
    def within(self) -> bool:
        """Whether a step was made within the present call."""
        return self._within is not None

    @contextmanager
    def calling(self) -> Iterator[None]:
        """A call of the probe: a step within it, by a hook in the backward, is over when the call is."""
        self._drop_broken()
        self._calling, self._within = True, None
        try:
            yield
        finally:
            self._calling = False

    def called(self) -> None:
        """A call of the probe is over."""
        self._called = True
        if self._within is not None:
            optimizer, self._within = self._within, None
            self._own = self._follow(optimizer)
            self._end(optimizer, seen=False)

    def close(self) -> None:
        """Take all hooks off."""
        self._global.remove()
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self._hooks.clear()

    # ---- hooks

    def _heard(self, optimizer: Optimizer, *_: Any) -> None:
        """Of every optimizer in the process, before the hooks of its own."""
        if optimizer not in self._hooks and self._matters(optimizer):
            self._hook(optimizer)

    def _hook(self, optimizer: Optimizer) -> None:
        self._hooks[optimizer] = [  # of a compiled step they are no part
            optimizer.register_step_pre_hook(torch.compiler.disable(self._begin)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._over)),
        ]

    def _matters(self, optimizer: Optimizer) -> bool:
        """Whether it holds a shared parameter; before those are known, one of the optimizer's that is followed."""
        shared = self._shared()
        known = (sum(len(group["params"]) for group in optimizer.param_groups), len(shared))
        if self._apart.get(optimizer) == known:
            return False
        if {id(p) for p in shared or _parameters(self.followed)} & {id(p) for p in _parameters(optimizer)}:
            return True
        self._apart[optimizer] = known
        return False

    def _begin(self, optimizer: Optimizer, args: tuple[Any, ...], named: dict[str, Any]) -> _Arguments | None:
        self._drop_broken()
        self._running.append((optimizer, _step_of(sys._getframe(1))))
        if len(self._running) > 1 or self._calling:
            return None
        self._told = False
        closure = _closure_of(args, named)
        if closure is None:
            self._tell(optimizer)
            return None
        return _with_closure(args, named, self._watched(optimizer, closure))

    def _watched(self, optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure; after its first evaluation the gradient of the step is whole."""

        @functools.wraps(closure, updated=())
        def evaluated(*args: Any, **named: Any) -> Any:
            self._evaluating += 1
            try:
                result = closure(*args, **named)
            finally:
                self._evaluating -= 1
            if not self._told and self._running and self._running[0][0] is optimizer:
                self._tell(optimizer)
            return result

        return evaluated

    def _drop_broken(self) -> None:
        """Forget steps that an exception has ended."""
        if not self._running:
            return
        frames: set[FrameType] = set()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            frames.add(frame)
            frame = frame.f_back
        self._running = [(optimizer, at) for optimizer, at in self._running if at is None or at in frames]

    def _tell(self, optimizer: Optimizer) -> None:
        self._told = True
        self._own = self._follow(optimizer)
        for finish in self.finish:
            finish()
        for before in self.before if self._own else ():
            before(optimizer)

    def _over(self, optimizer: Optimizer, *_: Any) -> None:
        places = [place for place, (running, _) in enumerate(self._running) if running is optimizer]
        if not places:
            return
        del self._running[places[-1] :]
        if self._running:
            return
        if self._calling:
            self._within = optimizer
            return
        seen = self._told
        if not seen:  # the closure was never evaluated
            self._own = self._follow(optimizer)
            for finish in self.finish:
                finish()
        self._end(optimizer, seen)

    def _end(self, optimizer: Optimizer, seen: bool) -> None:
        if self._called or _kin(optimizer, self._leader):
            self._lead(optimizer, 1)
        elif optimizer in self._uncounted:  # for the second time, while the leader rests
            self._lead(optimizer, 2)
        else:
            self._uncounted.add(optimizer)
        for after in self.after if self._own else ():
            after(optimizer, seen)

    def _lead(self, optimizer: Optimizer, steps: int) -> None:
        self._leader, self._called = optimizer, False
        self._uncounted.clear()
        self._count(steps)

    def _follow(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer that is about to step is the one to follow.

        One that holds parameters of the other's has taken its place; one that holds others stands beside it (a second
        one for the biases, say), unless the other no longer steps.
        """
        if not _kin(optimizer, self.followed):
            mine, known = ({id(p) for p in _parameters(o)} for o in (optimizer, self.followed))
            if not (mine & known or optimizer in self._others):
                self._others.add(optimizer)
                return False
            self._warn(_OTHER.format(other=type(optimizer).__name__))
        if optimizer is not self.followed:
            self.followed = optimizer
            for followed_by in self.followed_by:
                followed_by(optimizer)
        self._others.clear()
        return True


def _kin(one: Optimizer, other: Optimizer) -> bool:
    """Whether two optimizers are one with respect to what they update, as a wrapper and what it wraps are."""
    return one is other or any(a is b for a in one.param_groups for b in other.param_groups)


def learning_rate(optimizer: Optimizer | None) -> float:
    """Of the first group; NaN where there is none."""
    return float("nan") if optimizer is None else float(optimizer.param_groups[0].get("lr", float("nan")))


def _closure_of(args: Sequence[Any], named: Mapping[str, Any]) -> Callable[..., Any] | None:
    """The closure among the arguments of a ``step()``, the optimizer itself being the first; None: there is none."""
    given = named["closure"] if "closure" in named else args[1] if len(args) > 1 else None
    return given if callable(given) and not isinstance(given, nn.Module) else None


def _with_closure(args: tuple[Any, ...], named: Mapping[str, Any], closure: Callable[..., Any]) -> _Arguments:
    """The same arguments with another closure."""
    if "closure" in named:
        return args, {**named, "closure": closure}
    return (args[0], closure, *args[2:]), dict(named)


def _step_of(frame: FrameType | None) -> FrameType | None:
    """The frame of the ``step()`` that a hook is called by; None: it is not there."""
    while frame is not None and frame.f_globals.get("__name__") != Optimizer.__module__:
        frame = frame.f_back
    return frame


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


_FEW = 4
"""So many parameters are looked at in a call that is not measured: an optimizer's step moves nearly all."""
_SAMPLE = 1024
"""So many numbers of each parameter are compared where an update may leave no trace in a version counter."""


class ParameterSample:
    """Remembers where some parameters were: two calls at different ones are no micro-batches of one step.

    An update counts up the version of the tensor that it writes to, but not through ``.data``: there the numbers
    themselves are compared, bit for bit, on a sample of each parameter.

    Args:
        parameters: Gives those in question; they may be others from time to time.
    """

    def __init__(self, parameters: Callable[[], Sequence[Tensor]]) -> None:
        self._parameters = parameters
        self._of: Sequence[Tensor] = ()
        self._versions: tuple[int, ...] | None = None
        self._numbers: list[Tensor] | None = None
        self._closely = False
        self.silent = False
        """Whether the last move that was found left the version counters as they were."""

    def keep(self, *, closely: bool, numbers: bool = False) -> None:
        """Remember where some of them are; closely: all, with their numbers, on their device.

        Args:
            closely: See there.
            numbers: Of some, too.
        """
        of = self._parameters()
        self._of = of if closely else of[:: max(1, len(of) // _FEW)]
        self._versions = tuple([p._version for p in self._of])
        self._numbers, self._closely = _sampled(self._of) if closely or numbers else None, closely

    def moved(self) -> bool:
        """Whether they are no longer where they were last remembered; False where nothing was.

        A new version of the same numbers is no move: averaged weights were swapped in for an evaluation, say, and out
        again. Where all versions are old the numbers are looked at, for which a device must be waited for, if they were
        remembered closely.
        """
        if self._versions is None:
            return False
        versions = tuple([p._version for p in self._of])
        written = versions != self._versions
        now = _sampled(self._of) if written or self._closely else None
        if self._numbers is None or now is None:
            self.silent = False
            return written
        moved = not same_numbers(self._numbers, now)
        self.silent, self._versions = moved and not written, versions
        return moved

    def again(self) -> None:
        """Remember where they are now, as closely as the last time."""
        self.keep(closely=self._closely, numbers=self._numbers is not None)


def _sample_numbers(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Some numbers of each parameter, as one tensor per device and type; where they are asked for, nobody waits."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in parameters:
        # In the order in which they lie in memory, as what is not contiguous (channels last) would be copied.
        flat = p.detach().permute(sorted(range(p.dim()), key=p.stride, reverse=True)).reshape(-1)
        found.setdefault((p.device, p.dtype), []).append(flat[:: max(1, flat.numel() // _SAMPLE)])
    return [torch.cat(parts) for parts in found.values()]


def same_numbers(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two samples are the same numbers; NaN, of a training that has diverged, is the same as NaN."""
    return len(one) == len(other) and all(
        a.device == b.device and a.dtype == b.dtype and (torch.equal(a, b) or _same_but_for_nan(a, b))
        for a, b in zip(one, other, strict=True)
    )


def _same_but_for_nan(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _sampled(parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """None for tensors of a kind that cannot be sampled: the version counters must do."""
    try:
        return _sample_numbers(parameters)
    except (RuntimeError, NotImplementedError, TypeError):
        return None
