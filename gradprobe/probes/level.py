"""Where gradients are measured: on parameters, at features, or both."""

from __future__ import annotations

from dataclasses import dataclass

from gradprobe.errors import ProbeError


@dataclass(frozen=True)
class Level:
    """What a probe measures.

    Attributes:
        parameters: Gradients on the shared parameters, at due steps.
        features: Gradients at the shared features: at due steps, or at every step if parameters are measured too.
        every: Steps between due ones where the user does not say.
    """

    parameters: bool
    features: bool
    every: int


LEVELS = {
    "parameters": Level(parameters=True, features=False, every=10),
    "features": Level(parameters=False, features=True, every=1),
    "both": Level(parameters=True, features=True, every=10),
}


def level_called(name: str) -> Level:
    """The level of that name.

    Raises:
        ProbeError: There is none; says which there are.
    """
    if name not in LEVELS:
        raise ProbeError(f"level={name!r}: there are {', '.join(map(repr, LEVELS))}.")
    return LEVELS[name]
