"""The data sets of a training run, from the embedded phantoms or from a data.yaml."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradprobe.errors import DataError, UsageError
from gradprobe.trainers.data import phantom
from gradprobe.trainers.data.check import CheckedImage, CheckResult, check_data
from gradprobe.trainers.data.dataset import ImageDataset, ImageStore, Item
from gradprobe.trainers.data.findings import Finding, errors, warnings
from gradprobe.trainers.data.grouping import AUTO, Grouping, parse
from gradprobe.trainers.data.phantom import N_TEST, N_TRAIN, N_VAL

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
        group_by: Which images belong together: see :func:`gradprobe.trainers.data.grouping.parse`.

    Raises:
        UsageError: imgsz is no multiple of 32; a count is below 1, or given for a data.yaml; `group_by` is no rule.
        DataError: the data set has errors; says which, and what to do.
    """
    check_imgsz(imgsz)
    for name, count in (("n_train", n_train), ("n_val", n_val), ("n_test", n_test)):
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}; it has to be 1 or greater")
        if count is not None and source != "phantom":
            raise UsageError(f"{name} counts phantoms; a data.yaml says itself which images it has")
    if source == "phantom":
        counts = {"train": n_train or N_TRAIN, "val": n_val or N_VAL, "test": n_test or N_TEST}
        return _load_phantoms(imgsz, seed, counts, parse(group_by))
    return _load_yaml(Path(source), imgsz, skip_bad, group_by)


def check_imgsz(imgsz: int) -> None:
    """Raise UsageError unless an image size suits YOLOv5."""
    if imgsz < _STRIDE or imgsz % _STRIDE:
        suitable = max(-(-imgsz // _STRIDE), 1) * _STRIDE
        raise UsageError(f"imgsz {imgsz} is not a multiple of {_STRIDE}; the next one is --imgsz {suitable}")


def _load_phantoms(imgsz: int, seed: int, counts: Mapping[str, int], grouping: Grouping) -> LoadedData:
    store = ImageStore(imgsz)
    datasets = {}
    entries = []
    for split, count in counts.items():
        items = []
        for index in range(count):
            drawn = phantom.draw_phantom(seed, split, index)
            item = Item(
                Path(drawn.name), drawn.name, drawn.boxes, drawn.image_class, grouping.cluster(drawn.name) or ""
            )
            store.add(item.path, drawn.image)
            items.append(item)
            entries.append((split, hashlib.sha256(drawn.image.tobytes()).hexdigest(), item))
        datasets[split] = ImageDataset(items, store)
    return LoadedData(
        name="phantom",
        box_names=phantom.BOX_NAMES,
        image_names=phantom.IMAGE_NAMES,
        train=datasets["train"],
        val=datasets["val"],
        test=datasets["test"],
        skipped=(),
        warnings=(),
        fingerprint=fingerprint(phantom.BOX_NAMES, phantom.IMAGE_NAMES, entries),
    )


def _load_yaml(file: Path, imgsz: int, skip_bad: bool, group_by: str) -> LoadedData:
    store = ImageStore(imgsz)
    result = check_data(file, keep=store.add, group_by=group_by)
    _refuse(file, result, skip_bad)
    datasets: dict[str, ImageDataset] = {}
    entries, skipped = [], []
    for split, images in result.splits.items():
        items = []
        for image in images:
            if (reason := _why_skipped(image)) is not None:
                skipped.append(f"{split}: {image.file.name}: {reason}")
                continue
            assert image.image_class is not None
            cluster = result.grouping.cluster(image.file.shown) or ""
            item = Item(image.file.path, image.file.name, image.boxes, image.image_class, cluster)
            items.append(item)
            entries.append((split, image.digest, item))
        if not items:
            raise DataError(f"{file}: {split}: no image is left; all {len(images)} had to be left out")
        datasets[split] = ImageDataset(items, store)
    return LoadedData(
        name=file.name,
        box_names=result.config.box_names,
        image_names=result.image_names,
        train=datasets["train"],
        val=datasets["val"],
        test=datasets.get("test"),
        skipped=tuple(skipped),
        warnings=_told(result),
        fingerprint=fingerprint(result.config.box_names, result.image_names, entries),
    )


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


def _told(result: CheckResult) -> tuple[str, ...]:
    """What a check warns about, with one line for all clips and patients that two splits share."""
    shared = [overlap.message for overlap in result.overlaps if any(overlap.shared.values())]
    return (*shared, *(_portable(finding) for finding in warnings(result.findings) if finding.kind != "cluster"))


def _portable(finding: Finding) -> str:
    """A finding without an absolute path, fit to be stored with a run."""
    file = Path(finding.file)
    return str(finding).replace(finding.file, file.name, 1) if file.is_absolute() else str(finding)


def fingerprint(box_names: Sequence[str], image_names: Sequence[str], entries: Iterable[tuple[str, str, Item]]) -> str:
    """What identifies the images and labels of all splits.

    Args:
        box_names: Names of the box classes.
        image_names: Names of the image classes.
        entries: Split, digest of the image and labels, in any order.
    """
    lines = []
    for split, digest, item in entries:
        boxes = np.array(sorted(item.boxes), dtype="<f8").tobytes().hex()
        lines.append(f"{split} {digest} {item.image_class} {boxes}")
    text = "\n".join([repr(tuple(box_names)), repr(tuple(image_names)), *sorted(lines)])
    return hashlib.sha256(text.encode()).hexdigest()
