"""The picture planes everything is drawn on: the image, the sector, the heart's own axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradprobe.trainers.data.phantom import difficulty
from gradprobe.trainers.data.phantom.draws import Draws, Plane


def ramp(plane: Plane, start: float, stop: float) -> Plane:
    """0 up to `start`, 1 from `stop` on, linear between; `stop` may be the smaller."""
    share: Plane = np.clip((plane - start) / (stop - start), 0.0, 1.0)
    return share


def sample(grid: Plane, row: Plane, column: Plane) -> Plane:
    """`grid` read between its points (bilinear) where row and column, each in [0, 1], say."""
    y = np.clip(row, 0.0, 1.0) * (grid.shape[0] - 1)
    x = np.clip(column, 0.0, 1.0) * (grid.shape[1] - 1)
    top = np.minimum(y.astype(np.int32), grid.shape[0] - 2)
    left = np.minimum(x.astype(np.int32), grid.shape[1] - 2)
    down, right = y - top.astype(np.float32), x - left.astype(np.float32)
    flat, corner = grid.reshape(-1), top * grid.shape[1] + left
    upper = flat[corner] * (1.0 - right) + flat[corner + 1] * right
    corner = corner + grid.shape[1]
    lower = flat[corner] * (1.0 - right) + flat[corner + 1] * right
    mixed: Plane = upper * (1.0 - down) + lower * down
    return mixed


@dataclass(frozen=True)
class Sector:
    """The scanned field: planes of shape (size, size), lengths in image heights."""

    column: Plane  # [0, 1) from left to right
    row: Plane  # [0, 1) from top to bottom
    depth: Plane  # distance from the probe over the sector's depth
    line: Plane  # line of sight, 0 the left edge, 1 the right edge
    beam_x: Plane  # unit vector away from the probe
    beam_y: Plane
    inside: NDArray[np.bool_]


def draw_sector(draws: Draws, size: int) -> Sector:
    """A sector that opens downwards from a probe near the top edge."""
    tangent = draws.uniform(*difficulty.SECTOR_TANGENT)
    reach = draws.uniform(*difficulty.SECTOR_DEPTH)
    apex_x, apex_y = 0.5 + draws.around(0.03), draws.uniform(0.0, 0.03)
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    row, column = np.repeat(axis[:, None], size, axis=1), np.repeat(axis[None, :], size, axis=0)
    x, y = column - apex_x, row - apex_y
    distance = np.sqrt(x * x + y * y) + np.float32(1e-3)
    slope = x / np.maximum(y, np.float32(1e-3))
    inside = (y > 0.0) & (np.abs(slope) <= tangent) & (distance <= reach) & (distance >= 0.035)
    return Sector(
        column=column,
        row=row,
        depth=distance / reach,
        line=np.clip(slope / (2.0 * tangent) + 0.5, 0.0, 1.0),
        beam_x=x / distance,
        beam_y=y / distance,
        inside=inside,
    )


@dataclass(frozen=True)
class Heart:
    """The heart's own axes: p to the right and q down, in half heart heights."""

    p: Plane
    q: Plane
    size: float  # half a heart height, in image heights
    cosine: float
    sine: float


def rotation(half_tangent: float) -> tuple[float, float]:
    """Cosine and sine of the angle whose half has this tangent, without calling either function."""
    square = half_tangent * half_tangent
    return (1.0 - square) / (1.0 + square), 2.0 * half_tangent / (1.0 + square)


def draw_heart(draws: Draws, sector: Sector) -> Heart:
    """A heart somewhere near the middle of the sector, turned and stretched a little."""
    size = draws.uniform(*difficulty.HEART_SIZE)
    width = size * draws.uniform(*difficulty.HEART_ASPECT)
    cosine, sine = rotation(draws.uniform(*difficulty.ROTATION))
    x = sector.column - (0.5 + draws.around(difficulty.HEART_SHIFT))
    y = sector.row - (0.53 + draws.around(difficulty.HEART_SHIFT))
    p, q = (x * cosine + y * sine) / width, (y * cosine - x * sine) / size
    return Heart(p, q, size, cosine, sine)


def unit(x: float, y: float) -> tuple[float, float]:
    """The direction of a vector."""
    length = math.sqrt(x * x + y * y)
    return x / length, y / length
