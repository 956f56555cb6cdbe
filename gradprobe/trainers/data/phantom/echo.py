"""The grey image: muscle, blood and walls under speckle, attenuation and shadows."""

from __future__ import annotations

import math

import numpy as np

from gradprobe.trainers.data.phantom import difficulty
from gradprobe.trainers.data.phantom.anatomy import Chamber, Leaflet, View
from gradprobe.trainers.data.phantom.draws import Draws, Plane
from gradprobe.trainers.data.phantom.geometry import Heart, Sector, ramp, rotation, sample

_MUSCLE_ECHO = 0.5
_SURROUNDING_ECHO = 0.26
_WALL_THICKNESS = 0.045  # in half heart heights
_SPECKLE_GRID = (112, 72)  # grains along depth and across lines of sight


def _bump(plane: Plane) -> Plane:
    """A bell without an exponential: 1 at 0, 1/4 at 1, falling as the fourth power."""
    square = 1.0 + plane * plane
    return 1.0 / (square * square)


def draw_tissue(draws: Draws, view: View, heart: Heart, sector: Sector) -> Plane:
    """Echo of what is there, before the machine looks at it; about [0, 2]."""
    outline = np.sqrt((heart.p / 1.12) * (heart.p / 1.12) + (heart.q / 1.06) * (heart.q / 1.06)) - 1.0
    tissue = _SURROUNDING_ECHO + (_MUSCLE_ECHO - _SURROUNDING_ECHO) * ramp(outline, 0.06, -0.02)
    tissue = tissue + 0.7 * _bump(outline / 0.05)  # pericardium
    # Walls shine where the beam meets them squarely and fade where it runs along them.
    beam_p = sector.beam_x * heart.cosine + sector.beam_y * heart.sine
    beam_q = sector.beam_y * heart.cosine - sector.beam_x * heart.sine
    blood = draws.uniform(*difficulty.BLOOD_ECHO)
    for chamber in view.chambers:
        tissue = _add_chamber(tissue, _jittered(draws, chamber), heart, blood, beam_p, beam_q)
    for leaflet in view.leaflets:
        tissue = tissue + _leaflet(leaflet, heart) * draws.uniform(0.4, 1.1)
    return tissue


def _jittered(draws: Draws, chamber: Chamber) -> Chamber:
    """The same chamber in another patient."""
    shift, stretch = difficulty.CHAMBER_JITTER, 0.1 + difficulty.CHAMBER_JITTER
    return Chamber(
        p=chamber.p + draws.around(shift),
        q=chamber.q + draws.around(shift),
        half_width=chamber.half_width * (1.0 + draws.around(stretch)),
        half_height=chamber.half_height * (1.0 + draws.around(stretch)),
        turn=chamber.turn + draws.around(shift),
        wall=chamber.wall * draws.uniform(0.5, 1.2),
        solid=chamber.solid,
    )


def _add_chamber(tissue: Plane, chamber: Chamber, heart: Heart, blood: float, beam_p: Plane, beam_q: Plane) -> Plane:
    cosine, sine = rotation(chamber.turn)
    p, q = heart.p - chamber.p, heart.q - chamber.q
    u = (p * cosine + q * sine) / chamber.half_width
    v = (q * cosine - p * sine) / chamber.half_height
    radius = np.sqrt(u * u + v * v)
    outside = (radius - 1.0) * min(chamber.half_width, chamber.half_height)  # about the distance to the wall
    filling = blood * (1.0 - chamber.solid) + _MUSCLE_ECHO * chamber.solid
    inside = ramp(outside, 0.02, -0.03)
    tissue = tissue * (1.0 - inside) + filling * inside
    normal_u, normal_v = u / chamber.half_width, v / chamber.half_height
    length = np.sqrt(normal_u * normal_u + normal_v * normal_v) + np.float32(1e-3)
    squarely = np.abs((normal_u * cosine - normal_v * sine) * beam_p + (normal_v * cosine + normal_u * sine) * beam_q)
    facing = 0.25 + 0.75 * (squarely / length)
    wall = _bump((outside - 0.4 * _WALL_THICKNESS) / _WALL_THICKNESS)
    return tissue + (chamber.wall * 0.8) * facing * wall


def _leaflet(leaflet: Leaflet, heart: Heart) -> Plane:
    along_p, along_q = leaflet.to_p - leaflet.p, leaflet.to_q - leaflet.q
    length = math.sqrt(along_p * along_p + along_q * along_q)
    along_p, along_q = along_p / length, along_q / length
    p, q = heart.p - leaflet.p, heart.q - leaflet.q
    along = p * along_p + q * along_q
    beyond = along - np.clip(along, 0.0, length)
    across = p * along_q - q * along_p
    return _bump(np.sqrt(beyond * beyond + across * across) / leaflet.width)


def draw_echo(draws: Draws, tissue: Plane, sector: Sector) -> Plane:
    """What the machine shows of the tissue: grey levels in [0, 1), 0 outside the sector."""
    speckle = sample(_speckle(draws), sector.depth, sector.line)
    shading = 0.75 + 0.5 * sample(draws.plane(7, 7), sector.row, sector.column)
    shadow = draws.uniform(*difficulty.SHADOW)
    blocked = ramp(sample(draws.plane(2, 9), sector.depth, sector.line), 0.55, 1.0)
    attenuation = 1.0 + draws.uniform(*difficulty.ATTENUATION) * sector.depth
    echo = tissue * (0.25 + speckle) * shading * (1.0 - shadow * blocked) / attenuation
    echo = echo + (0.9 * _bump(sector.depth / 0.06) + 0.02) * speckle  # the near field is always bright
    echo = echo * (1.6 * draws.uniform(*difficulty.GAIN))
    knee = draws.uniform(*difficulty.COMPRESSION)
    return np.where(sector.inside, echo * (0.35 + knee) / (echo + knee), np.float32(0.0))


def _speckle(draws: Draws) -> Plane:
    """Amplitude of many random echoes summed: noise on the sector's own grid, mean about 1."""
    real, imaginary = draws.plane(*_SPECKLE_GRID) - 0.5, draws.plane(*_SPECKLE_GRID) - 0.5
    for _ in range(2):  # neighbours along a line of sight belong to one pulse
        real[1:] = real[1:] + real[:-1].copy()
        imaginary[1:] = imaginary[1:] + imaginary[:-1].copy()
    amplitude: Plane = np.sqrt(real * real + imaginary * imaginary) * np.float32(1.1)
    return amplitude
