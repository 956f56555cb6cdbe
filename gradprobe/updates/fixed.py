"""The losses of one fixed probe batch, before and after a step, with nothing of the training changed by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.passes import Gradients
from gradprobe.probes.state import sow, undisturbed
from gradprobe.updates.detached import Held, Recorded
from gradprobe.updates.heads import ByTask, Own, vector

Losses = Mapping[str, Tensor]

ProbeBatch = Callable[[], Losses | Iterable[Losses]]
"""Makes the losses of the fixed probe batch: of all of it, or one micro-batch after the other, equally large."""

_SEED = 20_240_229
"""Of what is drawn within (dropout): the same before and after a step."""


@dataclass(frozen=True)
class Valued:
    """The probe batch at one point.

    Attributes:
        losses: (T,).
        gradients: (T) on the shared parameters; None: not asked for.
        private: (T) on what each task alone reaches, as one long vector each.
        detached: What the losses detached, in order; see :mod:`gradprobe.updates.detached`.
    """

    losses: Array
    gradients: list[Gradients] | None = None
    private: ByTask | None = None
    detached: Sequence[Tensor] = ()


def value(
    model: nn.Module,
    tasks: Sequence[str],
    batch: ProbeBatch,
    shared: Sequence[nn.Parameter] | None = None,
    private: Own = (),
) -> Valued:
    """The losses, and the gradients where ``shared`` parameters are given.

    Parameters, ``.grad``, buffers, modes and random streams (of torch, numpy and Python) end as they were.

    Raises:
        ProbeError: A task has no loss, or there is no micro-batch.
    """
    total, count = np.zeros(len(tasks)), 0
    parameters = [[*(shared or ()), *own] for own in private] if shared is not None else []
    sums: list[Gradients] = [[None] * len(wanted) for wanted in parameters]
    recorded = Recorded()
    with undisturbed(model), torch.set_grad_enabled(shared is not None):
        for losses in _pieces(batch, recorded):
            total += _values(tasks, losses)
            count += 1
            for task, wanted, added in zip(tasks, parameters, sums, strict=False):
                _add(added, torch.autograd.grad(losses[task], wanted, retain_graph=True, allow_unused=True))
    if not count:
        raise ProbeError("ledger=: the probe batch gave no losses.")
    if shared is None:
        return Valued(total / count, detached=recorded.values)
    means = [[None if g is None else g / count for g in task] for task in sums]
    own = [vector(task[len(shared) :], of) for task, of in zip(means, private, strict=True)]
    return Valued(total / count, [task[: len(shared)] for task in means], own, recorded.values)


def held(model: nn.Module, tasks: Sequence[str], batch: ProbeBatch, left: Valued, right: Valued) -> Array:
    """(T,) the losses at the right end, with what is detached as it was at the left end.

    The right end's own where nothing is detached; NaN where other things are than were.
    """
    if not left.detached and not right.detached:
        return right.losses
    before = Held(left.detached)
    with undisturbed(model), torch.no_grad():
        found = [_values(tasks, losses) for losses in _pieces(batch, before)]
    return np.mean(found, axis=0) if before.fits else np.full(len(tasks), np.nan)


def _pieces(batch: ProbeBatch, mode: TorchFunctionMode) -> Iterator[Losses]:
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


def _values(tasks: Sequence[str], losses: Losses) -> list[float]:
    if lacking := [task for task in tasks if task not in losses]:
        raise ProbeError(f"ledger=: the probe batch gave no loss of {lacking}; it gave {list(losses)}.")
    return [float(losses[task].detach()) for task in tasks]


def _add(sums: Gradients, found: Sequence[Tensor | None]) -> None:
    for index, gradient in enumerate(found):
        if gradient is not None:
            before = sums[index]
            sums[index] = gradient if before is None else before + gradient
