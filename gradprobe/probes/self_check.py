"""Whether a probe measures what it must: a task with its own copy, and with its negative."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradprobe import measures
from gradprobe.probes.checks import Losses
from gradprobe.probes.meter import Meter
from gradprobe.probes.scaling import LossScale

SELF_CHECKED = 2
"""Micro-batches that are looked at."""

TOLERANCE = 1e-6


def cosines_with_itself(
    meter: Meter, scale: LossScale, tasks: Sequence[str], losses: Sequence[Losses]
) -> tuple[float, float]:
    """Cosines over all shared layers of a task with its own copy and with its negative, measured as tasks are.

    Args:
        meter: Has found the shared layers.
        scale: Of the losses.
        tasks: Each is looked at.
        losses: (m,) of a few micro-batches.

    Returns:
        Of all tasks the one that is farthest from +1, and the one farthest from -1. NaN where no task has a gradient.
    """
    assert meter.shared is not None
    shares, found = [1 / len(losses)] * len(losses), []
    for task in tasks:
        three = [scale.all([one[task], one[task] * 1.0, -one[task]]) for one in losses]
        gram, _ = meter.in_micro_batches(meter.shared, three, shares, 3, aside=True)
        cosine = measures.cosine(np.nansum(gram, axis=0))
        if np.isfinite(cosine[0, 1]):
            found.append((float(cosine[0, 1]), float(cosine[0, 2])))
    if not found:
        return float("nan"), float("nan")
    return min(copy for copy, _ in found), max(negative for _, negative in found)


def fault(found: tuple[float, float]) -> str:
    """What is wrong with them; empty where nothing is, or nothing is known."""
    copy, negative = found
    if np.isnan(copy) or (abs(copy - 1) <= TOLERANCE and abs(negative + 1) <= TOLERANCE):
        return ""
    return (
        f"the self-check failed: a task's cosine with its own copy is {copy:.9g} and with its negative {negative:.9g}, "
        "not +1 and -1. A second backward pass through one graph gives another gradient here (recomputed activations "
        "that draw anew, kernels that are not deterministic), so that no cosine of this run can be relied on"
    )
