"""What a data set lists: the images of each split with their classes, and what is wrong with them."""

from __future__ import annotations

import csv
import glob
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gradprobe.trainers.data.data_yaml import (
    DataConfig,
    candidate_paths,
    first_existing,
    path_hint,
    read_text,
    searched,
)
from gradprobe.trainers.data.labels import LabelFile, one_hot_class

__all__ = ["condensed", "errors", "list_split", "warnings"]


_Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class DataFinding:
    """One thing wrong with a data set."""

    severity: _Severity
    file: str  # relative to the data set's root where it lies inside it
    line: int | None  # counted from 1; None where the file as a whole is meant
    message: str
    kind: str = ""  # of which there may be hundreds; empty: shown in any case
    size: int = 0  # images concerned, to show the worst of a kind first

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.message}"


def errors(findings: Iterable[DataFinding]) -> list[DataFinding]:
    """Those that keep a data set from being trained on."""
    return [finding for finding in findings if finding.severity == "error"]


def warnings(findings: Iterable[DataFinding]) -> list[DataFinding]:
    """Those that training can live with."""
    return [finding for finding in findings if finding.severity == "warning"]


def condensed(findings: Iterable[DataFinding], most: int | None) -> Iterator[DataFinding | str]:
    """The worst of each kind, and how many more there are of it.

    Args:
        findings: All.
        most: So many of a kind at most; None: all.
    """
    kinds: dict[str, list[DataFinding]] = {}
    for place, finding in enumerate(findings):
        kinds.setdefault(finding.kind or f"alone {place}", []).append(finding)
    for alike in kinds.values():
        worst = sorted(alike, key=lambda finding: -finding.size)
        yield from worst[:most]
        if more := len(worst[most:]) if most is not None else 0:
            yield f"and {more} more like the last"


@dataclass
class SplitCounts:
    """Counts of one split. Boxes and classes are counted in images without an error only."""

    images: int = 0  # listed
    bad: int = 0  # with an error; left out by skip_bad
    background: int = 0  # without a box
    no_image_class: int = 0  # left out of training: both tasks have to see the same images
    boxes: dict[str, int] = field(default_factory=dict)  # by box class
    image_classes: dict[str, int] = field(default_factory=dict)  # images by image class

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "images": self.images,
            "bad": self.bad,
            "background": self.background,
            "no_image_class": self.no_image_class,
            "boxes": dict(self.boxes),
            "image_classes": dict(self.image_classes),
        }


_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_Entry = tuple[Path, str, int | None]
"""An image, and the file and line that names it."""


@dataclass(frozen=True)
class ImageFile:
    """An image as a split lists it."""

    split: str
    path: Path  # resolved, so that one file has one path
    label: Path  # where its boxes are, if it has any
    shown: str  # relative to the root where it lies inside

    @property
    def name(self) -> str:
        """The file name as listed: where it is a link, that of the link."""
        return Path(self.shown).name


def list_split(config: DataConfig, split: str) -> tuple[list[ImageFile], list[DataFinding]]:
    """The images of a split in the order it lists them (a folder: by name), each file once."""
    images: dict[Path, ImageFile] = {}
    findings: list[DataFinding] = []
    for entry in _entries(config, split):
        if isinstance(entry, DataFinding):
            findings.append(entry)
            continue
        path, file, line = entry
        resolved, shown = path.resolve(), config.shown(path)
        if resolved in images:
            findings.append(
                DataFinding("warning", file, line, f"{split}: lists {shown} twice; it is used once", "twice")
            )
            continue
        # Labels lie beside the path as listed: a link to an image elsewhere has its labels here.
        images[resolved] = ImageFile(split, resolved, label_path(path), shown)
    if not images and not any(finding.severity == "error" or split == "test" for finding in findings):
        message = f"{split}: no image in {', '.join(config.sources[split])}"
        findings.append(DataFinding("error", config.shown_file, config.lines.get(split), message))
    return list(images.values()), findings


