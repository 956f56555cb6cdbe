"""Text that may come from anyone, made fit for where it goes: a terminal, a page, a spreadsheet."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from pathlib import Path

CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f"
"""Control characters but for tab and line feed, as in a character class: they can steer a terminal."""

# What turns the text around it, and what is not seen: bidirectional marks, embeddings, overrides and isolates; spaces
# without width, invisible operators, the byte order mark; separators of lines and paragraphs; tag characters.
_UNSEEN = "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"

# Joiners belong into Persian and Indic words and into emoji; beside ASCII, or at an end, they only hide.
_JOINER = "[\u200c\u200d]"
_SPURIOUS = f"(?<![^\x00-\x7f]){_JOINER}|{_JOINER}(?![^\x00-\x7f])"

_STEERING = re.compile(f"[{CONTROL}{_UNSEEN}]|{_SPURIOUS}")

LONGEST = 80
"""Characters of a name that are shown; what is longer loses its middle."""

_FORMULA = re.compile("[=+@\uff1d\uff0b\uff0d\uff20\t\r\n-]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)


def visible(text: str) -> str:
    """Text as a terminal or a page can be given it: what would steer, turn or hide text becomes U+FFFD.

    Tabs, line feeds, all letters, accents and emoji stay; so do joiners between characters beyond ASCII. A lone
    surrogate, as a file name that is no UTF-8 gives one, becomes a question mark.

    >>> visible("a\\x1b[2J\\u202eb\\n")
    'a\ufffd[2J\ufffdb\\n'
    """
    return _STEERING.sub("\ufffd", text.encode("utf-8", "replace").decode("utf-8"))


def cell(text: str) -> str:
    """Text for a cell of a CSV file: what a spreadsheet would take for a formula gets an apostrophe before it.

    Numbers stay as they are.

    >>> cell("=1+1"), cell("-0.5"), cell("det")
    ("'=1+1", '-0.5', 'det')
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def quoted(word: str | Path) -> str:
    """A word of a command that is shown, as a shell takes it: on one line and as it can be seen, whatever it holds.

    A path is never an option. What :func:`visible` would replace is written as bash reads it.

    >>> print(quoted("a b"), quoted(Path("-x")), quoted("a\\nb"))
    'a b' ./-x $'a\\x0ab'
    """
    text = f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
    if "\n" not in text and visible(text) == text:
        return shlex.quote(text)
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in os.fsencode(text))
    return f"$'{''.join(plain)}'"


def clean(name: object, limit: int = LONGEST) -> str:
    """A name on one line, without anything that acts instead of being seen.

    Control characters, marks that turn the direction of writing, private and half characters become U+FFFD; a name
    that is too long loses its middle. Nothing is escaped here: a page does that for HTML and for its figures.

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
