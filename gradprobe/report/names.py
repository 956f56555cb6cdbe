"""Names of strangers (layers, tasks, metrics, files), as they may be shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from gradprobe.display import short

LONGEST = 80
"""Characters of a name that are shown; what is longer loses its middle."""


def clean(name: object, limit: int = LONGEST) -> str:
    """A name on one line, without anything that acts instead of being seen.

    Control characters, marks that turn the direction of writing, private and half characters become U+FFFD; a name
    that is too long loses its middle. Nothing is escaped here: the template and :func:`gradprobe.report.chart.inert`
    do that, each for its own language.

    >>> clean("model\\n.9"), clean("a" * 9, limit=5)
    ('model\ufffd.9', 'aa…aa')
    """
    text = "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else c for c in str(name)
    )
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def distinct(names: Sequence[object], limit: int = LONGEST) -> list[str]:
    """Clean names, no two alike: an axis of categories would lay those over each other.

    >>> distinct(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    seen: dict[str, int] = {}
    result = []
    for name in names:
        shown = clean(name, limit)
        seen[shown] = seen.get(shown, 0) + 1
        candidate = shown if seen[shown] == 1 else f"{shown} ({seen[shown]})"
        while candidate in result:
            seen[shown] += 1
            candidate = f"{shown} ({seen[shown]})"
        result.append(candidate)
    return result


def in_short(names: Sequence[str], limit: int = 24) -> list[str]:
    """Names of layers for a narrow axis, as of :func:`gradprobe.display.short`, no two alike.

    >>> in_short(["net.stem", "net.head"], limit=7)
    ['…stem', '…head']
    """
    return distinct(short(names, limit), limit)
