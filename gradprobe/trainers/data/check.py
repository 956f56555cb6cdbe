"""Everything that is wrong with a data set, and counts of what is in it, in one pass over its files."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gradprobe.errors import UsageError
from gradprobe.trainers.data.clusters import AUTO, Grouping, Overlap, find_duplicates, find_leaks, parse_grouping
from gradprobe.trainers.data.data_yaml import DataConfig, read_config, read_text
from gradprobe.trainers.data.images import Decoded, Pixels, UnreadableImage, decode
from gradprobe.trainers.data.labels import (
    Box,
    LabelFile,
    LandmarkDecision,
    Landmarks,
    could_hold_landmarks,
    decide_landmarks,
    declared_landmarks,
    long_rows,
    parse_labels,
)
from gradprobe.trainers.data.splits import (
    DataFinding,
    ImageFile,
    SplitCounts,
    classes_from_csv,
    classes_from_rows,
    list_split,
)

__all__ = ["CheckResult", "check_data"]


_DECODING_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class CheckedImage:
    """An image with its labels. It can be trained on if it has no problem and an image class."""

    file: ImageFile
    boxes: tuple[Box, ...]
    image_class: int | None  # None: it has none, or a wrong one
    digest: str  # sha256 of the image file; empty where it is unreadable
    problems: tuple[DataFinding, ...]  # its errors


@dataclass(frozen=True)
class CheckResult:
    """What a check found."""

    config: DataConfig
    image_names: tuple[str, ...]
    splits: dict[str, list[CheckedImage]]
    findings: list[DataFinding]  # errors and warnings, in the order of data.yaml, splits and images
    counts: dict[str, SplitCounts]
    grouping: Grouping  # how it was told which images belong together
    overlaps: list[Overlap]  # of each two splits


def check_data(
    file: str | Path | DataConfig, keep: Callable[[Path, Pixels], None] | None = None, group_by: str = AUTO
) -> CheckResult:
    """Check a data set in YOLO format; `gradprobe data check` on the command line.

    Errors: an unreadable image; a label line that is not a box or polygon with a known class inside [0, 1];
    an unknown image class; no image class at all; a missing or empty split. Warnings: an image without a
    class (it is left out of training); a picture or a box that stands twice; a picture, clip or patient in
    two splits; rows that may be a box with landmarks or a polygon; an image that is odd, though readable;
    a test split that is not there.

    Args:
        file: A data.yaml, or what `read_config` made of it.
        keep: Called with each readable image, decoded, so that a caller need not decode it again.
        group_by: Which images belong together: see :func:`gradprobe.trainers.data.clusters.parse_grouping`.

    Raises:
        DataError: data.yaml itself is missing or malformed.
        UsageError: `group_by` is no rule, or tells nothing of any image.
    """
    grouping = parse_grouping(group_by)
    config = file if isinstance(file, DataConfig) else read_config(file)
    splits: dict[str, list[ImageFile]] = {}
    findings: list[DataFinding] = []
    for split in config.sources:
        images, found = list_split(config, split)
        findings += found
        if images or split != "test":
            splits[split] = images
    findings += _ungrouped(config, splits, grouping)
    images = [image for split in splits.values() for image in split]
    unique = list({image.path: image for image in reversed(images)}.values())[::-1]

    problems: dict[Path, list[DataFinding]] = defaultdict(list)
    texts = {image.path: _label_text(config, image, problems) for image in unique}
    marks, found = _landmarks(config, unique, texts)
    findings += found
    labels = {image.path: _parse(config, image, texts[image.path], marks, problems, findings) for image in unique}
    classes, names, found = _image_classes(config, images, labels, problems)
    findings += found
    file_digests: dict[Path, str] = {}
    pixel_digests: dict[Path, str] = {}
    for image, decoded in _decoded(unique):
        if isinstance(decoded, UnreadableImage):
            message = f"unreadable image: {decoded}"
            problems[image.path].append(DataFinding("error", image.shown, None, message, "image"))
            continue
        file_digests[image.path], pixel_digests[image.path] = decoded.file_digest, decoded.pixel_digest
        if keep is not None:
            keep(image.path, decoded.pixels)
        findings += [DataFinding("warning", image.shown, None, note, "odd image") for note in decoded.notes]

    for image in unique:
        findings += problems[image.path]
    findings += _unlabelled(config, unique, classes, problems)
    overlaps, found = find_leaks(config, splits, pixel_digests, grouping)
    findings += find_duplicates(images, pixel_digests) + found
    checked = {
        split: [
            CheckedImage(
                file=image,
                boxes=tuple(labels[image.path].boxes),
                image_class=classes.get(image.path),
                digest=file_digests.get(image.path, ""),
                problems=tuple(problems[image.path]),
            )
            for image in splits[split]
        ]
        for split in splits
    }
    counts = {split: _count_split(checked[split], config.box_names, names) for split in checked}
    return CheckResult(config, names, checked, findings, counts, grouping, overlaps)


def _count_split(images: Iterable[CheckedImage], box_names: Sequence[str], image_names: Sequence[str]) -> SplitCounts:
    """Count the images, boxes and classes of a split."""
    counts = SplitCounts(boxes=dict.fromkeys(box_names, 0), image_classes=dict.fromkeys(image_names, 0))
    for image in images:
        counts.images += 1
        if image.problems:
            counts.bad += 1
            continue
        counts.background += not image.boxes
        for box in image.boxes:
            counts.boxes[box_names[box[0]]] += 1
        if image.image_class is None:
            counts.no_image_class += 1
        else:
            counts.image_classes[image_names[image.image_class]] += 1
    return counts


def _ungrouped(
    config: DataConfig, splits: Mapping[str, Sequence[ImageFile]], grouping: Grouping
) -> Iterator[DataFinding]:
    """Images of which a rule that was asked for tells nothing."""
    images = [image for split in splits.values() for image in split]
    silent = [image for image in images if not grouping.of(image.shown)]
    if grouping.rule in (AUTO, "none") or not silent:
        return
    if len(silent) == len(images):
        raise UsageError(
            f"--group-by {grouping.rule}: tells nothing of any of the {len(images)} images, such as {silent[0].shown}."
        )
    message = (
        f"--group-by {grouping.rule} tells nothing of {len(silent)} of {len(images)} images, such as "
        f"{silent[0].shown}; each of them counts by itself"
    )
    yield DataFinding("warning", config.shown_file, None, message)


def _label_text(config: DataConfig, image: ImageFile, problems: dict[Path, list[DataFinding]]) -> str:
    """The label file of an image as it stands; an error goes to the image's problems."""
    try:
        return read_text(image.label)
    except FileNotFoundError:
        return ""  # background
    except (OSError, UnicodeDecodeError) as problem:
        problems[image.path].append(
            DataFinding("error", config.shown(image.label), None, f"cannot be read: {problem}", "label")
        )
        return ""


