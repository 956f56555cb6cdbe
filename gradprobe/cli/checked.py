"""A command that looks at what it was given before it does anything with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

import click
from typer.core import TyperCommand

from gradprobe.errors import UsageError
from gradprobe.trainers.flags import PANELS
from gradprobe.trainers.settings import LONGEST

_PATHS = ("data", "cfg", "weights", "name")
"""Options that may name a file, or something else."""

OTHERS = "Options"
"""The panel of options that name none."""

_COLUMN = 25
"""Characters of flags beside which their words stand; behind longer ones they stand below."""

ROOM = 40
"""Characters by which names of files beside a named one, finished or half made, are longer."""


class Checked(TyperCommand):
    """Refuses paths that no file can have; lists its options by panel, where they have one."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each panel, all with their words in one column."""
        lines: dict[str, list[tuple[str, str]]] = {}
        for each in self.get_params(ctx):
            panel = getattr(each, "rich_help_panel", None) or (OTHERS if isinstance(each, click.Option) else "")
            if (line := each.get_help_record(ctx)) is not None:
                lines.setdefault(panel, []).append(line)
        if not set(lines) & set(PANELS):
            return super().format_options(ctx, formatter)
        lines[PANELS[0]] += lines.pop(OTHERS, [])
        widest = min(_COLUMN, max(len(names) for panel in lines.values() for names, _ in panel))
        for panel in sorted(lines, key=lambda name: PANELS.index(name) if name in PANELS else -1):
            with formatter.section(panel or "Arguments"):
                formatter.write_dl(
                    [(names.ljust(widest) if words else names, words) for names, words in lines[panel]], col_max=_COLUMN
                )
        return None

    def invoke(self, ctx: click.Context) -> Any:
        """Look, then run.

        Raises:
            UsageError: Says which option, and what is wrong with it.
        """
        for parameter in self.params:
            flag = (
                max(parameter.opts, key=len) if isinstance(parameter, click.Option) else parameter.human_readable_name
            )
            value = ctx.params.get(parameter.name or "")
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if not (_is_path(parameter) and isinstance(each, (str, os.PathLike))):
                    continue
                if isinstance(parameter.type, click.Path) and not os.fspath(each):
                    raise UsageError(f"{flag}: is empty, and names no file.")
                _check_path(flag, os.fspath(each))
        return super().invoke(ctx)


def check_words(words: Sequence[str]) -> None:
    """Whether words can be those of a command line.

    Raises:
        UsageError: One holds a NUL, or what is no text, or is longer than any path.
    """
    for word in map(os.fspath, words):
        if "\0" in word:
            raise UsageError(f"{_shown(word)} holds a NUL character, which no path and no name does.")
        if len(word) > LONGEST:
            raise UsageError(f"{_shown(word)} has {len(word):,} characters; {LONGEST:,} are the most of any path.")
        try:
            os.fsencode(word)
        except UnicodeEncodeError as error:
            raise UsageError(f"{_shown(word)} is no text that a path could be ({error.reason}).") from None


def _is_path(parameter: click.Parameter) -> bool:
    return parameter.name in _PATHS or isinstance(parameter.type, click.Path)


def _check_path(flag: str, text: str) -> None:
    try:
        os.lstat(text + "x" * ROOM)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{flag} {_shown(text)}: {error.strerror}; {len(text):,} characters.") from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:60]}...")
