"""Batches in an order that is a function of the seed and the epoch, and of nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gradprobe.errors import UsageError
from gradprobe.trainers.data.dataset import ImageDataset, Sample


@dataclass(frozen=True)
class Batch:
    """Images with the targets of both tasks."""

    images: torch.Tensor  # (batch, 3, size, size), float32, RGB in [0, 1]
    boxes: torch.Tensor  # (boxes, 6), float32: index of the image, class, cx, cy, w, h in [0, 1]
    labels: torch.Tensor  # (batch,), int64: image class
    names: tuple[str, ...]  # file names

    def __len__(self) -> int:
        return len(self.names)

    def part(self, start: int, stop: int) -> Batch:
        """The images from ``start`` to before ``stop``, with their targets."""
        inside = (self.boxes[:, 0] >= start) & (self.boxes[:, 0] < stop)
        boxes = self.boxes[inside]
        boxes[:, 0] -= start  # a copy: selecting by a mask makes one
        return Batch(self.images[start:stop], boxes, self.labels[start:stop], self.names[start:stop])

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: getattr(self, name).to(device) for name in ("images", "boxes", "labels")}
        return replace(self, **moved)


def collate(samples: list[Sample]) -> Batch:
    """One batch from its samples, in their order."""
    rows = [
        torch.cat([torch.full((len(sample.boxes), 1), float(index)), sample.boxes], dim=1)
        for index, sample in enumerate(samples)
    ]
    return Batch(
        images=torch.stack([sample.image for sample in samples]).to(torch.float32) / 255.0,
        boxes=torch.cat(rows),
        labels=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        names=tuple(sample.name for sample in samples),
    )


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """A batch cut into ``count`` contiguous parts that differ by one image at most; of fewer images, one each."""
    if count <= 1:
        return [batch]
    size = len(batch)
    count = min(count, size)
    ends = [size * part // count for part in range(count + 1)]
    return [batch.part(start, stop) for start, stop in itertools.pairwise(ends)]


def _part_of(batch: Sequence[int], rank: int, processes: int) -> tuple[list[int], float]:
    """One process's part of a batch, and which share of it that is.

    Parts are those of :func:`micro_batches`, in the order of the ranks. Where there are fewer images than processes,
    some get the first image, which does not count (share 0): every process has to take part in every step.
    """
    size = len(batch)
    part = list(batch[size * rank // processes : size * (rank + 1) // processes])
    return (part, len(part) / size) if part else ([batch[0]], 0.0)


class Loader:
    """Iterates over a data set in batches; the last one may be smaller.

    Of several processes each can have its part of every batch, so that together they see what one would.

    Attributes:
        share: How much of the last batch this process has, of all its samples.
        names: Of all of them.

    Args:
        dataset: Has a length, and samples by index.
        batch_size: Samples.
        seed, shuffle: The order; without ``shuffle`` that of the data set.
        collate: Makes a batch of samples.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int,
        shuffle: bool,
        collate: Callable[[list[Any]], Any] = collate,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"the batch size is {batch_size}; it has to be 1 or greater (--batch-size)")
        self.dataset, self.batch_size = dataset, batch_size
        self._seed, self._shuffle, self._epoch, self.collate = seed, shuffle, 0, collate
        self._rank, self._processes = 0, 1
        self.share = 1.0
        self.names: tuple[str, ...] = ()

    def divide(self, rank: int, processes: int) -> None:
        """From now on give one process's part of every batch; ``batch_size`` is that of all together."""
        self._rank, self._processes = rank, processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self._epoch = epoch

    def order(self) -> list[int]:
        """The order of the images in the current epoch."""
        count = len(self.dataset)
        if not self._shuffle:
            return list(range(count))
        # Sorting raw 64-bit draws: numpy guarantees the raw stream, not what permutation() makes of it.
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, self._epoch]))
        keys = np.asarray(bits.random_raw(count), dtype=np.uint64)
        return [int(index) for index in np.argsort(keys, kind="stable")]

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = self.order()
        for start in range(0, len(order), self.batch_size):
            whole = order[start : start + self.batch_size]
            self.names = tuple(self.dataset.names[index] for index in whole)
            part, self.share = _part_of(whole, self._rank, self._processes)
            yield self.collate([self.dataset[index] for index in part])


def make_loader(dataset: ImageDataset, batch_size: int, seed: int = 0, shuffle: bool = True) -> Loader:
    """Batches of a data set.

    Iterating twice in one epoch gives the same batches twice; call `set_epoch` before each epoch. The
    global random generators of torch, numpy and Python are neither read nor changed.

    Raises:
        UsageError: the batch size is below 1.
    """
    return Loader(dataset, batch_size, seed, shuffle)