def label_path(image: Path) -> Path:
    """Where YOLOv5 looks for the labels: the last folder `images` replaced by `labels`, suffix .txt."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _entries(config: DataConfig, split: str) -> Iterator[_Entry | DataFinding]:
    here, line = config.shown_file, config.lines.get(split)
    for source in config.sources[split]:
        places = candidate_paths(source, (config.root,))
        place = first_existing(places)
        if place is None:
            yield _missing(config, split, source, places)
            continue
        if (other := _other_reading(source, place, places)) is not None:
            message = f"{split}: {source} is there as written, and without ../ as well ({other}); read as written"
            yield DataFinding("warning", here, line, message)
        if place.is_dir():
            for path in _images_in(place):
                yield path, here, line
        elif place.is_file() and place.suffix.lower() == ".txt":
            yield from _listed(config, place)
        elif place.is_file() and place.suffix.lower() in _IMAGE_SUFFIXES:
            yield place, here, line
        else:
            yield DataFinding("error", here, line, f"{split}: {source} is neither a folder, a txt file nor an image")


def _missing(config: DataConfig, split: str, source: str, places: Sequence[Path]) -> DataFinding:
    """An error; of the test split a warning, since exports name one that they do not hold."""
    message = f"{split}: {source} does not exist; {searched(source, places)}"
    if split == "test":
        message += "; it is left out"
    return DataFinding("warning" if split == "test" else "error", config.shown_file, config.lines.get(split), message)


def _other_reading(source: str, place: Path, places: Sequence[Path]) -> Path | None:
    """Another place that the path of a split may mean, where it begins with ../ and both are there."""
    later = places[places.index(place) + 1 :]
    other = first_existing(later) if source.strip().startswith(("../", "..\\")) else None
    return other if other is not None and other.resolve() != place.resolve() else None


def _images_in(folder: Path) -> list[Path]:
    """All images below a folder, by path.

    As in YOLOv5, links to folders are followed and hidden files do not count: macOS leaves a `._a.jpg` beside `a.jpg`.
    """
    pattern = str(Path(glob.escape(str(folder)), "**", "*"))
    paths = map(Path, glob.iglob(pattern, recursive=True))  # noqa: PTH207  (Path.rglob follows no links)
    return sorted(path for path in paths if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file())


def _listed(config: DataConfig, listing: Path) -> Iterator[_Entry | DataFinding]:
    """The images of a txt file: one path a line, relative to the txt file, or else to the root."""
    shown = config.shown(listing)
    try:
        lines = read_text(listing).splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        yield DataFinding("error", shown, None, f"cannot be read: {problem}")
        return
    for number, text in enumerate(lines, start=1):
        if not (name := text.strip()):
            continue
        places = candidate_paths(text, (listing.parent, config.root))
        path = first_existing(places, Path.is_file)
        if path is None:
            message = f"lists {name}, which does not exist; {searched(name, places)}"
            yield DataFinding("error", shown, number, message, "listed")
        elif path.suffix.lower() not in _IMAGE_SUFFIXES:
            yield DataFinding("error", shown, number, f"lists {name}, which is no image by its suffix", "listed")
        else:
            yield path, shown, number


_Classes = dict[Path, int]
"""Image class by image path; an image without a class is missing."""


def classes_from_csv(config: DataConfig, images: Sequence[ImageFile]) -> tuple[_Classes, list[DataFinding]]:
    """Read `image_labels`: a header `image,class`, then a row per image.

    An image is named by its file name, or by its path relative to the root where two share a name; a class
    by its name in image_names or by its index.
    """
    written = config.image_labels
    assert written is not None
    places = candidate_paths(written, (config.root,))
    file = first_existing(places, Path.is_file)
    if file is None:
        message = f"does not exist; {searched(written, places)}; data.yaml names it in image_labels"
        return {}, [DataFinding("error", written, None, message)]
    shown, names = config.shown(file), config.image_names or ()
    try:
        reader = csv.reader(io.StringIO(read_text(file), newline=""))
        header = [cell.strip().lower() for cell in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        return {}, [DataFinding("error", shown, None, f"cannot be read: {problem}; data.yaml names it in image_labels")]
    if header[:2] != ["image", "class"]:
        return {}, [DataFinding("error", shown, 1, "the header is not image,class")]

    paths = _paths_by_name(images)
    classes: _Classes = {}
    findings: list[DataFinding] = []
    unknown: list[tuple[int, str]] = []
    for line, row in rows:
        name, class_name = row[0].strip(), row[1].strip() if len(row) > 1 else ""
        image_class = _class_index(class_name, names)
        found = _named(name, paths, (file.parent, config.root))
        if image_class is None:
            message = f"{name}: image class {class_name!r} is none of {', '.join(names)}"
            if _are_numbers(names) and class_name.isdigit():
                message += "; where names are numbers, a number is taken for a name and not for an index"
            findings.append(DataFinding("error", shown, line, message, "class"))
        elif not found:
            unknown.append((line, name))
        elif len(found) > 1:
            message = f"{name}: {len(found)} images have this name; give the path relative to the root"
            findings.append(DataFinding("error", shown, line, message, "class"))
        elif classes.setdefault(path := next(iter(found)), image_class) != image_class:
            message = f"{name}: class {class_name!r}, but {names[classes[path]]!r} in an earlier row"
            findings.append(DataFinding("error", shown, line, message, "class"))
    if unknown:
        line, name = unknown[0]
        message = f"{len(unknown)} rows name no image of the data set; the first: {name}{path_hint(name)}"
        findings.append(DataFinding("warning", shown, line, message))
    return classes, findings


def _paths_by_name(images: Sequence[ImageFile]) -> Mapping[str, set[Path]]:
    """The images that a name may mean: by file name, and by path relative to the root."""
    paths: dict[str, set[Path]] = defaultdict(set)
    for image in images:
        for name in (image.name, image.shown, str(image.path)):
            paths[name].add(image.path)
    return paths


def _named(name: str, paths: Mapping[str, set[Path]], folders: Sequence[Path]) -> set[Path]:
    """What a cell of the csv names: as written, with slashes for backslashes, or as a path from one of the folders."""
    slashes = name.replace("\\", "/")
    for text in (name, slashes, slashes.removeprefix("./")):
        if text in paths:
            return paths[text]
    place = first_existing(candidate_paths(name, folders), Path.is_file) if "/" in slashes else None
    return paths.get(str(place.resolve()), set()) if place is not None else set()


def _class_index(name: str, names: tuple[str, ...]) -> int | None:
    texts = [each.strip() for each in names]  # as the cells of the csv
    if name in texts:
        return texts.index(name)
    # With classes "1" and "2" an index 0 beside a name "1" would silently be the same class.
    if name.isascii() and name.isdigit() and int(name) < len(names) and not _are_numbers(names):
        return int(name)
    return None


def _are_numbers(names: Sequence[str]) -> bool:
    return any(name.strip().isdigit() for name in names)


def classes_from_rows(
    config: DataConfig, images: Sequence[ImageFile], labels: Mapping[Path, LabelFile]
) -> tuple[_Classes, tuple[str, ...], dict[Path, DataFinding]]:
    """Read the one-hot rows.

    Returns:
        The classes; their names (class0, class1, ... where data.yaml gives none, as many as most rows have
        numbers); and what is wrong, by image.
    """
    lengths = Counter(len(row) for label in labels.values() if (row := label.one_hot) is not None)
    if config.image_names is None:
        count = max(lengths, key=lambda length: (lengths[length], -length)) if lengths else 0
        names = tuple(f"class{index}" for index in range(count))
    else:
        names = config.image_names
    classes: _Classes = {}
    findings: dict[Path, DataFinding] = {}
    for image in {image.path: image for image in images}.values():
        label = labels[image.path]
        if label.one_hot is None:
            continue
        found: int | str = one_hot_class(label.one_hot)
        if len(label.one_hot) != len(names):
            found = f"a row for the image's class with {len(label.one_hot)} numbers; others have {len(names)}"
        if isinstance(found, int):
            classes[image.path] = found
        else:
            findings[image.path] = DataFinding("error", config.shown(image.label), label.one_hot_line, found, "class")
    return classes, names, findings
