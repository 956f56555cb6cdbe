"""What ``--data dial:angle=120,ratio=10,noise=1`` says. Imports nothing heavy: settings are checked with it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from difflib import get_close_matches

from gradprobe.errors import UsageError

__all__ = ["parse_dial"]


@dataclass(frozen=True)
class DialSpec:
    """Where the dials stand.

    Attributes:
        angle: Between the two tasks' gradients on the shared layers, in degrees from 0 to 180.
        ratio: Length of task a's gradient over that of task b's; above 0.
        noise: Length of one sample's noise over that of the gradient (root mean square), so that the noise scale is
            its square, in samples; 0: every batch gives the gradient itself.
        correlation: Of the two tasks' noise on one sample, from -1 to 1.
        size: Samples to train on.
        layers: Shared layers.
        dim: Parameters of each.
        seed: Of directions and noise; None: that of the training.
    """

    angle: float = 120.0
    ratio: float = 1.0
    noise: float = 1.0
    correlation: float = 0.0
    size: int = 256
    layers: int = 3
    dim: int = 32
    seed: int | None = None


_FIELDS = {field.name: field for field in dataclasses.fields(DialSpec)}
_WHOLE = ("size", "layers", "dim", "seed")
_RANGES = {
    "angle": (0.0, 180.0),
    "ratio": (1e-3, 1e3),
    "noise": (0.0, 1e3),
    "correlation": (-1.0, 1.0),
    "size": (8, 1 << 17),
    "layers": (1, 64),
    "dim": (2, 4096),
    "seed": (0, 2**63 - 1),
}


def parse_dial(data: str) -> DialSpec:
    """The dials of a ``--data`` that names the dial problem.

    >>> parse_dial("dial:angle=90,noise=0").angle, parse_dial("dial").ratio
    (90.0, 1.0)

    Raises:
        UsageError: A dial is unknown, given twice, no number, or out of its range; says which it may be.
    """
    _, _, text = data.partition(":")
    values: dict[str, float | int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (part.strip() for part in item.partition("="))
        if name not in _FIELDS or name in values:
            near = get_close_matches(name, _FIELDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near and name not in values else ""
            raise UsageError(
                f"--data {data}: the dial {name!r} is unknown or given twice (there are: {', '.join(_FIELDS)}).{hint}"
            )
        values[name] = _number(data, name, number)
    return DialSpec(**values)  # type: ignore[arg-type]


def _number(data: str, name: str, text: str) -> float | int:
    low, high = _RANGES[name]
    try:
        value = int(text) if name in _WHOLE else float(text)
    except ValueError:
        kind = "a whole number" if name in _WHOLE else "a number"
        raise UsageError(f"--data {data}: {name} is {text!r}; it is to be {kind} from {low:g} to {high:g}.") from None
    if math.isnan(value) or not low <= value <= high:
        raise UsageError(f"--data {data}: {name} is {text}; it is to be from {low:g} to {high:g}.")
    return value
