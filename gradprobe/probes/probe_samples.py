"""The probe loader: task gradients on independent samples, with the parameters as they are at a step.

The batches of a training are drawn without replacement, and parameters were fitted to the samples of earlier ones, so
that what is measured on them is biased, the more the fewer samples there are. Batches that are drawn with replacement,
and that nothing is trained on, have no such bias. They are what claims rest on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.calls import Losses, all_losses, is_present
from gradprobe.probes.clock import whole
from gradprobe.probes.state import sow

__all__ = ["ProbeLoader"]


_SPLITS = ("train", "val")
_STREAM = 0x70726F6265
"""Keeps what is drawn apart from what else is drawn by the same seed."""


class _Samples(Protocol):
    """A data set with a length, as torch's are."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """One sample."""


class ProbeLoader:
    """What a probe measures on, every so many steps, besides the training's own batches.

    Samples are drawn with replacement, by a stream that depends on the seed and the step alone. The forwards are those
    of training, in the mode that the model is in; parameters stay, and buffers, ``.grad``, modes and all random streams
    are put back: the training is bit for bit as without.

    Args:
        dataset: Samples, each with a place from 0 on.
        losses: Makes the losses of one micro-batch as the training loop does: batch -> {task: loss}. It moves the batch
            to the model's device; of a DDP model it calls ``model.module``, as no backward follows.
        batch_size: Samples of a micro-batch; as many as the training's forwards see, where the model has BatchNorm.
        batches: Micro-batches of one measurement, 2 or more.
        every: Measure at steps 0, every, 2 every, ...
        split: What the data set is: "train", or "val" for samples that are not trained on, which a claim about all
            data needs.
        collate: A list of samples -> a batch; default that of ``torch.utils.data``.
        seed: Of the samples, and of what the forwards draw.

    Raises:
        ProbeError: An argument out of its range, or an empty data set.

    Example:
        >>> loader = gradprobe.ProbeLoader(  # doctest: +SKIP
        ...     val_data, lambda batch: losses_of(model, batch), batch_size=8, split="val"
        ... )
        >>> with gradprobe.attach(model, ("det", "cls"), "conflict.h5", probe_loader=loader) as probe:  # doctest: +SKIP
        ...     ...  # the loop as it is
    """

    def __init__(
        self,
        dataset: _Samples,
        losses: Callable[[Any], Losses],
        *,
        batch_size: int,
        batches: int = 8,
        every: int = 20,
        split: str = "train",
        collate: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
    ) -> None:
        if split not in _SPLITS:
            raise ProbeError(f"split={split!r}: there are {' and '.join(map(repr, _SPLITS))}.")
        self.batch_size, self.every = whole("batch_size", batch_size), whole("every", every)
        self.batches = whole("batches", batches, least=2)
        self._samples = len(dataset)
        if not self._samples:
            raise ProbeError("the probe loader's data set is empty: there is nothing to draw from.")
        self.split, self._seed = split, whole("seed", seed, least=0)
        self._dataset, self._losses, self._collate = dataset, losses, collate

    @property
    def about(self) -> dict[str, Any]:
        """What is stored of it."""
        return {
            "split": self.split,
            "every": self.every,
            "batches": self.batches,
            "batch_size": self.batch_size,
            "samples": self._samples,
            "seed": self._seed,
        }

    @property
    def shares(self) -> list[float]:
        """(m,) of the micro-batches in one measurement."""
        return [1 / self.batches] * self.batches

    def due(self, step: int) -> bool:
        """Whether it is measured at ``step``."""
        return step % self.every == 0

    def indices(self, step: int, rank: int = 0) -> list[list[int]]:
        """Which samples are drawn at a step, micro-batch by micro-batch; other ones in each process."""
        # Raw draws, whose stream numpy guarantees, and not what integers() makes of it.
        raw = np.random.PCG64(np.random.SeedSequence([_STREAM, self._seed, step, rank]))
        drawn = np.asarray(raw.random_raw(self.batches * self.batch_size), dtype=np.uint64) % np.uint64(self._samples)
        return [[int(index) for index in one] for one in drawn.reshape(self.batches, self.batch_size)]

    def losses(self, step: int, rank: int = 0) -> Iterator[Losses]:
        """The losses of each micro-batch, made when they are asked for; the global random streams are sown anew."""
        drawn = self.indices(step, rank)
        sow(int(np.random.SeedSequence([_STREAM, self._seed, step, rank, 1]).generate_state(1)[0]))
        for places in drawn:
            yield self._losses(self._batch([self._dataset[place] for place in places]))

    def _batch(self, samples: list[Any]) -> Any:
        if self._collate is not None:
            return self._collate(samples)
        from torch.utils.data import default_collate

        return default_collate(samples)


class SeenLosses:
    """The losses that went by."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tuple(tasks)
        self._values: list[list[float]] = []
        self._there: list[list[bool]] = []

    def add(self, given: Losses) -> Losses:
        losses = all_losses(self._tasks, given)
        lacking = [task for task in self._tasks if task not in given]
        if lacking:
            raise ProbeError(f"losses of the probe loader lack {lacking}; give None for a task that a batch has not.")
        self._values.append([float(losses[task].detach()) for task in self._tasks])
        self._there.append([is_present(losses[task]) for task in self._tasks])
        return losses

    @property
    def there(self) -> NDArray[np.bool_]:
        """(T,) who took part in some micro-batch."""
        return np.array([any(there) for there in zip(*self._there, strict=True)] or [False] * len(self._tasks))

    def mean(self, count: int) -> Array:
        """(T,) over the micro-batches in which a task takes part; NaN: in none, or fewer than ``count`` went by."""
        if len(self._values) < count:
            return np.full(len(self._tasks), np.nan)
        there = np.array(self._there, dtype=bool)
        total = np.where(there, self._values, 0.0).sum(axis=0)
        return np.where(there.any(axis=0), total / np.maximum(there.sum(axis=0), 1), np.nan)
