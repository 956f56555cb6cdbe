"""The data sets of a training: from the embedded phantoms, a data.yaml, or a function of the user's."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.errors import DataError, UsageError
from gradprobe.trainers.data import phantom
from gradprobe.trainers.data.check import CheckedImage, CheckResult, check_data
from gradprobe.trainers.data.clusters import AUTO, Grouping, parse_grouping
from gradprobe.trainers.data.data_yaml import SPLITS
from gradprobe.trainers.data.dataset import ImageDataset, ImageStore, Item
from gradprobe.trainers.data.images import Pixels
from gradprobe.trainers.data.labels import Box
from gradprobe.trainers.data.splits import DataFinding, errors, warnings

_STRIDE = 32
"""Image sizes are multiples of this: the coarsest grid of YOLOv5."""

_SHOWN_FINDINGS = 5


@dataclass(frozen=True)
class LoadedData:
    """What a run trains and is evaluated on."""

    name: str  # "phantom", or the data.yaml's own file name
    box_names: tuple[str, ...]
    image_names: tuple[str, ...]
    train: ImageDataset
    val: ImageDataset
    test: ImageDataset | None
    skipped: tuple[str, ...]  # one message per image left out
    warnings: tuple[str, ...]  # what a check warns about
    fingerprint: str  # sha256, hex, of the images and labels used; neither paths nor their order enter it


def load_data(
    source: str | Path,
    imgsz: int,
    seed: int = 0,
    skip_bad: bool = False,
    n_train: int | None = None,
    n_val: int | None = None,
    n_test: int | None = None,
    group_by: str = AUTO,
) -> LoadedData:
    """Load a data set for training.

    Images without an image class are left out, since both tasks have to see the same images.

    Args:
        source: "phantom", or a data.yaml.
        imgsz: Side of the square images, in pixels; a multiple of 32.
        seed: Which phantoms; nothing else depends on it.
        skip_bad: Leave out images that are unreadable or wrongly labelled, instead of refusing the data set.
        n_train: Number of phantoms to train on; N_TRAIN where None.
        n_val: Number of phantoms held out; N_VAL where None.
        n_test: Number of phantoms of the test split; N_TEST where None.
        group_by: Which images belong together: see :func:`gradprobe.trainers.data.clusters.parse_grouping`.

    Raises:
        UsageError: imgsz is no multiple of 32; a count is below 1, or given for a data.yaml; `group_by` is no rule.
        DataError: the data set has errors; says which, and what to do.
    """
    _check_imgsz(imgsz)
    for name, count in (("n_train", n_train), ("n_val", n_val), ("n_test", n_test)):
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}; it has to be 1 or greater")
        if count is not None and source != "phantom":
            raise UsageError(f"{name} counts phantoms; a data.yaml says itself which images it has")
    if source == "phantom":
        counts = {"train": n_train or phantom.N_TRAIN, "val": n_val or phantom.N_VAL, "test": n_test or phantom.N_TEST}
        return _load_phantoms(imgsz, seed, counts, parse_grouping(group_by))
    return _load_yaml(Path(source), imgsz, skip_bad, group_by)


def _check_imgsz(imgsz: int) -> None:
    """Raise UsageError unless an image size suits YOLOv5."""
    if imgsz < _STRIDE or imgsz % _STRIDE:
        suitable = max(-(-imgsz // _STRIDE), 1) * _STRIDE
        raise UsageError(f"imgsz {imgsz} is not a multiple of {_STRIDE}; the next one is --imgsz {suitable}")


def _load_phantoms(imgsz: int, seed: int, counts: Mapping[str, int], grouping: Grouping) -> LoadedData:
    store = ImageStore(imgsz)
    splits: dict[str, list[tuple[str, Item]]] = {}
    for split, count in counts.items():
        splits[split] = []
        for index in range(count):
            drawn = phantom.draw_phantom(seed, split, index)
            cluster = grouping.cluster(drawn.name) or ""
            item = Item(Path(drawn.name), drawn.name, drawn.boxes, drawn.image_class, cluster)
            store.add(item.path, drawn.image)
            splits[split].append((_digest(drawn.image), item))
    return _loaded("phantom", phantom.BOX_NAMES, phantom.IMAGE_NAMES, store, splits)


def _load_yaml(file: Path, imgsz: int, skip_bad: bool, group_by: str) -> LoadedData:
    store = ImageStore(imgsz)
    result = check_data(file, keep=store.add, group_by=group_by)
    _refuse(file, result, skip_bad)
    splits: dict[str, list[tuple[str, Item]]] = {}
    skipped = []
    for split, images in result.splits.items():
        splits[split] = []
        for image in images:
            if (reason := _why_skipped(image)) is not None:
                skipped.append(f"{split}: {image.file.name}: {reason}")
                continue
            assert image.image_class is not None
            cluster = result.grouping.cluster(image.file.shown) or ""
            item = Item(image.file.path, image.file.name, image.boxes, image.image_class, cluster)
            splits[split].append((image.digest, item))
        if not splits[split]:
            raise DataError(f"{file}: {split}: no image is left; all {len(images)} had to be left out")
    config, warned = result.config, _warnings_of(result)
    return _loaded(file.name, config.box_names, result.image_names, store, splits, tuple(skipped), warned)


def _refuse(file: Path, result: CheckResult, skip_bad: bool) -> None:
    """Raise if there are errors; with skip_bad, if there are some that leaving out images cannot help."""
    wrong = errors(result.findings)
    if skip_bad:
        wrong = [finding for finding in wrong if finding.file == result.config.shown_file]
    if not wrong:
        return
    listed = "".join(f"\n  {finding}" for finding in wrong[:_SHOWN_FINDINGS])
    more = f"\n  and {len(wrong) - _SHOWN_FINDINGS} more" if len(wrong) > _SHOWN_FINDINGS else ""
    advice = "--skip-bad cannot help here" if skip_bad else "--skip-bad leaves the images concerned out"
    raise DataError(
        f"{file}: {len(wrong)} errors:{listed}{more}\nList them all with: gradprobe data check {file} --all; {advice}."
    )


def _why_skipped(image: CheckedImage) -> str | None:
    if image.problems:
        more = f" (and {len(image.problems) - 1} more)" if len(image.problems) > 1 else ""
        first = image.problems[0]
        line = "" if first.line is None else f"line {first.line}: "
        return f"{line}{first.message}{more}"
    return "no image class" if image.image_class is None else None


def _warnings_of(result: CheckResult) -> tuple[str, ...]:
    """What a check warns about, with one line for all clips and patients that two splits share."""
    shared = [overlap.message for overlap in result.overlaps if any(overlap.shared.values())]
    return (*shared, *(_portable(finding) for finding in warnings(result.findings) if finding.kind != "cluster"))


def _portable(finding: DataFinding) -> str:
    """A finding without an absolute path, fit to be stored with a run."""
    file = Path(finding.file)
    return str(finding).replace(finding.file, file.name, 1) if file.is_absolute() else str(finding)


def _loaded(
    name: str,
    box_names: tuple[str, ...],
    image_names: tuple[str, ...],
    store: ImageStore,
    splits: Mapping[str, Sequence[tuple[str, Item]]],
    skipped: tuple[str, ...] = (),
    warned: tuple[str, ...] = (),
) -> LoadedData:
    """What the images of every split, each with a digest that identifies it, make."""
    datasets = {split: ImageDataset([item for _, item in images], store) for split, images in splits.items()}
    lines = []
    for split, images in splits.items():
        for digest, item in images:
            boxes = np.array(sorted(item.boxes), dtype="<f8").tobytes().hex()
            lines.append(f"{split} {digest} {item.image_class} {boxes}")
    text = "\n".join([repr(box_names), repr(image_names), *sorted(lines)])
    return LoadedData(
        name=name,
        box_names=box_names,
        image_names=image_names,
        train=datasets["train"],
        val=datasets["val"],
        test=datasets.get("test"),
        skipped=skipped,
        warnings=warned,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
    )


def _digest(image: Pixels) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


_GIVEN_KEYS = ("box_names", "image_names", "train", "val")


def load_samples(found: Any, source: str, imgsz: int) -> LoadedData:
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
    _check_imgsz(imgsz)
    if not isinstance(found, Mapping):
        raise DataError(f"{source}: returned a {type(found).__name__}, not a mapping with {', '.join(_GIVEN_KEYS)}.")
    if missing := [name for name in _GIVEN_KEYS if name not in found]:
        raise DataError(f"{source}: returned no {', '.join(missing)}; needed are {', '.join(_GIVEN_KEYS)}.")
    names = {key: tuple(map(str, found[key])) for key in ("box_names", "image_names")}
    store = ImageStore(imgsz, limit=sys.maxsize)
    splits: dict[str, list[tuple[str, Item]]] = {}
    for split in SPLITS:
        if found.get(split) is None:
            continue
        splits[split] = []
        for place, sample in enumerate(found[split]):
            item, image = _item(sample, f"{source}: {split}, sample {place}", Path(split, str(place)), names)
            store.add(item.path, image)
            splits[split].append((_digest(image), item))
        if not splits[split]:
            raise DataError(f"{source}: {split} has no sample.")
    return _loaded(source, names["box_names"], names["image_names"], store, splits)


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
