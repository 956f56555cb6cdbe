"""`gradprobe plot`: figures of one run, and what they show in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradprobe.plots import FORMATS, WHAT


def plot(
    file: Annotated[Path, typer.Argument(help="The run file, finished or still being written.")],
    what: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(WHAT)}; or your own my_module:function, which draws a run into a matplotlib figure."
        ),
    ] = "overview",
    format: Annotated[
        str | None, typer.Option(help=f"{', '.join(FORMATS)}.", show_default="png, or the suffix of --out")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the figure goes.", show_default="FILE.png or FILE-WHAT.png beside the run"),
    ] = None,
    data: Annotated[bool, typer.Option("--data/--no-data", help="Write the numbers as CSV beside the figure.")] = True,
) -> None:
    """Draw a run, and say in words what it shows.

    Example: gradprobe plot conflict.h5 --what weights --format svg
    """
    from gradprobe import plots
    from gradprobe.cli.console import stdout
    from gradprobe.named_code import named_function
    from gradprobe.runfile import Run
    from gradprobe.summary import sentences

    page = named_function(what, "mypackage:draw") if ":" in what else what
    target = _target(file, what.rpartition(":")[2], format, out)
    with Run(file) as run:
        written = plots.write(run, page, target, data=data)
        said = sentences(run)
    console = stdout()
    for text in (*map(str, written), "", *said):
        console.print(text, soft_wrap=True)


def _target(file: Path, what: str, format: str | None, out: Path | None) -> Path:
    """Where the figure goes: beside the run unless told otherwise."""
    from gradprobe.errors import UsageError

    if out is None:
        stem = file.name.removesuffix(".h5")  # lr0.1 is no lr0
        name = stem if what == "overview" else f"{stem}-{what}"
        return file.with_name(f"{name}.{format or 'png'}")
    if not out.suffix and (out.is_file() or not out.exists()):
        return out.with_name(f"{out.name}.{format or 'png'}")
    if format is not None and out.suffix[1:].lower() != format:
        raise UsageError(f"--out {out} and --format {format} contradict each other; leave one of them out.")
    return out
