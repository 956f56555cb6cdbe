"""One phantom from its seed, split and number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradprobe.errors import UsageError
from gradprobe.trainers.data.phantom import difficulty
from gradprobe.trainers.data.phantom.anatomy import VIEWS
from gradprobe.trainers.data.phantom.doppler import (
    Box,
    Flow,
    bounding_box,
    choose_valves,
    draw_jet,
    draw_laminar,
    paint,
)
from gradprobe.trainers.data.phantom.draws import Draws, Plane
from gradprobe.trainers.data.phantom.echo import draw_echo, draw_tissue
from gradprobe.trainers.data.phantom.geometry import Sector, draw_heart, draw_sector

SIZE = 160
"""Height and width of a phantom in pixels."""

SPLITS = ("train", "val", "test")
"""Each is a population of patients of its own."""


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
    if draws.chance(difficulty.LAMINAR_FLOW):
        image = paint(image, draw_laminar(draws, view, heart, sector))
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
