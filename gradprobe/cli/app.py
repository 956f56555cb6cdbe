"""The commands, and how an error becomes a message and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
import typer

from gradprobe import __version__
from gradprobe.cli.advise import advise
from gradprobe.cli.audit import audit
from gradprobe.cli.check import check
from gradprobe.cli.checked import Checked, check_words
from gradprobe.cli.compare import compare
from gradprobe.cli.console import guarded
from gradprobe.cli.data import app as data_app
from gradprobe.cli.doctor import doctor
from gradprobe.cli.export import export
from gradprobe.cli.plot import plot
from gradprobe.cli.record import record
from gradprobe.cli.replay import replay
from gradprobe.cli.report import report
from gradprobe.cli.study import study
from gradprobe.cli.summary import summary
from gradprobe.cli.watch import watch
from gradprobe.errors import GradprobeError

INTERRUPTED = 130

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
for each in (*app.registered_commands, *data_app.registered_commands):
    each.cls = Checked
app.add_typer(data_app, name="data", help="Make the embedded data set, or check one of your own.")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
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
        check_words(arguments)
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
