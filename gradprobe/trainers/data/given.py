"""A data set that a function of the user's hands over, instead of a data.yaml."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.errors import DataError
from gradprobe.trainers.data.dataset import ImageDataset, ImageStore, Item
from gradprobe.trainers.data.labels import Box
from gradprobe.trainers.data.loading import LoadedData, check_imgsz, fingerprint
from gradprobe.trainers.data.pixels import Pixels

SPLITS = ("train", "val", "test")
NEEDED = ("box_names", "image_names", "train", "val")


def load(found: Any, source: str, imgsz: int) -> LoadedData:
    """The data sets of a training run.

    Args:
        found: A mapping with ``box_names`` and ``image_names`` (of the classes), ``train``, ``val`` and perhaps
            ``test``; all of it is kept in memory. A split is any iterable of samples ``(name, image, boxes,
            image_class)`` or, where several images belong to one clip or patient, ``(name, image, boxes, image_class,
            cluster)``: ``image`` (height, width, 3) uint8, RGB; ``boxes`` (n, 5), of class, centre x and y, width and
            height as parts of the image's.
        source: What handed it over, for messages.
        imgsz: Side of the square images, in pixels; a multiple of 32.

    Raises:
        DataError: Something is missing or not as above; says which split and sample.
    """
    check_imgsz(imgsz)
    if not isinstance(found, Mapping):
        raise DataError(f"{source}: returned a {type(found).__name__}, not a mapping with {', '.join(NEEDED)}.")
    if missing := [name for name in NEEDED if name not in found]:
        raise DataError(f"{source}: returned no {', '.join(missing)}; needed are {', '.join(NEEDED)}.")
    names = {key: tuple(map(str, found[key])) for key in ("box_names", "image_names")}
    store, datasets, entries = ImageStore(imgsz, limit=sys.maxsize), {}, []
    for split in SPLITS:
        if found.get(split) is None:
            continue
        items = []
        for place, sample in enumerate(found[split]):
            item, image = _item(sample, f"{source}: {split}, sample {place}", Path(split, str(place)), names)
            store.add(item.path, image)
            items.append(item)
            entries.append((split, hashlib.sha256(image.tobytes()).hexdigest(), item))
        if not items:
            raise DataError(f"{source}: {split} has no sample.")
        datasets[split] = ImageDataset(items, store)
    return LoadedData(
        name=source,
        box_names=names["box_names"],
        image_names=names["image_names"],
        train=datasets["train"],
        val=datasets["val"],
        test=datasets.get("test"),
        skipped=(),
        warnings=(),
        fingerprint=fingerprint(names["box_names"], names["image_names"], entries),
    )


def _item(sample: Any, where: str, path: Path, names: Mapping[str, Sequence[str]]) -> tuple[Item, Pixels]:
    if not isinstance(sample, Sequence) or len(sample) not in (4, 5):
        raise DataError(f"{where}: is not (name, image, boxes, image_class) or those and a cluster.")
    name, image, boxes, image_class, *cluster = sample
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise DataError(
            f"{where} ({name}): the image is {pixels.shape} of {pixels.dtype}, not (height, width, 3) of uint8."
        )
    _check_class(image_class, names["image_names"], f"{where} ({name}): image class")
    found = _boxes(boxes, f"{where} ({name})", names["box_names"])
    return Item(path, str(name), found, int(image_class), str(cluster[0]) if cluster else ""), pixels


def _boxes(boxes: Any, where: str, names: Sequence[str]) -> tuple[Box, ...]:
    rows = np.asarray(boxes, dtype=np.float64).reshape(-1, 5) if np.size(boxes) else np.zeros((0, 5))
    for place, (kind, *box) in enumerate(rows.tolist()):
        _check_class(kind, names, f"{where}: class of box {place}")
        x, y, width, height = box
        if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < width <= 1 and 0 < height <= 1):
            raise DataError(f"{where}: box {place} is {box}, not centre, width and height as parts of the image's.")
    return tuple((int(kind), x, y, width, height) for kind, x, y, width, height in rows.tolist())


def _check_class(value: Any, names: Sequence[str], where: str) -> None:
    if not (isinstance(value, (int, float, np.number)) and float(value).is_integer() and 0 <= value < len(names)):
        raise DataError(f"{where} is {value!r}, not one of 0 to {len(names) - 1}.")
