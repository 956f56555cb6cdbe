"""Which images a split holds, and where the labels of an image are."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradprobe.trainers.data.config import DataConfig
from gradprobe.trainers.data.findings import Finding
from gradprobe.trainers.data.places import candidates, find, looked_for, read_text

_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

Entry = tuple[Path, str, int | None]
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


def list_split(config: DataConfig, split: str) -> tuple[list[ImageFile], list[Finding]]:
    """The images of a split in the order it lists them (a folder: by name), each file once."""
    images: dict[Path, ImageFile] = {}
    findings: list[Finding] = []
    for entry in _entries(config, split):
        if isinstance(entry, Finding):
            findings.append(entry)
            continue
        path, file, line = entry
        resolved, shown = path.resolve(), config.shown(path)
        if resolved in images:
            findings.append(Finding("warning", file, line, f"{split}: lists {shown} twice; it is used once", "twice"))
            continue
        # Labels lie beside the path as listed: a link to an image elsewhere has its labels here.
        images[resolved] = ImageFile(split, resolved, label_path(path), shown)
    if not images and not any(finding.severity == "error" or split == "test" for finding in findings):
        message = f"{split}: no image in {', '.join(config.sources[split])}"
        findings.append(Finding("error", config.shown_file, config.lines.get(split), message))
    return list(images.values()), findings


def label_path(image: Path) -> Path:
    """Where YOLOv5 looks for the labels: the last folder `images` replaced by `labels`, suffix .txt."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _entries(config: DataConfig, split: str) -> Iterator[Entry | Finding]:
    here, line = config.shown_file, config.lines.get(split)
    for source in config.sources[split]:
        places = candidates(source, (config.root,))
        place = find(places)
        if place is None:
            yield _missing(config, split, source, places)
            continue
        if (other := _other_reading(source, place, places)) is not None:
            message = f"{split}: {source} is there as written, and without ../ as well ({other}); read as written"
            yield Finding("warning", here, line, message)
        if place.is_dir():
            for path in _images_in(place):
                yield path, here, line
        elif place.is_file() and place.suffix.lower() == ".txt":
            yield from _listed(config, place)
        elif place.is_file() and place.suffix.lower() in _IMAGE_SUFFIXES:
            yield place, here, line
        else:
            yield Finding("error", here, line, f"{split}: {source} is neither a folder, a txt file nor an image")


def _missing(config: DataConfig, split: str, source: str, places: Sequence[Path]) -> Finding:
    """An error; of the test split a warning, since exports name one that they do not hold."""
    message = f"{split}: {source} does not exist; {looked_for(source, places)}"
    if split == "test":
        message += "; it is left out"
    return Finding("warning" if split == "test" else "error", config.shown_file, config.lines.get(split), message)


def _other_reading(source: str, place: Path, places: Sequence[Path]) -> Path | None:
    """Another place that the path of a split may mean, where it begins with ../ and both are there."""
    later = places[places.index(place) + 1 :]
    other = find(later) if source.strip().startswith(("../", "..\\")) else None
    return other if other is not None and other.resolve() != place.resolve() else None


def _images_in(folder: Path) -> list[Path]:
    """All images below a folder, by path.

    As in YOLOv5, links to folders are followed and hidden files do not count: macOS leaves a `._a.jpg` beside `a.jpg`.
    """
    pattern = str(Path(glob.escape(str(folder)), "**", "*"))
    paths = map(Path, glob.iglob(pattern, recursive=True))  # noqa: PTH207  (Path.rglob follows no links)
    return sorted(path for path in paths if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file())


def _listed(config: DataConfig, listing: Path) -> Iterator[Entry | Finding]:
    """The images of a txt file: one path a line, relative to the txt file, or else to the root."""
    shown = config.shown(listing)
    try:
        lines = read_text(listing).splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        yield Finding("error", shown, None, f"cannot be read: {problem}")
        return
    for number, text in enumerate(lines, start=1):
        if not (name := text.strip()):
            continue
        places = candidates(text, (listing.parent, config.root))
        path = find(places, Path.is_file)
        if path is None:
            message = f"lists {name}, which does not exist; {looked_for(name, places)}"
            yield Finding("error", shown, number, message, "listed")
        elif path.suffix.lower() not in _IMAGE_SUFFIXES:
            yield Finding("error", shown, number, f"lists {name}, which is no image by its suffix", "listed")
        else:
            yield path, shown, number
