"""Paths as other people write them: with backslashes, with one ``../`` too many, with blanks at the end."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gradprobe.whole_files import read

_DRIVE = re.compile(r"[A-Za-z]:|\\\\")
_CONTROL = re.compile(r"[\x00-\x1f]")


def candidates(written: str, bases: Sequence[Path]) -> list[Path]:
    """Where a path may be meant to lie, in the order in which it is looked for.

    As written, relative to each of the bases; then with slashes for backslashes; then without a ``../`` in front, as
    YOLOv5 7.0 does for the data.yaml that Roboflow exports.

    >>> [place.as_posix() for place in candidates("..\\\\train", [Path("set")])]
    ['set/..\\\\train', 'set/../train', 'set/train']
    """
    spellings = list(_spellings(written))
    inner = [text[3:] for text in spellings if text.startswith("../")]
    return list(dict.fromkeys(base / text for text in (*spellings, *inner) for base in bases))


def find(places: Sequence[Path], is_there: Callable[[Path], bool] = Path.exists) -> Path | None:
    """The first of some places that is there; None where none is."""
    return next((place for place in places if _holds(is_there, place)), None)


def looked_for(written: str, places: Sequence[Path]) -> str:
    """For an error: everywhere that was looked, and what is odd about the path itself."""
    seen = list(dict.fromkeys(os.path.normpath(place) for place in places))
    return (f"looked for {', '.join(seen)}" if seen else "the path is empty") + hint(written)


def hint(written: str) -> str:
    """What is odd about a path that was not found, to be put behind a message; often empty."""
    if _DRIVE.match(written.strip()):
        return (
            "; it begins with a drive letter or a share of a Windows machine: write it relative to the data set's own "
            "folder, with / between folders"
        )
    if (control := _CONTROL.search(written)) is not None:
        return (
            f"; it holds the control character {control.group()!r}: YAML reads a backslash in double quotes as the "
            "beginning of one, so write / between folders, or single quotes"
        )
    return "; it has backslashes, which were tried as they are and as /" if "\\" in written else ""


MAX_TEXT, MAX_IMAGE = 64 << 20, 1 << 30
"""Bytes of the largest text and of the largest image file that are read: what is larger is none by mistake."""


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 where it begins so (PowerShell writes it).

    Raises:
        OSError, UnicodeDecodeError: It cannot be read, or is larger than any label or listing.
    """
    content = read(path, MAX_TEXT)
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def _spellings(written: str) -> Iterator[str]:
    if written.strip():
        yield written
        yield written.strip()
        yield written.strip().replace("\\", "/")


def _holds(is_there: Callable[[Path], bool], place: Path) -> bool:
    try:
        return is_there(place)
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False
