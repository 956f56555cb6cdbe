"""An image made square as YOLOv5 does it, and its boxes with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.errors import MissingExtraError
from gradprobe.trainers.data.labels import Box
from gradprobe.trainers.data.pixels import Pixels

PADDING = 114
"""Grey level around the image, as in YOLOv5."""


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the square, in pixels."""

    size: int
    left: int
    top: int
    width: int
    height: int


def place(height: int, width: int, size: int) -> Placement:
    """The longer side becomes `size`, the shorter one follows (rounded up); centred, a spare pixel last."""
    ratio = size / max(height, width)
    # Never above `size`: 160 * (size / 160) may be a hair too much, and rounding up would make it a pixel.
    new_width, new_height = min(math.ceil(width * ratio), size), min(math.ceil(height * ratio), size)
    return Placement(size, (size - new_width) // 2, (size - new_height) // 2, new_width, new_height)


def letterbox(image: Pixels, size: int) -> tuple[Pixels, Placement]:
    """Scale an image into a square and pad it with grey.

    Args:
        image: Shape (height, width, 3), uint8.
        size: Side of the square in pixels.

    Returns:
        Shape (size, size, 3), uint8, bilinear where enlarged and area-averaged where shrunk; and where the
        image lies in it. An image of that size already comes back as it is.
    """
    height, width = image.shape[:2]
    placed = place(height, width, size)
    if (height, width) == (size, size):
        return image, placed
    if (placed.height, placed.width) != (height, width):
        cv2 = _cv2()
        method = cv2.INTER_LINEAR if size > max(height, width) else cv2.INTER_AREA
        image = cv2.resize(image, (placed.width, placed.height), interpolation=method)
    square = np.full((size, size, 3), PADDING, dtype=np.uint8)
    rows = slice(placed.top, placed.top + placed.height)
    square[rows, placed.left : placed.left + placed.width] = image
    return square, placed


def place_boxes(boxes: Sequence[Box], placed: Placement) -> NDArray[np.float64]:
    """Boxes in the square.

    Args:
        boxes: Class, centre and size over the image's size.
        placed: Where the image lies.

    Returns:
        Shape (boxes, 5): class, centre x, centre y, width, height over the square's side. What reaches
        beyond the image is cut off, as what reaches beyond the square is in YOLOv5.
    """
    rows = np.array(boxes, dtype=np.float64).reshape(-1, 5)
    scale = np.array([placed.width, placed.height]) / placed.size
    offset = np.array([placed.left, placed.top]) / placed.size
    low = np.clip(rows[:, 1:3] - rows[:, 3:5] / 2, 0.0, 1.0)
    high = np.clip(rows[:, 1:3] + rows[:, 3:5] / 2, 0.0, 1.0)
    centre, extent = (low + high) / 2 * scale + offset, (high - low) * scale
    return np.concatenate([rows[:, :1], centre, extent], axis=1)


def _cv2() -> Any:
    try:
        import cv2
    except ImportError:
        raise MissingExtraError("opencv-python", "yolov5", "scaling images") from None
    return cv2
