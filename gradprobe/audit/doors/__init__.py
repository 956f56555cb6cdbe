"""The doors, the most specific first: where two of them explain a finding alone, the earlier one is its name.

A later closing often does an earlier one's work by the way: a batch that is replayed is right even where a random
stream moved, and so on down the list.
"""

from gradprobe.audit.closing import Door
from gradprobe.audit.doors.batchnorm import BATCH_STATISTICS, BUFFERS
from gradprobe.audit.doors.gradients import CLIPPING, WEIGHTS, ZERO_GRADIENT
from gradprobe.audit.doors.nonfinite import NONFINITE, SCALER
from gradprobe.audit.doors.replays import DATA, DECISION, SCHEDULE, TIMING
from gradprobe.audit.doors.scale_free import DIRECT, PRECONDITIONER
from gradprobe.audit.doors.streams import RANDOM

DOORS: tuple[Door, ...] = (
    RANDOM,
    ZERO_GRADIENT,
    SCALER,
    NONFINITE,
    BUFFERS,
    BATCH_STATISTICS,
    CLIPPING,
    WEIGHTS,
    SCHEDULE,
    DECISION,
    TIMING,
    DATA,
)
"""Tried by :func:`gradprobe.audit.attribution.attribute`."""

__all__ = ["DIRECT", "DOORS", "PRECONDITIONER", "WEIGHTS"]
