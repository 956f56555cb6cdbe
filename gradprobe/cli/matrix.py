"""The cosine between every two tasks in a terminal: a line per task, a character per pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

STEPS = ((-0.5, "█", "bright_red"), (-0.1, "-", "red"), (0.1, "·", "bright_black"), (0.5, "+", "blue"))
"""Upper ends of cosines, how they are drawn, and their colour; above the last: :data:`_HIGHEST`."""

_HIGHEST = ("#", "bright_blue")

LEGEND = "cosine: █ below -0.5, - below -0.1, · about 0, + above 0.1, # above 0.5; columns in the order of the lines"

WIDEST = 64
"""Of more tasks no matrix is drawn: the lines would not fit."""


def ordered(tasks: Sequence[str], medians: Mapping[str, float | None]) -> tuple[list[str], list[Text]]:
    """The tasks in clustered order, and each one's line of the matrix.

    Args:
        tasks: T names.
        medians: Of every pair, by its name, in stored order; None: not measured, which is drawn as a space.
    """
    import numpy as np

    from gradprobe.summary import crowd

    values = crowd.matrix([np.nan if v is None else v for v in medians.values()], len(tasks))
    order = crowd.clustered(values)
    shown = values[np.ix_(order, order)]
    return [tasks[i] for i in order], [_line(row.tolist(), place) for place, row in enumerate(shown)]


def named(name: str, width: int, line: Text) -> Text:
    """A task's line with its name before it, which is no markup."""
    from rich.text import Text

    return Text(f"{name:<{width}}  ", no_wrap=True, overflow="crop").append_text(line)


def _line(cosines: Sequence[float], own: int) -> Text:
    from rich.text import Text

    text = Text()
    for place, value in enumerate(cosines):
        text.append(*(("\\", "dim") if place == own else cell(value)))
    return text


def cell(cosine: float) -> tuple[str, str]:
    """How one cosine is drawn, and its colour.

    >>> [cell(c)[0] for c in (-0.9, -0.3, 0.0, 0.3, 0.9, float("nan"))]
    ['█', '-', '·', '+', '#', ' ']
    """
    if cosine != cosine:
        return " ", ""
    return next(((mark, colour) for end, mark, colour in STEPS if cosine < end), _HIGHEST)
