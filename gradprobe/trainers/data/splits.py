"""Which images a split holds, and where the labels of an image are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradprobe.trainers.data.config import DataConfig
from gradprobe.trainers.data.findings import Finding

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

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
        return self.shown.replace("\\", "/").rsplit("/", 1)[-1]


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
            findings.append(Finding("warning", file, line, f"{split}: lists {shown} twice; it is used once"))
            continue
        # Labels lie beside the path as listed: a link to an image elsewhere has its labels here.
        images[resolved] = ImageFile(split, resolved, label_path(path), shown)
    if not images and not findings:
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
        place = config.root / source
        if place.is_dir():
            for path in sorted(place.rglob("*")):
                if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                    yield path, here, line
        elif place.is_file() and place.suffix.lower() == ".txt":
            yield from _listed(config, place)
        elif place.is_file() and place.suffix.lower() in IMAGE_SUFFIXES:
            yield place, here, line
        else:
            what = "is neither a folder, a txt file nor an image" if place.exists() else "does not exist"
            yield Finding("error", here, line, f"{split}: {source} {what}")


def _listed(config: DataConfig, listing: Path) -> Iterator[Entry | Finding]:
    """The images of a txt file: one path a line, relative to the txt file, or else to the root."""
    shown = config.shown(listing)
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        yield Finding("error", shown, None, f"cannot be read: {problem}")
        return
    for number, text in enumerate(lines, start=1):
        if not (name := text.strip()):
            continue
        candidates = (listing.parent / name, config.root / name)
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is None:
            yield Finding("error", shown, number, f"lists {name}, which does not exist")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            yield Finding("error", shown, number, f"lists {name}, which is no image by its suffix")
        else:
            yield path, shown, number
