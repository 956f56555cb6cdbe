"""How hard the phantoms are: every range that training success depends on, in one place.

Widen a range to make both tasks harder. Changing any of them changes the images: the digests in
`tests/test_data_phantom.py` have to be renewed, and runs recorded before cannot be repeated.
"""

from __future__ import annotations

Range = tuple[float, float]

# The recording: what makes the view hard to tell.
ROTATION: Range = (-0.12, 0.12)
"""Tangent of half the angle the heart is turned by: +-0.12 is +-14 degrees."""
HEART_SIZE: Range = (0.34, 0.43)
"""Half the heart's height, in image heights."""
HEART_SHIFT = 0.055
"""Largest displacement of the heart to either side, up or down, in image heights."""
HEART_ASPECT: Range = (0.86, 1.14)
"""Width of the heart over what the anatomy says."""
CHAMBER_JITTER = 0.07
"""Largest displacement of a chamber, in half heart heights; a tenth of it varies the chamber's size."""
SECTOR_TANGENT: Range = (0.72, 1.05)
"""Tangent of half the opening angle of the sector."""
SECTOR_DEPTH: Range = (0.88, 0.97)
"""Depth of the sector, in image heights."""
GAIN: Range = (0.55, 1.45)
ATTENUATION: Range = (0.4, 2.2)
"""Loss of echo with depth: an echo at full depth is divided by 1 + this."""
COMPRESSION: Range = (0.5, 1.6)
"""Dynamic range: small is a soft image, large a contrasty one."""
BLOOD_ECHO: Range = (0.03, 0.16)
"""Echo of blood, where that of muscle is 0.5: how well a chamber stands out."""
SHADOW: Range = (0.0, 0.75)
"""Largest part of the echo that ribs and lung take away along a line of sight."""

# The flow: what makes the jets hard to find and to tell apart.
JET_LENGTH: Range = (0.22, 0.36)
"""Length of a jet, in image heights."""
JET_WIDTH: Range = (0.15, 0.24)
"""Full width of a jet at its widest, in image heights."""
JET_SPREAD = 0.22
"""Tangent of half the largest angle between a jet and the axis of its valve: 0.22 is 25 degrees."""
JET_SHIFT = 0.07
"""Largest displacement of a jet from its valve, in half heart heights."""
JET_RAGGEDNESS: Range = (0.15, 0.5)
"""How frayed the edge is, as a part of the width."""
JET_BRIGHTNESS: Range = (0.7, 1.0)
TURBULENCE: Range = (0.55, 1.0)
"""Spread of velocities in a jet, in units of the velocity at which colour wraps around."""
SECOND_JET = 0.35
"""Probability that a second valve leaks too."""
LAMINAR_FLOW = 0.5
"""Probability of one patch of normal flow: coloured, smooth, and not a jet."""
