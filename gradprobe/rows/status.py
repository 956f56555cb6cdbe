"""Why a row holds less than a measurement."""

from __future__ import annotations

from collections.abc import Sequence

MEASURED = "measured"
NONFINITE_GRADIENT = "a task's gradient is not finite"
FIRST_CALL = "only the first of this step's calls was measured: the steps before had a single one"
JOINED_WITHIN = "layers joined between this step's calls: what earlier ones brought there is missing"
OVERFLOWED = "a gradient overflowed under the loss scale: the step is left out"
NONFINITE_LOSS = "a task's loss is not finite"
MISSING_GRADIENT = "a task does not reach a layer that it reached at first"
"""Of files of earlier versions: such a row is measured now, over the layers that it has."""

UNKNOWN_GRADIENT = (NONFINITE_GRADIENT, OVERFLOWED, NONFINITE_LOSS)
"""In rows of such a status NaN may be a gradient that is not finite; in others it says that there is none."""

_ABSENT = "absent at this step: "


def absent(tasks: Sequence[str]) -> str:
    """The status of a row of a step from which some tasks are absent: what they share with others is not measured.

    >>> absent(["cls"])
    'absent at this step: cls'
    """
    return f"{_ABSENT}{', '.join(tasks)}"


def says_absent(status: str) -> bool:
    """Whether a status is one of :func:`absent`."""
    return status.startswith(_ABSENT)
