"""Images with their labels as a torch data set, kept in memory as far as they fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from gradprobe.errors import DataError
from gradprobe.trainers.data.labels import Box
from gradprobe.trainers.data.letterbox import Placement, letterbox, place_boxes
from gradprobe.trainers.data.pixels import Pixels, UnreadableImage, decode

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


class Sample(NamedTuple):
    """One image, letterboxed."""

    image: torch.Tensor  # (3, size, size), uint8, RGB
    boxes: torch.Tensor  # (boxes, 5), float32: class, cx, cy, w, h over the square's side
    label: int
    name: str


class ImageDataset(Dataset[Sample]):
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

    def __getitem__(self, index: int) -> Sample:
        item = self._items[index]
        pixels = np.ascontiguousarray(self._store.get(item.path).transpose(2, 0, 1))
        return Sample(torch.from_numpy(pixels), self._boxes[index], item.image_class, item.name)


def _clusters(items: Sequence[Item]) -> tuple[str, ...]:
    seen: Counter[str] = Counter()
    clusters = []
    for item in items:
        seen[item.name] += not item.cluster
        alone = item.name if seen[item.name] < 2 else f"{item.name} ({seen[item.name]})"
        clusters.append(item.cluster or alone)
    return tuple(clusters)
