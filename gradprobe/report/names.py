"""Names of strangers (layers, tasks, metrics, files), as they may be shown."""

from __future__ import annotations

from collections.abc import Sequence

from gradprobe.display import short
from gradprobe.foreign import LONGEST, clean


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
