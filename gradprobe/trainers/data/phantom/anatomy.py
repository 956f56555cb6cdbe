"""Three standard views of the heart, as tables: chambers, valves, and where a leak goes.

Positions are in the heart's own axes: p to the right, q down (away from the probe), both about
[-1, 1]. The anatomy is schematic; what matters is that a view is told by the arrangement of its
chambers, and a valve by its place in the view and the direction of its jet.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_NAMES = ("PSAX", "PLAX", "A4C")
"""Views: parasternal short axis (at the aortic valve), parasternal long axis, apical four-chamber."""

BOX_NAMES = ("AR", "MR", "PR", "TR")
"""Regurgitation of the aortic, mitral, pulmonary and tricuspid valve."""


@dataclass(frozen=True)
class Chamber:
    """An ellipse filled with blood, with a bright wall."""

    p: float
    q: float
    half_width: float
    half_height: float
    turn: float = 0.0  # tangent of half the angle it is turned by
    wall: float = 1.0  # brightness of the wall
    solid: float = 0.0  # 1 is an ellipse of muscle instead of blood


@dataclass(frozen=True)
class Leaflet:
    """A thin bright line between two points: a valve's leaflet, a septum."""

    p: float
    q: float
    to_p: float
    to_q: float
    width: float = 0.03


@dataclass(frozen=True)
class Valve:
    """Where a jet starts, and the way it goes."""

    box_class: int
    p: float
    q: float
    direction: tuple[float, float]
    scale: float = 1.0  # size of its jets beside those of other valves


@dataclass(frozen=True)
class View:
    """Everything seen in one view."""

    chambers: tuple[Chamber, ...]
    leaflets: tuple[Leaflet, ...]
    valves: tuple[Valve, ...]
    inflow: tuple[tuple[float, float], ...]  # where normal flow may be seen


AR, MR, PR, TR = range(4)

PSAX = View(
    chambers=(
        Chamber(0.02, -0.38, 0.86, 0.40),  # right ventricle, wrapped around the aorta
        Chamber(0.70, 0.18, 0.19, 0.46, turn=-0.12),  # pulmonary artery
        Chamber(-0.66, 0.42, 0.33, 0.34),  # right atrium
        Chamber(0.06, 0.72, 0.55, 0.26),  # left atrium
        Chamber(0.02, 0.04, 0.40, 0.38, wall=0.3, solid=1.0),  # wall of the aortic root
        Chamber(0.02, 0.04, 0.31, 0.29, wall=1.7),  # aorta
    ),
    leaflets=(
        Leaflet(0.02, 0.04, 0.02, 0.32),
        Leaflet(0.02, 0.04, -0.23, -0.10),
        Leaflet(0.02, 0.04, 0.27, -0.10),
        Leaflet(-0.40, -0.02, -0.62, 0.10),
        Leaflet(0.50, -0.22, 0.80, -0.24),
    ),
    valves=(
        Valve(AR, 0.00, -0.22, (0.1, 1.0), scale=0.85),
        Valve(PR, 0.72, -0.12, (-1.0, -0.42)),
        Valve(TR, -0.46, 0.00, (-0.38, 1.0)),
    ),
    inflow=((0.68, 0.45), (-0.2, -0.45), (0.1, 0.7)),
)

PLAX = View(
    chambers=(
        Chamber(-0.08, -0.66, 0.66, 0.19, turn=0.03),  # right ventricle
        Chamber(-0.46, 0.06, 0.60, 0.36, turn=-0.08),  # left ventricle
        Chamber(0.58, -0.16, 0.46, 0.20, turn=-0.06, wall=1.5),  # aortic root
        Chamber(0.54, 0.46, 0.45, 0.33),  # left atrium
        Chamber(0.08, 0.88, 0.11, 0.10, wall=1.5),  # descending aorta
    ),
    leaflets=(
        Leaflet(0.16, 0.10, -0.16, 0.20),
        Leaflet(0.16, 0.44, -0.10, 0.30),
        Leaflet(0.16, -0.16, 0.40, -0.14),
        Leaflet(-0.95, -0.36, 0.10, -0.34, width=0.05),
    ),
    valves=(
        Valve(AR, 0.20, -0.14, (-1.0, 0.22)),
        Valve(MR, 0.12, 0.30, (1.0, 0.30)),
    ),
    inflow=((0.62, -0.16), (-0.45, 0.12), (-0.1, -0.66)),
)

A4C = View(
    chambers=(
        Chamber(0.38, -0.28, 0.32, 0.56, turn=0.04),  # left ventricle
        Chamber(-0.38, -0.18, 0.27, 0.46, turn=-0.08),  # right ventricle
        Chamber(0.40, 0.62, 0.34, 0.28),  # left atrium
        Chamber(-0.38, 0.62, 0.34, 0.28),  # right atrium
    ),
    leaflets=(
        Leaflet(0.08, 0.30, 0.32, 0.20),
        Leaflet(0.70, 0.30, 0.46, 0.20),
        Leaflet(-0.06, 0.27, -0.30, 0.20),
        Leaflet(-0.68, 0.27, -0.46, 0.20),
        Leaflet(0.01, -0.75, 0.01, 0.85, width=0.06),
    ),
    valves=(
        Valve(MR, 0.39, 0.26, (0.05, 1.0)),
        Valve(TR, -0.38, 0.24, (0.05, 1.0)),
    ),
    inflow=((0.38, -0.15), (-0.38, -0.1), (0.36, -0.5)),
)

VIEWS = (PSAX, PLAX, A4C)
"""In the order of IMAGE_NAMES."""
