"""What a phantom shows: the heart, the sector, the grey echo and the colour of the flow.

Drawn with nothing but + - * /, square roots, comparisons and integers, all of which IEEE 754 fixes to the last bit,
from a random stream that numpy guarantees: the same images on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.trainers.data.labels import Box

_Range = tuple[float, float]

# ---- how hard the phantoms are
# Widen a range to make both tasks harder. Changing any of them changes the images: the digests in
# tests/test_data_phantom.py have to be renewed, and runs recorded before cannot be repeated.

# The recording: what makes the view hard to tell.
_ROTATION: _Range = (-0.12, 0.12)
"""Tangent of half the angle the heart is turned by: +-0.12 is +-14 degrees."""
_HEART_SIZE: _Range = (0.34, 0.43)
"""Half the heart's height, in image heights."""
_HEART_SHIFT = 0.055
"""Largest displacement of the heart to either side, up or down, in image heights."""
_HEART_ASPECT: _Range = (0.86, 1.14)
"""Width of the heart over what the anatomy says."""
_CHAMBER_JITTER = 0.07
"""Largest displacement of a chamber, in half heart heights; a tenth of it varies the chamber's size."""
_SECTOR_TANGENT: _Range = (0.72, 1.05)
"""Tangent of half the opening angle of the sector."""
_SECTOR_DEPTH: _Range = (0.88, 0.97)
"""Depth of the sector, in image heights."""
_GAIN: _Range = (0.55, 1.45)
_ATTENUATION: _Range = (0.4, 2.2)
"""Loss of echo with depth: an echo at full depth is divided by 1 + this."""
_COMPRESSION: _Range = (0.5, 1.6)
"""Dynamic range: small is a soft image, large a contrasty one."""
_BLOOD_ECHO: _Range = (0.03, 0.16)
"""Echo of blood, where that of muscle is 0.5: how well a chamber stands out."""
_SHADOW: _Range = (0.0, 0.75)
"""Largest part of the echo that ribs and lung take away along a line of sight."""

# The flow: what makes the jets hard to find and to tell apart.
_JET_LENGTH: _Range = (0.22, 0.36)
"""Length of a jet, in image heights."""
_JET_WIDTH: _Range = (0.15, 0.24)
"""Full width of a jet at its widest, in image heights."""
_JET_SPREAD = 0.22
"""Tangent of half the largest angle between a jet and the axis of its valve: 0.22 is 25 degrees."""
_JET_SHIFT = 0.07
"""Largest displacement of a jet from its valve, in half heart heights."""
_JET_RAGGEDNESS: _Range = (0.15, 0.5)
"""How frayed the edge is, as a part of the width."""
_JET_BRIGHTNESS: _Range = (0.7, 1.0)
_TURBULENCE: _Range = (0.55, 1.0)
"""Spread of velocities in a jet, in units of the velocity at which colour wraps around."""
_SECOND_JET = 0.35
"""Probability that a second valve leaks too."""
_LAMINAR_FLOW = 0.5
"""Probability of one patch of normal flow: coloured, smooth, and not a jet."""

# ---- the heart, as tables: chambers, valves, and where a leak goes
# Positions are in the heart's own axes: p to the right, q down (away from the probe), both about [-1, 1]. The anatomy
# is schematic; what matters is that a view is told by the arrangement of its chambers, and a valve by its place in the
# view and the direction of its jet.


@dataclass(frozen=True)
class _Chamber:
    """An ellipse filled with blood, with a bright wall."""

    p: float
    q: float
    half_width: float
    half_height: float
    turn: float = 0.0  # tangent of half the angle it is turned by
    wall: float = 1.0  # brightness of the wall
    solid: float = 0.0  # 1 is an ellipse of muscle instead of blood


@dataclass(frozen=True)
class _Leaflet:
    """A thin bright line between two points: a valve's leaflet, a septum."""

    p: float
    q: float
    to_p: float
    to_q: float
    width: float = 0.03


@dataclass(frozen=True)
class _Valve:
    """Where a jet starts, and the way it goes."""

    box_class: int
    p: float
    q: float
    direction: tuple[float, float]
    scale: float = 1.0  # size of its jets beside those of other valves


