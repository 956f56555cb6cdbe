"""The class of each image: from a csv file, or from one-hot rows in the label files."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradprobe.trainers.data.config import DataConfig
from gradprobe.trainers.data.findings import Finding
from gradprobe.trainers.data.labels import LabelFile, one_hot_class
from gradprobe.trainers.data.places import candidates, find, hint, looked_for, read_text
from gradprobe.trainers.data.splits import ImageFile

Classes = dict[Path, int]
"""Image class by image path; an image without a class is missing."""


def classes_from_csv(config: DataConfig, images: Sequence[ImageFile]) -> tuple[Classes, list[Finding]]:
    """Read `image_labels`: a header `image,class`, then a row per image.

    An image is named by its file name, or by its path relative to the root where two share a name; a class
    by its name in image_names or by its index.
    """
    written = config.image_labels
    assert written is not None
    places = candidates(written, (config.root,))
    file = find(places, Path.is_file)
    if file is None:
        message = f"does not exist; {looked_for(written, places)}; data.yaml names it in image_labels"
        return {}, [Finding("error", written, None, message)]
    shown, names = config.shown(file), config.image_names or ()
    try:
        reader = csv.reader(io.StringIO(read_text(file), newline=""))
        header = [cell.strip().lower() for cell in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        return {}, [Finding("error", shown, None, f"cannot be read: {problem}; data.yaml names it in image_labels")]
    if header[:2] != ["image", "class"]:
        return {}, [Finding("error", shown, 1, "the header is not image,class")]

    paths = _paths_by_name(images)
    classes: Classes = {}
    findings: list[Finding] = []
    unknown: list[tuple[int, str]] = []
    for line, row in rows:
        name, class_name = row[0].strip(), row[1].strip() if len(row) > 1 else ""
        image_class = _class_index(class_name, names)
        found = _named(name, paths, (file.parent, config.root))
        if image_class is None:
            message = f"{name}: image class {class_name!r} is none of {', '.join(names)}"
            if _are_numbers(names) and class_name.isdigit():
                message += "; where names are numbers, a number is taken for a name and not for an index"
            findings.append(Finding("error", shown, line, message, "class"))
        elif not found:
            unknown.append((line, name))
        elif len(found) > 1:
            message = f"{name}: {len(found)} images have this name; give the path relative to the root"
            findings.append(Finding("error", shown, line, message, "class"))
        elif classes.setdefault(path := next(iter(found)), image_class) != image_class:
            message = f"{name}: class {class_name!r}, but {names[classes[path]]!r} in an earlier row"
            findings.append(Finding("error", shown, line, message, "class"))
    if unknown:
        line, name = unknown[0]
        message = f"{len(unknown)} rows name no image of the data set; the first: {name}{hint(name)}"
        findings.append(Finding("warning", shown, line, message))
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
    place = find(candidates(name, folders), Path.is_file) if "/" in slashes else None
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
) -> tuple[Classes, tuple[str, ...], dict[Path, Finding]]:
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
    classes: Classes = {}
    findings: dict[Path, Finding] = {}
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
            findings[image.path] = Finding("error", config.shown(image.label), label.one_hot_line, found, "class")
    return classes, names, findings
