"""What is to be said, apart from the language that says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, Union

Value: TypeAlias = Union[str, float, "Message", Sequence["Value"], None]
"""A name of the user's, which no language translates; a number, None: not known; a message in a message; several."""


@dataclass(frozen=True, init=False)
class Message:
    """A sentence, or a part of one, of the catalogue.

    Attributes:
        key: Of the catalogue.
        values: What is filled in, by name.

    ``str(message)`` is English for a terminal and for programs; :class:`gradprobe.messages.Language` says it otherwise.

    >>> str(Message("plan.arm_unplanned", arm="dual"))
    'arm dual was not planned.'
    """

    key: str
    values: tuple[tuple[str, Value], ...]

    def __init__(self, key: str, /, **values: Value) -> None:
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "values", tuple((name, _kept(value)) for name, value in sorted(values.items())))

    def __str__(self) -> str:
        from gradprobe.messages.language import ENGLISH

        return ENGLISH.say(self)


def _kept(value: Value) -> Value:
    """Messages are compared and counted: what could change is held in a form that cannot."""
    if isinstance(value, (str, Message)) or not isinstance(value, Sequence):
        return value
    return tuple(map(_kept, value))
