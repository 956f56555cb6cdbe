"""The embedded data set: colour-Doppler echocardiograms drawn with numpy alone.

The image class is the view (`IMAGE_NAMES`), the boxes are regurgitation jets (`BOX_NAMES`). Each split is a population
of patients of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradprobe.errors import DataError, UsageError
from gradprobe.trainers.data.data_yaml import SPLITS
from gradprobe.trainers.data.labels import Box
from gradprobe.trainers.data.phantom_scene import (
    VIEWS,
    Draws,
    Flow,
    Plane,
    Sector,
    bounding_box,
    choose_valves,
    draw_echo,
    draw_heart,
    draw_jet,
    draw_laminar,
    draw_sector,
    draw_tissue,
    paint,
)

__all__ = ["BOX_NAMES", "N_TRAIN", "draw_phantom", "split_sizes", "write_phantoms"]


IMAGE_NAMES = ("PSAX", "PLAX", "A4C")
"""Views: parasternal short axis (at the aortic valve), parasternal long axis, apical four-chamber."""


BOX_NAMES = ("AR", "MR", "PR", "TR")
"""Regurgitation of the aortic, mitral, pulmonary and tricuspid valve."""


N_TRAIN = 384
"""Phantoms to train on, where nothing else is asked for."""

N_VAL = 96
"""Phantoms held out, where nothing else is asked for."""

N_TEST = 96
"""Phantoms of the test split, where nothing else is asked for."""


SIZE = 160
"""Height and width of a phantom in pixels."""


@dataclass(frozen=True)
class Phantom:
    """A colour-Doppler image and what is seen in it."""

    name: str  # file name
    image: NDArray[np.uint8]  # (size, size, 3), RGB
    boxes: tuple[Box, ...]  # one per visible jet; never empty
    image_class: int  # index into IMAGE_NAMES


def draw_phantom(seed: int, split: str, index: int, size: int = SIZE) -> Phantom:
    """The phantom number `index` of a split: the same bits on every machine.

    Args:
        seed: Not negative. Other seeds are other patients.
        split: "train", "val" or "test". No image of one is in another.
        index: Not negative. An image does not depend on how many others are drawn; views take turns.
        size: Height and width in pixels. Another size is the same scene, with other speckle edges.

    Raises:
        UsageError: the seed is negative.
    """
    if seed < 0:
        raise UsageError(f"the seed of the phantoms is {seed}; it has to be 0 or greater (--seed)")
    draws = Draws(seed, SPLITS.index(split), index)
    view = VIEWS[index % len(VIEWS)]
    sector = draw_sector(draws, size)
    heart = draw_heart(draws, sector)
    grey = draw_echo(draws, draw_tissue(draws, view, heart, sector), sector)
    image: Plane = np.repeat(grey[..., None], 3, axis=-1)
    if (laminar := draw_laminar(draws, view, heart, sector)) is not None:
        image = paint(image, laminar)
    boxes = []
    for valve in choose_valves(draws, view):
        jet: Flow = draw_jet(draws, valve, heart, sector)
        image = paint(image, jet)
        if (box := bounding_box(valve.box_class, jet.mask)) is not None:
            boxes.append(box)
    image = _colour_bar(image, sector)
    pixels = (np.clip(image, 0.0, 1.0) * np.float32(255.0) + np.float32(0.5)).astype(np.uint8)
    return Phantom(f"phantom_{split}_{index:05d}.png", pixels, tuple(boxes), index % len(VIEWS))


def _colour_bar(image: Plane, sector: Sector) -> Plane:
    """The scale of velocities that every machine shows in a corner; the same in every image."""
    height = (0.16 - sector.row) / np.float32(0.13)  # velocity, 1 at the top of the bar, -1 at its bottom
    mask = (np.abs(height) <= 1.0) & (sector.column >= 0.945) & (sector.column < 0.975)
    return paint(image, Flow(mask, height * np.float32(0.99), np.ones_like(height)))


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
