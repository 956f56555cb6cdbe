"""Measures in micro-batches, which tells the noise of a Gramian.

A batch is split into m micro-batches, each with a forward of its own; slices of one BatchNorm forward would not be
independent. Every task gets one backward pass per micro-batch: together they cost what one pass over the whole batch
does. Alive at a time are T mean gradients and the T of the present micro-batch.

Source: docs/run-file.md, ``gram_noise``; the estimate is :func:`gradprobe.statistics.noise_part`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes import transfer
from gradprobe.probes.checks import Given, Losses, all_losses, is_present
from gradprobe.probes.gramian import GramianSum, bring
from gradprobe.probes.graph import SharedLayers
from gradprobe.probes.passes import Gradients, pass_to
from gradprobe.probes.schedule import whole
from gradprobe.probes.state import state_kept
from gradprobe.processes import OneProcess
from gradprobe.statistics import noise_part

BatchSize = int | Sequence[int]
"""Samples of the batch, or of each of its micro-batches."""

_APART = 1e-2
"""Losses of a batch that differ from the mean over its micro-batches by more than this part are not that mean. Half
precision is within it, a sum in the place of a mean is not."""


@dataclass(frozen=True)
class MicroBatches:
    """The losses of one batch, micro-batch by micro-batch.

    Attributes:
        losses: (m,) task -> unweighted loss, each with a graph of its own.
        shares: (m,) of the batch's samples, summing to 1.
        batch_size: Samples of the batch; 0: unknown.
    """

    losses: tuple[Losses, ...]
    shares: tuple[float, ...]
    batch_size: int

    def mean(self) -> dict[str, Tensor]:
        """The losses of the batch."""
        return mean_losses(self.losses, self.shares)


def mean_losses(losses: Sequence[Losses], shares: Sequence[float]) -> dict[str, Tensor]:
    """Task -> sum_a alpha_a loss_a: what training is to step on, so that its gradient is the mean that is measured.

    Of a single micro-batch the losses as they are.
    """
    if len(losses) == 1:
        return dict(losses[0])
    return {task: _weighted([one[task] for one in losses], shares) for task in losses[0]}


def _weighted(losses: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """A micro-batch from which the task is absent adds nothing; absent from all, the task has no loss."""
    present = [(loss, share) for loss, share in zip(losses, shares, strict=True) if is_present(loss)]
    if not present:
        return losses[0]
    total = present[0][0] * present[0][1]
    for loss, share in present[1:]:
        total = total + loss * share
    return total


def shares_of(sizes: Sequence[int]) -> tuple[float, ...]:
    """Each micro-batch's share of the samples.

    >>> shares_of([3, 1])
    (0.75, 0.25)
    """
    return tuple(size / sum(sizes) for size in sizes)


def micro_batches(tasks: tuple[str, ...], losses: Sequence[Given], batch_size: BatchSize) -> MicroBatches:
    """What ``micro=`` and ``batch_size=`` of a probe's call mean.

    Args:
        tasks: Of the probe.
        losses: (m,).
        batch_size: Samples of each micro-batch; or of the batch, whose micro-batches are equally large then.

    Raises:
        ProbeError: There is no micro-batch, one lacks a task or has a loss without a graph, or the sizes do not fit.
    """
    if isinstance(losses, Mapping) or not isinstance(losses, Sequence) or not losses:
        raise ProbeError(
            "micro= must be a list with the losses of each micro-batch, such as [{'det': ..., 'cls': ...}]."
        )
    checked = tuple(_checked(tasks, one, place) for place, one in enumerate(losses))
    count = len(checked)
    if isinstance(batch_size, Sequence):
        sizes = [whole("batch_size", size) for size in batch_size]
        if len(sizes) != count:
            raise ProbeError(f"batch_size={sizes} has {len(sizes)} sizes for {count} micro-batches; give one for each.")
        return MicroBatches(checked, shares_of(sizes), sum(sizes))
    total = whole("batch_size", batch_size, least=0)
    if 0 < total < count:
        raise ProbeError(f"batch_size={total} samples are less than one for each of {count} micro-batches.")
    return MicroBatches(checked, (1 / count,) * count, total)


def _checked(tasks: tuple[str, ...], losses: Given, place: int) -> Losses:
    try:
        return all_losses(tasks, losses)
    except ProbeError as error:
        raise ProbeError(f"micro[{place}]: {error}") from error


def check_mean(losses: Losses, micro: MicroBatches | None) -> None:
    """Raise where the losses of a batch are not those of its micro-batches.

    Raises:
        ProbeError: A task's loss is another than the mean; says which and by how much.
    """
    if micro is None:
        return
    known = iter(transfer.values([one[task] for task in losses for one in (losses, *micro.losses)]))
    for task in losses:
        loss, *parts = itertools.islice(known, 1 + len(micro.losses))
        parts = [part if is_present(one[task]) else 0.0 for part, one in zip(parts, micro.losses, strict=True)]
        mean = math.fsum(share * part for share, part in zip(micro.shares, parts, strict=True))
        scale = math.fsum(share * abs(part) for share, part in zip(micro.shares, parts, strict=True))
        if math.isfinite(mean) and abs(loss - mean) > _APART * scale:
            raise ProbeError(
                f"the loss of task {task!r} is {loss:.6g}, but its mean over the {len(parts)} "
                f"micro-batches, weighted by their samples, is {mean:.6g}: what is measured would not be what is "
                "trained. Leave losses= out, or make them that mean; losses must be means over samples, not sums."
            )


class MicroSum:
    """Takes micro-batches one by one, and gives the Gramian of the batch and the noise part of it.

    Args:
        model: Whose buffers and random numbers are kept.
        shared: The layers.
        tasks: T, how many.
        ranks: The processes whose gradients are averaged: each one's micro-batches count.
        kept: Gets every micro-batch's T gradients; None: they are let go of.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: SharedLayers,
        tasks: int,
        ranks: OneProcess | None = None,
        kept: list[list[Gradients]] | None = None,
    ) -> None:
        self._model, self._shared, self._ranks, self._kept = model, shared, ranks or OneProcess(), kept
        self._parts = GramianSum(shared.layers, tasks)
        self.means: list[Gradients] = [[None] * len(shared.parameters) for _ in range(tasks)]
        self.shares: list[float] = []

    def add(self, losses: Sequence[Tensor], share: float) -> None:
        """One micro-batch: (T,) losses, and the share of the batch that it is."""
        found = self._passes(losses)
        self.shares.append(share)
        if self._kept is not None:
            self._kept.append(found)
        for index in range(len(self._shared.parameters)):
            row = [gradients[index] for gradients in found]
            self._parts.add(index, row, factor=share**2)
            for mean, gradient in zip(self.means, row, strict=True):
                mean[index] = _added(mean[index], gradient, share)
            if self._kept is None:
                for gradients in found:
                    gradients[index] = None

    def _passes(self, losses: Sequence[Tensor]) -> list[Gradients]:
        parameters, found = self._shared.parameters, []
        with state_kept(self._model) as back:
            for loss in losses:
                found.append(pass_to(loss, parameters))
                back()
        return found

    def result(self) -> tuple[Array, Array]:
        """The Gramians F and their noise parts D, (L, T, T) each; see :func:`noise_part`.

        A layer that a task reaches in some of the micro-batches only counts as a gradient of 0 in the others. Every
        process must get here, and gets the same; :attr:`means` and :attr:`shares` are those over all processes then.
        """
        parameters, layers = self._shared.parameters, self._shared.layers
        for gradients in self.means:
            gradients[:] = self._ranks.average(gradients, parameters)
        whole_batch = GramianSum(layers, len(self.means))
        for index in range(len(parameters)):
            whole_batch.add(index, [gradients[index] for gradients in self.means])
        bring([whole_batch, self._parts])
        gram = whole_batch.result()
        parts = self._ranks.mean(np.nan_to_num(self._parts.result(), posinf=0.0, neginf=0.0)) / self._ranks.size
        self.shares = self._ranks.shares(self.shares)
        return gram, noise_part(gram, parts, self.shares)


def _added(mean: Tensor | None, gradient: Tensor | None, share: float) -> Tensor | None:
    if gradient is None:
        return mean
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    if dense.dtype in (torch.float16, torch.bfloat16):
        dense = dense.float()
    return dense * share if mean is None else mean.add_(dense, alpha=share)
