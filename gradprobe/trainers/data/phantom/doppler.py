"""The colour: turbulent jets through leaking valves, and now and then normal flow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradprobe.trainers.data.phantom import difficulty
from gradprobe.trainers.data.phantom.anatomy import Valve, View
from gradprobe.trainers.data.phantom.draws import Draws, Plane
from gradprobe.trainers.data.phantom.geometry import Heart, Sector, ramp, rotation, sample, unit

Box = tuple[int, float, float, float, float]
"""Class, then centre x, centre y, width, height over the image's size, each in [0, 1]."""


@dataclass(frozen=True)
class Flow:
    """One coloured patch."""

    mask: NDArray[np.bool_]
    velocity: Plane  # in units of the velocity at which colour wraps; positive towards the probe
    brightness: Plane


def choose_valves(draws: Draws, view: View) -> tuple[Valve, ...]:
    """The valves that leak in this patient: one, or two different ones."""
    first = draws.integer(len(view.valves))
    other = (first + 1 + draws.integer(len(view.valves) - 1)) % len(view.valves)
    both = draws.chance(difficulty.SECOND_JET)
    return tuple(view.valves[i] for i in ([first, other] if both else [first]))


def draw_jet(draws: Draws, valve: Valve, heart: Heart, sector: Sector) -> Flow:
    """A jet that leaves the valve narrow, widens, and frays: fast, turbulent, hence a mosaic."""
    cosine, sine = rotation(draws.around(difficulty.JET_SPREAD))
    axis_p, axis_q = unit(*valve.direction)
    axis_p, axis_q = axis_p * cosine - axis_q * sine, axis_q * cosine + axis_p * sine
    length = draws.uniform(*difficulty.JET_LENGTH) * valve.scale / heart.size
    width = draws.uniform(*difficulty.JET_WIDTH) * valve.scale / heart.size
    p = heart.p - (valve.p + draws.around(difficulty.JET_SHIFT))
    q = heart.q - (valve.q + draws.around(difficulty.JET_SHIFT))
    along, across = (p * axis_p + q * axis_q) / length, p * axis_q - q * axis_p

    fray = sample(draws.plane(26, 26), sector.row, sector.column) - 0.5
    along = along + draws.uniform(*difficulty.JET_RAGGEDNESS) * fray * 0.4
    body = np.clip(along, 0.0, 1.0)
    # Widest at two thirds of the length, where the factor 27/4 t^2 (1 - t) is 1.
    half_width = width * (0.12 * (1.0 - body) + 0.44 * (body * body * (1.0 - body)) * 6.75)
    edge = np.abs(across) + fray * (draws.uniform(*difficulty.JET_RAGGEDNESS) * width * 0.5)
    mask = (along > 0.0) & (along < 1.0) & (edge < half_width) & sector.inside

    # Against the beam is towards the probe; the axis is turned from the heart's axes to the image's.
    image_x = axis_p * heart.cosine - axis_q * heart.sine
    image_y = axis_q * heart.cosine + axis_p * heart.sine
    towards = -(sector.beam_x * image_x + sector.beam_y * image_y)
    turbulence = draws.uniform(*difficulty.TURBULENCE)
    swirl = sample(draws.plane(44, 44), sector.row, sector.column) - 0.5
    grain = sample(draws.plane(96, 96), sector.row, sector.column) - 0.5
    velocity = towards * (0.55 + 0.35 * ramp(along, 1.0, 0.0)) + (2.2 * turbulence) * (swirl + 0.5 * grain)
    brightness = draws.uniform(*difficulty.JET_BRIGHTNESS) * (0.85 + 0.3 * (grain + 0.5))
    return Flow(mask, velocity, brightness)


def draw_laminar(draws: Draws, view: View, heart: Heart, sector: Sector) -> Flow:
    """Normal flow: slow and smooth, one hue throughout, dim."""
    centre = view.inflow[draws.integer(len(view.inflow))]
    half = draws.uniform(0.10, 0.24), draws.uniform(0.10, 0.24)
    u = (heart.p - centre[0] - draws.around(0.08)) / half[0]
    v = (heart.q - centre[1] - draws.around(0.08)) / half[1]
    fray = sample(draws.plane(20, 20), sector.row, sector.column) - 0.5
    radius = u * u + v * v + fray * 1.2
    sign = 1.0 if draws.chance(0.5) else -1.0
    velocity = (sign * draws.uniform(0.3, 0.6)) * ramp(radius, 1.4, 0.2)
    return Flow((radius < 1.0) & sector.inside, velocity, np.full_like(radius, draws.uniform(0.5, 0.9)))


def paint(image: Plane, flow: Flow) -> Plane:
    """The image with the flow's colours over it: shape (size, size, 3), red towards, blue away."""
    wrapped = flow.velocity - 2.0 * np.floor((flow.velocity + 1.0) / 2.0)  # aliasing
    speed, towards = np.abs(wrapped), wrapped > 0.0
    main = 0.4 + 0.6 * np.minimum(speed * 1.6, 1.0)
    green = speed * speed * 0.95
    red = np.where(towards, main, 0.12 * speed)
    blue = np.where(towards, 0.08 * speed, main)
    colour = np.stack([red, green, blue], axis=-1) * flow.brightness[..., None]
    return np.where(flow.mask[..., None], colour, image)


def bounding_box(box_class: int, mask: NDArray[np.bool_]) -> Box | None:
    """The tightest box around a mask, or None around an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    height, width = mask.shape
    top, bottom = int(rows[0]) / height, (int(rows[-1]) + 1) / height
    left, right = int(columns[0]) / width, (int(columns[-1]) + 1) / width
    return box_class, (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