@dataclass(frozen=True)
class _View:
    """Everything seen in one view."""

    chambers: tuple[_Chamber, ...]
    leaflets: tuple[_Leaflet, ...]
    valves: tuple[_Valve, ...]
    inflow: tuple[tuple[float, float], ...]  # where normal flow may be seen


_AR, _MR, _PR, _TR = range(4)

_PSAX = _View(
    chambers=(
        _Chamber(0.02, -0.38, 0.86, 0.40),  # right ventricle, wrapped around the aorta
        _Chamber(0.70, 0.18, 0.19, 0.46, turn=-0.12),  # pulmonary artery
        _Chamber(-0.66, 0.42, 0.33, 0.34),  # right atrium
        _Chamber(0.06, 0.72, 0.55, 0.26),  # left atrium
        _Chamber(0.02, 0.04, 0.40, 0.38, wall=0.3, solid=1.0),  # wall of the aortic root
        _Chamber(0.02, 0.04, 0.31, 0.29, wall=1.7),  # aorta
    ),
    leaflets=(
        _Leaflet(0.02, 0.04, 0.02, 0.32),
        _Leaflet(0.02, 0.04, -0.23, -0.10),
        _Leaflet(0.02, 0.04, 0.27, -0.10),
        _Leaflet(-0.40, -0.02, -0.62, 0.10),
        _Leaflet(0.50, -0.22, 0.80, -0.24),
    ),
    valves=(
        _Valve(_AR, 0.00, -0.22, (0.1, 1.0), scale=0.85),
        _Valve(_PR, 0.72, -0.12, (-1.0, -0.42)),
        _Valve(_TR, -0.46, 0.00, (-0.38, 1.0)),
    ),
    inflow=((0.68, 0.45), (-0.2, -0.45), (0.1, 0.7)),
)

_PLAX = _View(
    chambers=(
        _Chamber(-0.08, -0.66, 0.66, 0.19, turn=0.03),  # right ventricle
        _Chamber(-0.46, 0.06, 0.60, 0.36, turn=-0.08),  # left ventricle
        _Chamber(0.58, -0.16, 0.46, 0.20, turn=-0.06, wall=1.5),  # aortic root
        _Chamber(0.54, 0.46, 0.45, 0.33),  # left atrium
        _Chamber(0.08, 0.88, 0.11, 0.10, wall=1.5),  # descending aorta
    ),
    leaflets=(
        _Leaflet(0.16, 0.10, -0.16, 0.20),
        _Leaflet(0.16, 0.44, -0.10, 0.30),
        _Leaflet(0.16, -0.16, 0.40, -0.14),
        _Leaflet(-0.95, -0.36, 0.10, -0.34, width=0.05),
    ),
    valves=(
        _Valve(_AR, 0.20, -0.14, (-1.0, 0.22)),
        _Valve(_MR, 0.12, 0.30, (1.0, 0.30)),
    ),
    inflow=((0.62, -0.16), (-0.45, 0.12), (-0.1, -0.66)),
)

_A4C = _View(
    chambers=(
        _Chamber(0.38, -0.28, 0.32, 0.56, turn=0.04),  # left ventricle
        _Chamber(-0.38, -0.18, 0.27, 0.46, turn=-0.08),  # right ventricle
        _Chamber(0.40, 0.62, 0.34, 0.28),  # left atrium
        _Chamber(-0.38, 0.62, 0.34, 0.28),  # right atrium
    ),
    leaflets=(
        _Leaflet(0.08, 0.30, 0.32, 0.20),
        _Leaflet(0.70, 0.30, 0.46, 0.20),
        _Leaflet(-0.06, 0.27, -0.30, 0.20),
        _Leaflet(-0.68, 0.27, -0.46, 0.20),
        _Leaflet(0.01, -0.75, 0.01, 0.85, width=0.06),
    ),
    valves=(
        _Valve(_MR, 0.39, 0.26, (0.05, 1.0)),
        _Valve(_TR, -0.38, 0.24, (0.05, 1.0)),
    ),
    inflow=((0.38, -0.15), (-0.38, -0.1), (0.36, -0.5)),
)

