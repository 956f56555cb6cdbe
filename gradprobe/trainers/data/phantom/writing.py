"""Phantoms written to disk as a data set in YOLO format."""

from __future__ import annotations

from pathlib import Path

from gradprobe.errors import DataError, UsageError
from gradprobe.trainers.data.phantom.anatomy import BOX_NAMES, IMAGE_NAMES
from gradprobe.trainers.data.phantom.drawing import SPLITS, Phantom, draw_phantom

_HELD_OUT_PERCENT = 15
"""Of all phantoms, in val and again in test; at least one in each."""


def split_sizes(n: int) -> dict[str, int]:
    """How many of n phantoms each split gets.

    Raises:
        UsageError: n is below 3.
    """
    if n < len(SPLITS):
        raise UsageError(f"--n is {n}; it takes 3 phantoms or more to fill train, val and test")
    held_out = max(n * _HELD_OUT_PERCENT // 100, 1)
    return {"train": n - 2 * held_out, "val": held_out, "test": held_out}


def write_phantoms(folder: Path, n: int, seed: int) -> Path:
    """Write n phantoms with their labels; the data.yaml, which is returned, comes last.

    Raises:
        UsageError: the folder is not empty, n is below 3, or the seed is negative.
        DataError: it cannot be written, for want of space or of permission.
    """
    sizes = split_sizes(n)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a new folder to write the phantoms into")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; name a new or an empty folder, nothing was written")
    draw_phantom(seed, SPLITS[0], 0)  # a wrong seed shows before a folder is made
    try:
        return _write(folder, sizes, seed)
    except OSError as problem:
        raise DataError(f"{folder}: the data set could not be written completely: {problem}") from problem


def _write(folder: Path, sizes: dict[str, int], seed: int) -> Path:
    rows = ["image,class"]
    for split, count in sizes.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            drawn = draw_phantom(seed, split, index)
            _write_one(folder, split, drawn)
            rows.append(f"{drawn.name},{IMAGE_NAMES[drawn.image_class]}")
    (folder / "classes.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    yaml = folder / "data.yaml"
    yaml.write_text(_yaml(seed), encoding="utf-8")
    return yaml


def _write_one(folder: Path, split: str, drawn: Phantom) -> None:
    from PIL import Image

    Image.fromarray(drawn.image).save(folder / "images" / split / drawn.name)
    lines = [" ".join([str(box[0]), *(f"{value:.6f}" for value in box[1:])]) + "\n" for box in drawn.boxes]
    label = folder / "labels" / split / Path(drawn.name).with_suffix(".txt")
    label.write_text("".join(lines), encoding="utf-8")


def _yaml(seed: int) -> str:
    splits = "".join(f"{split}: images/{split}\n" for split in SPLITS)
    return (
        f"# Colour-Doppler phantoms drawn by gradprobe with seed {seed}; no patient was involved.\n"
        f"path: .\n{splits}"
        f"nc: {len(BOX_NAMES)}\n"
        f"names: [{', '.join(BOX_NAMES)}]  # regurgitation jets\n"
        f"image_names: [{', '.join(IMAGE_NAMES)}]  # views\n"
        "image_labels: classes.csv\n"
    )
