"""Where tables go."""

from __future__ import annotations

import os

from rich.console import Console

WIDE = 160
"""Columns of a table in a pipe or a file, where nobody folds it."""


def stdout() -> Console:
    """As wide as the terminal; where there is none, and nobody says ``COLUMNS``, wide enough to split no word."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console
