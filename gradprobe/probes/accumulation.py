"""One row from the calls between two optimizer steps: gradient accumulation.

The calls' batches are micro-batches of the step: the step's task gradient is the mean of theirs, and their products
tell the noise of its Gramian. Each call hands its losses undivided; where a loop weights its calls, by their samples
say, it multiplies each call's losses by that weight times the number of calls.

Alive between two calls are T copies of the shared parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradprobe.measures import Array
from gradprobe.probes.checks import Losses
from gradprobe.probes.gramian import GramianSum
from gradprobe.probes.graph import SharedLayers
from gradprobe.probes.meter import Meter
from gradprobe.probes.passes import Gradients
from gradprobe.probes.stopwatch import Stopwatch
from gradprobe.rows import MEASURED
from gradprobe.statistics import noise_part


@dataclass(frozen=True)
class Noise:
    """What a measurement in micro-batches tells besides.

    Attributes:
        part: (L, T, T) of the Gramians, as the losses were scaled; None: not known.
        batches: In how many it was measured.
    """

    part: Array | None
    batches: int


@dataclass(frozen=True)
class Call:
    """What one call measured.

    Attributes:
        step: Of the training.
        losses: Of this process; their graphs tell why a gradient is missing.
        values: (T,) of this process.
        weights: (T,) in force.
        gram: (L, T, T), as the losses were scaled; None: it failed.
        status: Why it failed.
        watch: Has counted what it cost.
        batch_size: Samples of this process.
        noise: None: it was not measured in micro-batches.
        shares: Of the micro-batches that the call itself was measured in; [1.0]: as a whole.
    """

    step: int
    losses: Losses
    values: Array
    weights: Array
    gram: Array | None
    status: str
    watch: Stopwatch
    batch_size: int
    noise: Noise | None
    shares: Sequence[float]

    @property
    def parts(self) -> Array:
        """(L, T, T) what :func:`noise_part` needs of the call's micro-batches: its inverse."""
        assert self.gram is not None
        squared = float(np.square(self.shares).sum())
        if self.noise is None or self.noise.part is None or len(self.shares) == 1:
            return self.gram * (squared if len(self.shares) > 1 else 1.0)
        return self.noise.part * (1 - squared) + self.gram * squared


class Accumulation:
    """Collects the calls of a step that is measured.

    Args:
        meter: Makes the gradients.
        expected: Whether steps consist of several calls; None: the first step will tell.
        by_gradients: Whether it is told by ``.grad`` if a further call belongs to the step; if not, every call does.
        agree: Makes the first process's answer that of all.
        emit: Gets the calls of a step, the Gramian (L, T, T) of their mean and its noise.
    """

    def __init__(
        self,
        meter: Meter,
        expected: bool | None,
        by_gradients: bool,
        agree: Callable[[bool], bool],
        emit: Callable[[Sequence[Call], Array | None, Noise | None], None],
    ) -> None:
        self._meter, self._by_gradients, self._agree, self._emit = meter, by_gradients, agree, emit
        self._expected = expected if meter.keeps else False
        self._calls: list[Call] = []
        self._means: list[Gradients] = []
        self._collecting = self._lent = self._stopped = False

    def stop(self) -> None:
        """The first call stands for its step from here on: what is beside the probe looks at single calls."""
        self._expected, self._stopped = False, True

    def due(self, first: bool, due: bool) -> bool:
        """Whether a call is measured.

        Args:
            first: Whether it is the first one of the step.
            due: Whether the step is, as far as the first call is concerned.
        """
        if first:
            self.finish()
            self._begin(due and self._expected is not False)
            return due
        if not self._calls:
            self._expected = self._expected or (self._meter.keeps and not self._stopped and self._more())
            return False
        if not self._more():  # what went before was dropped: a step that the scaler left out
            self.finish()
            return False
        self._begin(True)
        return True

    def would_be_due(self, first: bool, due: bool) -> bool:
        """What :meth:`due` would say, without asking."""
        return due if first else bool(self._calls) and self._more()

    def takes(self, call: Call) -> bool:
        """Whether a call is kept until the step is complete; else its row is to be handed on at once."""
        if not self._collecting:
            return False
        self._add(self._meter.kept or [])
        self._calls.append(call)
        self._give_back()
        return True

    def finish(self, *_: object) -> None:
        """The step is complete: hand on its row. Also called by the optimizer, before its step."""
        self._give_back()
        calls, means = self._calls, self._means
        self._calls, self._means = [], []
        if not calls:
            return
        if len(calls) == 1:
            self._expected = self._expected or False
            self._emit(calls, calls[0].gram, calls[0].noise)
            return
        self._expected = True
        if any(call.gram is None for call in calls) or self._meter.shared is None:
            self._emit(calls, None, Noise(None, len(calls)))
            return
        gram = multiplied(self._meter.shared, means)
        if self._meter.kept is not None:
            self._meter.kept[:] = means
        self._emit(calls, gram, noise_of(calls, gram))

    def _begin(self, collecting: bool) -> None:
        self._collecting = collecting
        if collecting and self._meter.kept is None:
            self._meter.kept, self._lent = [], True

    def _give_back(self) -> None:
        """The meter keeps gradients for others, or none."""
        if self._lent:
            self._meter.kept, self._lent = None, False
        self._collecting = False

    def _more(self) -> bool:
        """Whether gradients of earlier calls are there, to which those of this one are added."""
        if not self._by_gradients:
            return True
        parameters = self._meter.shared.parameters if self._meter.shared is not None else ()
        return self._agree(any(p.grad is not None and bool(torch.count_nonzero(p.grad)) for p in parameters))

    def _add(self, gradients: Sequence[Gradients]) -> None:
        if not self._calls:
            self._means = [list(own) for own in gradients]
            return
        count = len(self._calls)
        for mean, own in zip(self._means, gradients, strict=False):
            for index, gradient in enumerate(own):
                mean[index] = _mean(mean[index], gradient, count)


def _mean(mean: Tensor | None, gradient: Tensor | None, count: int) -> Tensor | None:
    """The mean of ``count`` gradients and one more; None counts as 0. Not in place: the first may be another's."""
    if mean is None or gradient is None:
        there = mean if mean is not None else gradient
        return None if there is None else _wide(there) * ((count if gradient is None else 1) / (count + 1))
    return _wide(mean) * (count / (count + 1)) + _wide(gradient) / (count + 1)


def _wide(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return dense.float() if dense.dtype in (torch.float16, torch.bfloat16) else dense


def multiplied(shared: SharedLayers, gradients: Sequence[Gradients]) -> Array:
    """The Gramians (L, T, T) of all tasks' gradients."""
    total = GramianSum(shared.layers, len(gradients))
    for index in range(len(shared.parameters)):
        total.add(index, [own[index] for own in gradients])
    return total.result()


def noise_of(calls: Sequence[Call], gram: Array) -> Noise:
    """The noise part of the Gramian of the mean of some calls.

    A layer that a task reaches in some calls only counts as a gradient of 0 in the others.
    """
    count = len(calls)
    parts = np.sum([np.nan_to_num(call.parts, posinf=0.0, neginf=0.0) for call in calls], axis=0) / count**2
    shares = [share / count for call in calls for share in call.shares]
    return Noise(noise_part(gram, parts, shares), len(shares))


def status_of_calls(calls: Sequence[Call]) -> str:
    """Why there is no measurement, where one call failed."""
    return next((call.status for call in calls if call.status != MEASURED), MEASURED)
