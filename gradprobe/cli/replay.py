"""`gradprobe replay`: what other methods would have done at the recorded steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gradprobe.messages import ENGLISH as SAY
from gradprobe.messages import Message


def replay(
    file: Annotated[Path, typer.Argument(help="The run file, finished or still being written.")],
    method: Annotated[
        str, typer.Option(help="pcgrad, cagrad, mgda, upgrad, imtl, aligned, fairgrad, gradnorm; with commas between.")
    ] = "pcgrad,cagrad,mgda,gradnorm",
    out: Annotated[
        Path | None, typer.Option(help="Where the figure goes.", show_default="FILE-replay.png beside the run")
    ] = None,
    figure: Annotated[bool, typer.Option("--figure/--no-figure", help="Draw, with the numbers as CSV.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """Ask methods for their weights at every recorded step, from the recorded Gramians alone.

    Example: gradprobe replay conflict.h5 --method pcgrad,cagrad,mgda,gradnorm
    """
    import json

    from gradprobe.cli.replaying import replay_run
    from gradprobe.runfile import Run, thin
    from gradprobe.verdict.replay import table

    names = list(dict.fromkeys(part.strip() for part in method.split(",") if part.strip()))
    with Run(file) as whole:
        run = thin.thin(whole)
        replayed = replay_run(run, names)
        rows, notes = table(replayed, run.tasks), _notes(run, names)
        written = []
        if figure:
            from gradprobe.plots.figure import write_drawn
            from gradprobe.plots.replay import draw

            written = write_drawn(
                *draw(run, replayed), out or file.with_name(f"{file.name.removesuffix('.h5')}-replay.png")
            )
    if as_json:
        print(
            json.dumps({"file": file.name, "methods": rows, "notes": list(map(str, notes))}, indent=2, allow_nan=False)
        )
        return
    _show(rows, notes, written)


def _notes(run: Any, names: list[str]) -> list[Message]:
    said = [Message("replay.reading")]
    steps = run["step"]
    if "gradnorm" in names and len(steps) > 1 and int(steps[-1] - steps[0]) != len(steps) - 1:
        said.append(Message("replay.gradnorm", n=len(steps), steps=int(steps[-1]) + 1))
    return said


def _show(rows: list[dict[str, Any]], notes: list[Message], written: list[Path]) -> None:
    from rich.table import Table

    from gradprobe.cli.console import stdout

    keys = ("replay.method", "column.task", *(f"replay.{name}" for name in ("weight", "progress", "change")))
    table = Table(title=SAY("replay.title"), title_justify="left")
    for place, key in enumerate((*keys, "replay.harmed", "replay.length")):
        table.add_column(SAY(key), justify="left" if place < 2 else "right", overflow="fold")
    for row in rows:
        medians = [SAY.number(value) for value in (row["weight"], row["progress"], row["change"]["median"])]
        table.add_row(row["method"], row["task"], *medians, SAY.percent(row["harmed"]), SAY.number(row["length"]))
    console = stdout()
    console.print(table)
    for text in (*notes, *written):
        console.print(str(text), soft_wrap=True)
