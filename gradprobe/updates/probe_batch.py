"""The losses of one fixed probe batch, before and after a step, with nothing of the training changed by it.

A loss may detach values, through which no gradient flows and which move all the same: YOLOv5's objectness is trained
towards the overlap of the present boxes, detached. As the boxes get better that target moves, and the loss with it, by
no part of any gradient. Held at what it was, the loss is what is really descended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.passes import Gradients
from gradprobe.probes.state import sow, undisturbed
from gradprobe.updates.heads import ByTask, PrivateParameters, as_vector
from gradprobe.updates.remembered_forwards import RememberedForwards

_CALLS = (torch.Tensor.detach, torch.detach)


class _DetachedRecorder(TorchFunctionMode):
    """While it is entered, keeps a copy of every result of ``detach()``, in order.

    Attributes:
        values: The copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in the place of each of its functions."""
        found = func(*args, **(kwargs or {}))
        if func in _CALLS:
            with torch.no_grad():
                self.values.append(found.clone())
        return found


class _DetachedReplay(TorchFunctionMode):
    """While it is entered, ``detach()`` gives what it gave when it was recorded, call by call.

    Attributes:
        fits: Whether the calls are those that were recorded, as many and of the same shapes.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__()
        self._values, self._next, self._apart = list(values), 0, False

    @property
    def fits(self) -> bool:
        """Known when all is done."""
        return not self._apart and self._next == len(self._values)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in the place of each of its functions."""
        found = func(*args, **(kwargs or {}))
        if func not in _CALLS:
            return found
        held = self._values[self._next] if self._next < len(self._values) else None
        self._next += 1
        if held is None or held.shape != found.shape or held.dtype != found.dtype:
            self._apart = True
            return found
        with torch.no_grad():
            return held.clone()


_Losses = Mapping[str, Tensor]

ProbeBatch = Callable[[], _Losses | Iterable[_Losses]]
"""Makes the losses of the fixed probe batch: of all of it, or one micro-batch after the other, equally large."""

_SEED = 20_240_229
"""Of what is drawn within (dropout): the same before and after a step."""


@dataclass(frozen=True)
class ProbeBatchValue:
    """The probe batch at one point.

    Attributes:
        losses: (T,).
        gradients: (T) on the shared parameters; None: not asked for.
        private: (T) on what each task alone reaches, as one long vector each.
        detached: What the losses detached, in order; see :mod:`gradprobe.updates.probe_batch`.
        forwards: What the model's forwards gave; None: it was not to be kept.
    """

    losses: Array
    gradients: list[Gradients] | None = None
    private: ByTask | None = None
    detached: Sequence[Tensor] = ()
    forwards: RememberedForwards | None = None


def value_probe_batch(
    model: nn.Module,
    tasks: Sequence[str],
    batch: ProbeBatch,
    shared: Sequence[nn.Parameter] | None = None,
    private: PrivateParameters = (),
    *,
    remember: bool = False,
) -> ProbeBatchValue:
    """The losses, and the gradients where ``shared`` parameters are given.

    Parameters, ``.grad``, buffers, modes and random streams (of torch, numpy and Python) end as they were.

    Args:
        model, tasks, batch: Of the ledger.
        shared: See above.
        private: What each task alone reaches.
        remember: Keep what the model's forwards give.

    Raises:
        ProbeError: A task has no loss, or there is no micro-batch.
    """
    total, count = np.zeros(len(tasks)), 0
    parameters = [[*(shared or ()), *own] for own in private] if shared is not None else []
    sums: list[Gradients] = [[None] * len(wanted) for wanted in parameters]
    recorded = _DetachedRecorder()
    forwards = RememberedForwards(model, lambda: len(recorded.values)) if remember else None
    remembering = forwards.remembering() if forwards is not None else nullcontext()
    with undisturbed(model), torch.set_grad_enabled(shared is not None), remembering:
        for losses in _micro_losses(batch, recorded):
            if forwards is not None:
                forwards.let_go_of_graphs()
            total += _values(tasks, losses)
            count += 1
            for task, wanted, added in zip(tasks, parameters, sums, strict=False):
                _add(added, torch.autograd.grad(losses[task], wanted, retain_graph=True, allow_unused=True))
    if not count:
        raise ProbeError("ledger=: the probe batch gave no losses.")
    if shared is None:
        return ProbeBatchValue(total / count, detached=recorded.values, forwards=forwards)
    means = [[None if g is None else g / count for g in task] for task in sums]
    own = [as_vector(task[len(shared) :], of) for task, of in zip(means, private, strict=True)]
    gradients = [task[: len(shared)] for task in means]
    return ProbeBatchValue(total / count, gradients, own, recorded.values, forwards)


class HeldLosses:
    """The losses at the right end of a step, with what is detached as it was at the left end.

    A loss needs the model's forward again only where what is detached goes into it. So what the forwards of the right
    end gave is handed out in their place. At the 1st, 2nd, 4th, 8th, ... step they run all the same: where a loss is
    then another one in any bit, they do at every step from there on.
    """

    def __init__(self) -> None:
        self._steps, self._run_anyway = 0, False

    def wants_forwards(self, left: ProbeBatchValue) -> bool:
        """Whether the right end's are to be kept."""
        return bool(left.detached) and not self._run_anyway

    def losses(
        self, model: nn.Module, tasks: Sequence[str], batch: ProbeBatch, left: ProbeBatchValue, right: ProbeBatchValue
    ) -> Array:
        """(T,): the right end's own where nothing is detached; NaN where other things are than were."""
        if not left.detached and not right.detached:
            return right.losses
        remembered = None if self._run_anyway or not right.forwards else right.forwards
        short = None if remembered is None else _held(model, tasks, batch, left.detached, remembered)
        if remembered is not None:
            self._steps += 1
        if short is not None and self._steps & (self._steps - 1):
            return short
        found = _held(model, tasks, batch, left.detached)
        self._run_anyway |= short is not None and not np.array_equal(short, found, equal_nan=True)
        return found


def _held(
    model: nn.Module,
    tasks: Sequence[str],
    batch: ProbeBatch,
    detached: Sequence[Tensor],
    remembered: RememberedForwards | None = None,
) -> Array:
    """(T,) losses with these values in the place of what they detach; NaN where other things are detached."""
    before = _DetachedReplay(detached)
    handing_out = remembered.handing_out() if remembered is not None else nullcontext()
    with undisturbed(model), torch.no_grad(), handing_out:
        found = [_values(tasks, losses) for losses in _micro_losses(batch, before)]
    return np.mean(found, axis=0) if before.fits else np.full(len(tasks), np.nan)


def _micro_losses(batch: ProbeBatch, mode: TorchFunctionMode) -> Iterator[_Losses]:
    """The losses of each micro-batch, made under a mode that what is done with them is not under."""
    sow(_SEED)
    with mode:
        made = batch()
        pieces = iter([made] if isinstance(made, Mapping) else made)
    while True:
        with mode:
            losses = next(pieces, None)
        if losses is None:
            return
        yield losses


def _values(tasks: Sequence[str], losses: _Losses) -> list[float]:
    if lacking := [task for task in tasks if task not in losses]:
        raise ProbeError(f"ledger=: the probe batch gave no loss of {lacking}; it gave {list(losses)}.")
    return [float(losses[task].detach()) for task in tasks]


def _add(sums: Gradients, found: Sequence[Tensor | None]) -> None:
    for index, gradient in enumerate(found):
        if gradient is not None:
            before = sums[index]
            sums[index] = gradient if before is None else before + gradient