VIEWS = (_PSAX, _PLAX, _A4C)
"""In the order of IMAGE_NAMES."""


Plane = NDArray[np.floating[Any]]
"""A picture plane, float32 (numpy's stubs cannot tell); elementwise work on it is exactly reproducible."""


class Draws:
    """A stream of random numbers named by a key of non-negative integers."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def _raw(self) -> int:
        return int(self._bits.random_raw())

    def integer(self, stop: int) -> int:
        """An integer in [0, stop); its bias is below stop / 2^64."""
        return self._raw() % stop

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high), from 53 random bits."""
        return low + (high - low) * ((self._raw() >> 11) / 9007199254740992.0)  # 2^53

    def around(self, spread: float) -> float:
        """A number in [-spread, spread)."""
        return self.uniform(-spread, spread)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform(0.0, 1.0) < probability

    def plane(self, rows: int, columns: int) -> Plane:
        """White noise, shape (rows, columns), each value a multiple of 2^-16 in [0, 1)."""
        count = rows * columns
        words = np.asarray(self._bits.random_raw((count + 3) // 4), dtype=np.uint64)
        # Shifts, not a view: the order must not depend on the machine's byte order.
        shifts = np.array([0, 16, 32, 48], dtype=np.uint64)
        parts = (words[:, None] >> shifts) & np.uint64(0xFFFF)
        flat = parts.reshape(-1)[:count].astype(np.float32) / np.float32(65536.0)
        return flat.reshape(rows, columns)


def _ramp(plane: Plane, start: float, stop: float) -> Plane:
    """0 up to `start`, 1 from `stop` on, linear between; `stop` may be the smaller."""
    share: Plane = np.clip((plane - start) / (stop - start), 0.0, 1.0)
    return share


def _sample(grid: Plane, row: Plane, column: Plane) -> Plane:
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
    tangent = draws.uniform(*_SECTOR_TANGENT)
    reach = draws.uniform(*_SECTOR_DEPTH)
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
class _Heart:
    """The heart's own axes: p to the right and q down, in half heart heights."""

    p: Plane
    q: Plane
    size: float  # half a heart height, in image heights
    cosine: float
    sine: float


def _rotation(half_tangent: float) -> tuple[float, float]:
    """Cosine and sine of the angle whose half has this tangent, without calling either function."""
    square = half_tangent * half_tangent
    return (1.0 - square) / (1.0 + square), 2.0 * half_tangent / (1.0 + square)


def draw_heart(draws: Draws, sector: Sector) -> _Heart:
    """A heart somewhere near the middle of the sector, turned and stretched a little."""
    size = draws.uniform(*_HEART_SIZE)
    width = size * draws.uniform(*_HEART_ASPECT)
    cosine, sine = _rotation(draws.uniform(*_ROTATION))
    x = sector.column - (0.5 + draws.around(_HEART_SHIFT))
    y = sector.row - (0.53 + draws.around(_HEART_SHIFT))
    p, q = (x * cosine + y * sine) / width, (y * cosine - x * sine) / size
    return _Heart(p, q, size, cosine, sine)


def _unit(x: float, y: float) -> tuple[float, float]:
    """The direction of a vector."""
    length = math.sqrt(x * x + y * y)
    return x / length, y / length


_MUSCLE_ECHO = 0.5
_SURROUNDING_ECHO = 0.26
_WALL_THICKNESS = 0.045  # in half heart heights
_SPECKLE_GRID = (112, 72)  # grains along depth and across lines of sight


def _bump(plane: Plane) -> Plane:
    """A bell without an exponential: 1 at 0, 1/4 at 1, falling as the fourth power."""
    square = 1.0 + plane * plane
    return 1.0 / (square * square)


def draw_tissue(draws: Draws, view: _View, heart: _Heart, sector: Sector) -> Plane:
    """Echo of what is there, before the machine looks at it; about [0, 2]."""
    outline = np.sqrt((heart.p / 1.12) * (heart.p / 1.12) + (heart.q / 1.06) * (heart.q / 1.06)) - 1.0
    tissue = _SURROUNDING_ECHO + (_MUSCLE_ECHO - _SURROUNDING_ECHO) * _ramp(outline, 0.06, -0.02)
    tissue = tissue + 0.7 * _bump(outline / 0.05)  # pericardium
    # Walls shine where the beam meets them squarely and fade where it runs along them.
    beam_p = sector.beam_x * heart.cosine + sector.beam_y * heart.sine
    beam_q = sector.beam_y * heart.cosine - sector.beam_x * heart.sine
    blood = draws.uniform(*_BLOOD_ECHO)
    for chamber in view.chambers:
        tissue = _add_chamber(tissue, _jittered(draws, chamber), heart, blood, beam_p, beam_q)
    for leaflet in view.leaflets:
        tissue = tissue + _draw_leaflet(leaflet, heart) * draws.uniform(0.4, 1.1)
    return tissue


def _jittered(draws: Draws, chamber: _Chamber) -> _Chamber:
    """The same chamber in another patient."""
    shift, stretch = _CHAMBER_JITTER, 0.1 + _CHAMBER_JITTER
    return _Chamber(
        p=chamber.p + draws.around(shift),
        q=chamber.q + draws.around(shift),
        half_width=chamber.half_width * (1.0 + draws.around(stretch)),
        half_height=chamber.half_height * (1.0 + draws.around(stretch)),
        turn=chamber.turn + draws.around(shift),
        wall=chamber.wall * draws.uniform(0.5, 1.2),
        solid=chamber.solid,
    )


def _add_chamber(tissue: Plane, chamber: _Chamber, heart: _Heart, blood: float, beam_p: Plane, beam_q: Plane) -> Plane:
    cosine, sine = _rotation(chamber.turn)
    p, q = heart.p - chamber.p, heart.q - chamber.q
    u = (p * cosine + q * sine) / chamber.half_width
    v = (q * cosine - p * sine) / chamber.half_height
    radius = np.sqrt(u * u + v * v)
    outside = (radius - 1.0) * min(chamber.half_width, chamber.half_height)  # about the distance to the wall
    filling = blood * (1.0 - chamber.solid) + _MUSCLE_ECHO * chamber.solid
    inside = _ramp(outside, 0.02, -0.03)
    tissue = tissue * (1.0 - inside) + filling * inside
    normal_u, normal_v = u / chamber.half_width, v / chamber.half_height
    length = np.sqrt(normal_u * normal_u + normal_v * normal_v) + np.float32(1e-3)
    squarely = np.abs((normal_u * cosine - normal_v * sine) * beam_p + (normal_v * cosine + normal_u * sine) * beam_q)
    facing = 0.25 + 0.75 * (squarely / length)
    wall = _bump((outside - 0.4 * _WALL_THICKNESS) / _WALL_THICKNESS)
    return tissue + (chamber.wall * 0.8) * facing * wall


def _draw_leaflet(leaflet: _Leaflet, heart: _Heart) -> Plane:
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
    speckle = _sample(_speckle(draws), sector.depth, sector.line)
    shading = 0.75 + 0.5 * _sample(draws.plane(7, 7), sector.row, sector.column)
    shadow = draws.uniform(*_SHADOW)
    blocked = _ramp(_sample(draws.plane(2, 9), sector.depth, sector.line), 0.55, 1.0)
    attenuation = 1.0 + draws.uniform(*_ATTENUATION) * sector.depth
    echo = tissue * (0.25 + speckle) * shading * (1.0 - shadow * blocked) / attenuation
    echo = echo + (0.9 * _bump(sector.depth / 0.06) + 0.02) * speckle  # the near field is always bright
    echo = echo * (1.6 * draws.uniform(*_GAIN))
    knee = draws.uniform(*_COMPRESSION)
    return np.where(sector.inside, echo * (0.35 + knee) / (echo + knee), np.float32(0.0))


def _speckle(draws: Draws) -> Plane:
    """Amplitude of many random echoes summed: noise on the sector's own grid, mean about 1."""
    real, imaginary = draws.plane(*_SPECKLE_GRID) - 0.5, draws.plane(*_SPECKLE_GRID) - 0.5
    for _ in range(2):  # neighbours along a line of sight belong to one pulse
        real[1:] = real[1:] + real[:-1].copy()
        imaginary[1:] = imaginary[1:] + imaginary[:-1].copy()
    amplitude: Plane = np.sqrt(real * real + imaginary * imaginary) * np.float32(1.1)
    return amplitude


@dataclass(frozen=True)
class Flow:
    """One coloured patch."""

    mask: NDArray[np.bool_]
    velocity: Plane  # in units of the velocity at which colour wraps; positive towards the probe
    brightness: Plane


def choose_valves(draws: Draws, view: _View) -> tuple[_Valve, ...]:
    """The valves that leak in this patient: one, or two different ones."""
    first = draws.integer(len(view.valves))
    other = (first + 1 + draws.integer(len(view.valves) - 1)) % len(view.valves)
    both = draws.chance(_SECOND_JET)
    return tuple(view.valves[i] for i in ([first, other] if both else [first]))


def draw_jet(draws: Draws, valve: _Valve, heart: _Heart, sector: Sector) -> Flow:
    """A jet that leaves the valve narrow, widens, and frays: fast, turbulent, hence a mosaic."""
    cosine, sine = _rotation(draws.around(_JET_SPREAD))
    axis_p, axis_q = _unit(*valve.direction)
    axis_p, axis_q = axis_p * cosine - axis_q * sine, axis_q * cosine + axis_p * sine
    length = draws.uniform(*_JET_LENGTH) * valve.scale / heart.size
    width = draws.uniform(*_JET_WIDTH) * valve.scale / heart.size
    p = heart.p - (valve.p + draws.around(_JET_SHIFT))
    q = heart.q - (valve.q + draws.around(_JET_SHIFT))
    along, across = (p * axis_p + q * axis_q) / length, p * axis_q - q * axis_p

    fray = _sample(draws.plane(26, 26), sector.row, sector.column) - 0.5
    along = along + draws.uniform(*_JET_RAGGEDNESS) * fray * 0.4
    body = np.clip(along, 0.0, 1.0)
    # Widest at two thirds of the length, where the factor 27/4 t^2 (1 - t) is 1.
    half_width = width * (0.12 * (1.0 - body) + 0.44 * (body * body * (1.0 - body)) * 6.75)
    edge = np.abs(across) + fray * (draws.uniform(*_JET_RAGGEDNESS) * width * 0.5)
    mask = (along > 0.0) & (along < 1.0) & (edge < half_width) & sector.inside

    # Against the beam is towards the probe; the axis is turned from the heart's axes to the image's.
    image_x = axis_p * heart.cosine - axis_q * heart.sine
    image_y = axis_q * heart.cosine + axis_p * heart.sine
    towards = -(sector.beam_x * image_x + sector.beam_y * image_y)
    turbulence = draws.uniform(*_TURBULENCE)
    swirl = _sample(draws.plane(44, 44), sector.row, sector.column) - 0.5
    grain = _sample(draws.plane(96, 96), sector.row, sector.column) - 0.5
    velocity = towards * (0.55 + 0.35 * _ramp(along, 1.0, 0.0)) + (2.2 * turbulence) * (swirl + 0.5 * grain)
    brightness = draws.uniform(*_JET_BRIGHTNESS) * (0.85 + 0.3 * (grain + 0.5))
    return Flow(mask, velocity, brightness)


def draw_laminar(draws: Draws, view: _View, heart: _Heart, sector: Sector) -> Flow | None:
    """Normal flow, slow and smooth, one hue throughout, dim; None in a patient who shows none."""
    if not draws.chance(_LAMINAR_FLOW):
        return None
    centre = view.inflow[draws.integer(len(view.inflow))]
    half = draws.uniform(0.10, 0.24), draws.uniform(0.10, 0.24)
    u = (heart.p - centre[0] - draws.around(0.08)) / half[0]
    v = (heart.q - centre[1] - draws.around(0.08)) / half[1]
    fray = _sample(draws.plane(20, 20), sector.row, sector.column) - 0.5
    radius = u * u + v * v + fray * 1.2
    sign = 1.0 if draws.chance(0.5) else -1.0
    velocity = (sign * draws.uniform(0.3, 0.6)) * _ramp(radius, 1.4, 0.2)
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
