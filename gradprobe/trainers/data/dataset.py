"""Images with their labels as a torch data set, and its batches, in an order that seed and epoch alone decide."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from gradprobe.errors import DataError, UsageError
from gradprobe.trainers.data.images import Pixels, Placement, UnreadableImage, decode, letterbox, place_boxes
from gradprobe.trainers.data.labels import Box

_CACHE_BYTES = 2**30
"""Letterboxed images are kept in memory up to this much, over all splits together; the rest is read anew."""


class ImageStore:
    """Letterboxed images by path; a path may be a mere name of an image that was added from memory."""

    def __init__(self, size: int, limit: int = _CACHE_BYTES) -> None:
        self.size = size
        self.placements: dict[Path, Placement] = {}
        self._room = limit
        self._images: dict[Path, Pixels] = {}

    def add(self, path: Path, image: Pixels) -> None:
        """Take an image in; it is kept if there is room."""
        square, self.placements[path] = letterbox(image, self.size)
        if square.nbytes <= self._room and path not in self._images:
            self._images[path] = square
            self._room -= square.nbytes

    def get(self, path: Path) -> Pixels:
        """The letterboxed image, shape (size, size, 3); read from its file where it was not kept.

        Raises:
            DataError: the file was readable when it was checked, and no longer is.
        """
        if (image := self._images.get(path)) is not None:
            return image
        try:
            return letterbox(decode(path).pixels, self.size)[0]
        except UnreadableImage as problem:
            raise DataError(f"{path}: became unreadable during training: {problem}") from None


@dataclass(frozen=True)
class Item:
    """One image of a data set, by its path in the store."""

    path: Path
    name: str  # file name
    boxes: tuple[Box, ...]  # relative to the image, not to the square
    image_class: int
    cluster: str = ""  # the clip or patient that it belongs to; empty: none is known


class _Sample(NamedTuple):
    """One image, letterboxed."""

    image: torch.Tensor  # (3, size, size), uint8, RGB
    boxes: torch.Tensor  # (boxes, 5), float32: class, cx, cy, w, h over the square's side
    label: int
    name: str


class ImageDataset(Dataset[_Sample]):
    """Letterboxed images, their boxes and their image classes.

    Attributes:
        names: (N,) file names.
        clusters: (N,) the clip or patient that each belongs to; where none is known its own name, numbered where two
            images have it.
    """

    def __init__(self, items: Sequence[Item], store: ImageStore) -> None:
        self.names = tuple(item.name for item in items)
        self.clusters = _clusters(items)
        self._items, self._store = tuple(items), store
        self._boxes = [
            torch.from_numpy(place_boxes(item.boxes, store.placements[item.path]).astype(np.float32)) for item in items
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> _Sample:
        item = self._items[index]
        pixels = np.ascontiguousarray(self._store.get(item.path).transpose(2, 0, 1))
        return _Sample(torch.from_numpy(pixels), self._boxes[index], item.image_class, item.name)


def _clusters(items: Sequence[Item]) -> tuple[str, ...]:
    seen: Counter[str] = Counter()
    clusters = []
    for item in items:
        seen[item.name] += not item.cluster
        alone = item.name if seen[item.name] < 2 else f"{item.name} ({seen[item.name]})"
        clusters.append(item.cluster or alone)
    return tuple(clusters)


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


def _collate(samples: list[_Sample]) -> Batch:
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


def _process_part(batch: Sequence[int], rank: int, processes: int) -> tuple[list[int], float]:
    """One process's part of a batch, and which share of it that is.

    Parts are those of :func:`micro_batches`, in the order of the ranks. Where there are fewer images than processes,
    some get the first image, which does not count (share 0): every process has to take part in every step.
    """
    size = len(batch)
    part = list(batch[size * rank // processes : size * (rank + 1) // processes])
    return (part, len(part) / size) if part else ([batch[0]], 0.0)


class Loader:
    """Iterates over a data set in batches; the last one may be smaller.

    Of several processes each can have its part of every batch, so that together they see what one would. Iterating
    twice in one epoch gives the same batches twice; call :meth:`set_epoch` before each epoch. The global random
    generators of torch, numpy and Python are neither read nor changed.

    Attributes:
        share: How much of the last batch this process has, of all its samples.
        names: Of all of them.

    Args:
        dataset: Has a length, and samples by index.
        batch_size: Samples.
        seed, shuffle: The order; without ``shuffle`` that of the data set.
        collate: Makes a batch of samples.

    Raises:
        UsageError: The batch size is below 1.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        collate: Callable[[list[Any]], Any] = _collate,
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
            part, self.share = _process_part(whole, self._rank, self._processes)
            yield self.collate([self.dataset[index] for index in part])