def _row_length(config: DataConfig) -> int | None:
    """Numbers of a one-hot row; None where it is not known; 0 where there is none."""
    if config.image_labels is not None:
        return 0
    return len(config.image_names) if config.image_names is not None else None


def _landmarks(
    config: DataConfig, images: Sequence[ImageFile], texts: Mapping[Path, str]
) -> tuple[Landmarks, list[DataFinding]]:
    """Which rows are a box with landmarks, and what to say of it at the first of them."""
    if config.keypoints is not None:
        return declared_landmarks(config.keypoints), []

    def rows() -> Iterator[tuple[str, int, tuple[float, ...]]]:
        for image in images:
            for line, row in long_rows(texts[image.path], _row_length(config)):
                yield config.shown(image.label), line, row

    marks, report = decide_landmarks(row for _, _, row in rows())
    return marks, [_landmark_finding(rows(), marks, each) for each in report]


def _landmark_finding(
    rows: Iterable[tuple[str, int, tuple[float, ...]]], marks: Landmarks, judged: LandmarkDecision
) -> DataFinding:
    """What was decided for the rows of a length, at the first of those that it concerns."""
    places = [(file, line) for file, line, row in rows if len(row) == judged.length and _concerns(judged, marks, row)]
    files = len({file for file, _ in places})
    where = f"; in {files} files, first here" if files > 1 else ""
    return DataFinding("warning", *places[0], judged.message + where)


def _concerns(judged: LandmarkDecision, marks: Landmarks, row: Sequence[float]) -> bool:
    return marks.holds(row) if judged.boxes else could_hold_landmarks(row)


def _parse(
    config: DataConfig,
    image: ImageFile,
    text: str,
    marks: Landmarks,
    problems: dict[Path, list[DataFinding]],
    findings: list[DataFinding],
) -> LabelFile:
    """The boxes of an image; errors go to the image's problems, warnings to the findings."""
    shown = config.shown(image.label)
    label = parse_labels(text, config.box_names, _row_length(config), marks)
    problems[image.path] += [DataFinding("error", shown, line, message, "label") for line, message in label.problems]
    findings += [
        DataFinding("warning", shown, line, "the same box as an earlier line; it is used once", "repeated")
        for line in label.repeated
    ]
    return label


def _image_classes(
    config: DataConfig,
    images: Sequence[ImageFile],
    labels: Mapping[Path, LabelFile],
    problems: dict[Path, list[DataFinding]],
) -> tuple[dict[Path, int], tuple[str, ...], list[DataFinding]]:
    if config.image_labels is not None:
        classes, findings = classes_from_csv(config, images)
        return classes, config.image_names or (), findings
    classes, names, wrong = classes_from_rows(config, images, labels)
    for path, finding in wrong.items():
        problems[path].append(finding)
    return classes, names, []


def _unlabelled(
    config: DataConfig,
    images: Sequence[ImageFile],
    classes: Mapping[Path, int],
    problems: Mapping[Path, list[DataFinding]],
) -> Iterator[DataFinding]:
    """Images without a class; and label files that are missing altogether."""
    if images and not classes:
        key = "image_labels" if config.image_labels is not None else "image_names"
        message = (
            "no image has an image class; give image_names: [...] and image_labels: classes.csv "
            "(image,class), or a one-hot row as the last line of each label file"
        )
        yield DataFinding("error", config.shown_file, config.lines.get(key), message)
    else:
        for image in images:
            if image.path not in classes and not problems[image.path]:
                message = f"{image.split}: no image class; the image is left out of training"
                yield DataFinding("warning", image.shown, None, message, "no class")
    if images and not any(image.label.exists() for image in images):
        message = f"no image has a label file, so none has a box; looked for {config.shown(images[0].label)}"
        yield DataFinding("warning", config.shown_file, None, message)


def _decoded(images: Sequence[ImageFile]) -> Iterator[tuple[ImageFile, Decoded | UnreadableImage]]:
    """Decode in a few threads (Pillow lets go of the lock), a few images ahead, in order."""

    def attempt(image: ImageFile) -> Decoded | UnreadableImage:
        try:
            return decode(image.path)
        except UnreadableImage as problem:
            return problem

    waiting = iter(images)
    with ThreadPoolExecutor(_DECODING_THREADS) as pool:
        while window := list(islice(waiting, 2 * _DECODING_THREADS)):  # bounds the memory
            yield from zip(window, pool.map(attempt, window), strict=True)
