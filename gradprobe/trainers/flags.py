"""What is said of a setting, once: its default, its range, its help and its flag. Imports nothing heavy.

The command line, the checks of values and the provenance are made from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar

from gradprobe.errors import UsageError

__all__ = ["PANELS", "flag", "options"]


_T = TypeVar("_T")

PANELS = ("Common", "Data", "Model", "Training", "GradNorm", "Other trainers", "Measuring", "Output")
"""Under which flags are listed, in order."""

_MOST_SHOWN = 80
"""Characters of a value in a message."""


@dataclass(frozen=True)
class Option:
    """What is known of a setting besides its name, type and default.

    Attributes:
        help: What it is, with its unit; ``{choices}`` stands for those.
        shown: The default as the help says it; empty: the value itself.
        choices: What a text may be, or its default.
        least, above, most, below: Bounds of a number.
        endless: Whether it may be infinite.
        why: Said behind the range where a value is out of it.
        rule: Raises a ``UsageError`` for a value that cannot be, beyond range and choices.
        panel: One of :data:`PANELS`.
        flag: Whether it has one; else it is what ``--from`` gave.
        switch: Of a truth: the flag is ``--x`` alone, without ``--no-x``.
        audit: Whether ``gradprobe audit`` takes it too; a text: its help there.
        trainers: Those that read it; empty: all.
        refused: Whether it is an error with another trainer, and not merely without effect.
    """

    help: str
    shown: str = ""
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    endless: bool = False
    why: str = ""
    rule: Callable[[Any], object] | None = None
    panel: str = "Other trainers"
    flag: bool = True
    switch: bool = False
    audit: bool | str = True
    trainers: tuple[str, ...] = ()
    refused: bool = False

    @property
    def range(self) -> str:
        """The bounds in words."""
        bounds = (
            ("a positive number", self.above == 0),
            (f"above {_number(self.above)}", self.above not in (0, -math.inf)),
            (f"at least {_number(self.least)}", self.least > -math.inf),
            (f"at most {_number(self.most)}", self.most < math.inf),
            (f"below {_number(self.below)}", self.below < math.inf),
        )
        return " and ".join(words for words, there in bounds if there) or "a number"

    def holds(self, value: float) -> bool:
        """Whether a number is within the bounds; NaN is in none."""
        if value == math.inf:
            return self.endless
        return self.least <= value <= self.most and self.above < value < self.below


def option(default: _T, help: str, **facts: Any) -> _T:
    """A field of a dataclass of settings; see :class:`Option` for ``facts``."""
    made: _T = field(default=default, metadata={"option": Option(help, **facts)})
    return made


def options(settings: Any) -> Iterator[tuple[dataclasses.Field[Any], Option]]:
    """Every field of a dataclass of settings, or of an instance, and what is known of it."""
    for each in dataclasses.fields(settings):
        yield each, each.metadata["option"]


def flag(name: str) -> str:
    """The flag of a setting.

    >>> flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def check_settings(settings: Any) -> None:
    """Whether every value by itself is in its range, or one of its choices, and goes with the trainer.

    Raises:
        UsageError: One is not; says which, and what it may be.
    """
    for each, known in options(settings):
        value = getattr(settings, each.name)
        wrong = _wrong(value, each.default, known)
        if not wrong and known.refused and value != each.default and settings.trainer not in known.trainers:
            wrong = f"goes with --trainer {' or '.join(known.trainers)}, not with {settings.trainer}."
        if wrong:
            raise UsageError(f"{flag(each.name)} {str(value)[:_MOST_SHOWN]}: {wrong}")
        if known.rule is not None:
            known.rule(value)


def _wrong(value: Any, default: Any, known: Option) -> str:
    """What is wrong with a value by itself; empty: nothing."""
    if known.choices and value not in (default, *known.choices):
        return f"must be one of {', '.join(known.choices)}.{near(value, known.choices)}"
    if isinstance(value, int | float) and not known.holds(value):
        why = f"; {known.why}" if known.why else ""
        return f"must be {'finite' if value == math.inf else known.range}{why}."
    return ""


def near(value: str, known: Iterable[str]) -> str:
    """A hint at the name that was meant; empty where there is none."""
    found = get_close_matches(value, list(known), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def _number(value: float) -> str:
    """A bound as one reads it: large powers of two by their exponent."""
    whole = isinstance(value, int) and value > 1 << 20 and value & (value - 1) == 0
    return f"2^{int(value).bit_length() - 1}" if whole else f"{value:g}"
