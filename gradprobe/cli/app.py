"""The commands, what is checked of every command line, and how an error becomes a message and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

import click
import typer
from typer.core import TyperCommand

from gradprobe import __version__
from gradprobe.cli import INTERRUPTED
from gradprobe.cli.advise import advise
from gradprobe.cli.audit import audit
from gradprobe.cli.compare import compare
from gradprobe.cli.console import guarded
from gradprobe.cli.data import app as data_app
from gradprobe.cli.doctor import doctor
from gradprobe.cli.fork import fork
from gradprobe.cli.record import record
from gradprobe.cli.replay import replay
from gradprobe.cli.report import report
from gradprobe.cli.run_file import check, export, plot, summary
from gradprobe.cli.study import study
from gradprobe.cli.watch import watch
from gradprobe.errors import GradprobeError, UsageError
from gradprobe.trainers.flags import PANELS
from gradprobe.trainers.settings import LONGEST

__all__ = ["run"]


_PATHS = ("data", "cfg", "weights", "name")
"""Options that may name a file, or something else."""

_OTHERS = "Options"
"""The panel of options that name none."""

_FLAGS_COLUMN = 25
"""Width of the column of flags; the help of a longer flag begins on the next line."""

_ROOM = 40
"""Characters that suffixes of side files and temporary files add to a name."""


class _CheckedCommand(TyperCommand):
    """Refuses paths that no file can have; lists its options by panel, where they have one."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each panel, all with their words in one column."""
        lines: dict[str, list[tuple[str, str]]] = {}
        for each in self.get_params(ctx):
            panel = getattr(each, "rich_help_panel", None) or (_OTHERS if isinstance(each, click.Option) else "")
            if (line := each.get_help_record(ctx)) is not None:
                lines.setdefault(panel, []).append(line)
        if not set(lines) & set(PANELS):
            return super().format_options(ctx, formatter)
        lines[PANELS[0]] += lines.pop(_OTHERS, [])
        widest = min(_FLAGS_COLUMN, max(len(names) for panel in lines.values() for names, _ in panel))
        for panel in sorted(lines, key=lambda name: PANELS.index(name) if name in PANELS else -1):
            with formatter.section(panel or "Arguments"):
                formatter.write_dl(
                    [(names.ljust(widest) if words else names, words) for names, words in lines[panel]],
                    col_max=_FLAGS_COLUMN,
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


def _check_words(words: Sequence[str]) -> None:
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
        os.lstat(text + "x" * _ROOM)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{flag} {_shown(text)}: {error.strerror}; {len(text):,} characters.") from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:60]}...")


_EXAMPLES = """
Measures whether tasks trained together interfere, and whether a remedy reduced it.

\b
Example:
  gradprobe record --trainer gradnorm --out conflict.h5
  gradprobe plot conflict.h5
"""

app = typer.Typer(
    help=_EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(record)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(study)
app.command()(plot)
app.command()(summary)
app.command()(watch)
app.command()(replay)
app.command()(advise)
app.command()(compare)
app.command()(report)
app.command()(export)
app.command()(check)
app.command()(doctor)
app.command()(audit)
app.command()(fork)
for each in (*app.registered_commands, *data_app.registered_commands):
    each.cls = _CheckedCommand
app.add_typer(data_app, name="data", help="Make the embedded data set, or check one of your own.")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        print(f"gradprobe {__version__}")
        raise typer.Exit


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        0 done, 1 failed, 2 wrong usage, 3 file unreadable or incomplete, 10 a gate asked for tripped, 11 inconclusive,
        130 stopped by Ctrl-C.
    """
    with guarded():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        _check_words(arguments)
        code = app(list(arguments), standalone_mode=False, prog_name="gradprobe", obj=list(arguments))
        if code == INTERRUPTED:  # typer turned a Ctrl-C into this code
            print("gradprobe: stopped", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except GradprobeError as error:
        print(f"gradprobe: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("gradprobe: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `gradprobe summary run.h5 | head`
        sys.stderr.close()
        return 1
