"""How the parts of a run are named, which of them count, and which are to be put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from gradprobe.runfile import schema
from gradprobe.whole_files import followed, there

Span = tuple[int, int]
"""First and last number that a part stands for: (7, 7), or (1, 32) for one put together from 32."""


def folder(run: Path) -> Path:
    """Where the parts of a run lie: beside the file itself, where ``run`` is a symbolic link to it."""
    with suppress(OSError):  # where links lead nowhere, who opens the run says so
        run = followed(run)
    return run.parent / (run.name + schema.PARTS_SUFFIX)


def name(span: Span) -> str:
    """The file name of a part.

    >>> name((7, 7)), name((1, 32))
    ('00000007.h5', '00000001-00000032.h5')
    """
    first, last = span
    return f"{first:08d}.h5" if first == last else f"{first:08d}-{last:08d}.h5"


def span(path: Path) -> Span | None:
    """What a part stands for; None for any other file.

    >>> span(Path("00000001-00000032.h5")), span(Path("00000007.h5")), span(Path("x.h5"))
    ((1, 32), (7, 7), None)
    """
    first, dash, last = path.stem.partition("-")
    numbers = [first, last] if dash else [first]
    if path.suffix != ".h5" or not all(n.isascii() and n.isdecimal() for n in numbers):
        return None
    return int(numbers[0]), int(numbers[-1])


def _counting(spans: Iterable[Span], merged_through: int = 0) -> list[Span]:
    """The parts whose rows are in no other: those above ``merged_through`` that no wider part contains.

    A kill between putting parts together and removing them leaves both.

    >>> _counting([(1, 1), (2, 2), (1, 2), (3, 3)]), _counting([(1, 2), (3, 3)], merged_through=2)
    ([(1, 2), (3, 3)], [(3, 3)])
    """
    kept: list[Span] = []
    for first, last in sorted(spans, key=lambda s: (s[0], -s[1])):
        if first > merged_through and not (kept and last <= kept[-1][1]):
            kept.append((first, last))
    return kept


def due(widths: Sequence[int], fan: int) -> int:
    """How many of the last parts are to be put together now; 0: none.

    Parts are put together as digits carry in a number of base ``fan``, so that there are never more than
    ``fan`` of one width, and a row is written again no more often than that number has digits.

    Args:
        widths: How many numbers each part stands for, in order.
        fan: How many of a width make one of the next.

    >>> due([1, 1, 1], 4), due([4, 1, 1, 1, 1], 4), due([4, 4, 4, 1, 1, 1, 1], 4)
    (0, 4, 7)
    """
    taken, width = 0, 1
    while True:
        rest = widths[: len(widths) - taken]
        same = next((i for i, w in enumerate(reversed(rest)) if w != width), len(rest))
        if same + (taken > 0) < fan:
            return taken
        taken, width = taken + same, width * fan


def paths(run: Path) -> list[Path]:
    """The parts that lie beside ``run``, in order, without those that a wider one contains."""
    place = folder(run)
    found = [s for s in map(span, place.glob("*.h5")) if s is not None] if there(place) else []
    return [place / name(s) for s in _counting(found)]
