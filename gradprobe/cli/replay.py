"""`gradprobe replay`: what other methods would have done at the recorded steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


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
        print(json.dumps({"file": file.name, "methods": rows, "notes": notes}, indent=2, allow_nan=False))
        return
    _show(rows, notes, written)


def _notes(run: Any, names: list[str]) -> list[str]:
    said = [
        "At the recorded parameters, to first order, on the same minibatch. Progress 1: as if the other tasks were "
        "absent. What a training with these weights would become takes a run."
    ]
    steps = run["step"]
    if "gradnorm" in names and len(steps) > 1 and int(steps[-1] - steps[0]) != len(steps) - 1:
        said.append(
            f"gradnorm saw the {len(steps)} measured rows alone, of {int(steps[-1]) + 1} steps: live it moves at every "
            "step. Record with --every 1 for its own weights."
        )
    return said


def _show(rows: list[dict[str, Any]], notes: list[str], written: list[Path]) -> None:
    from rich.table import Table

    from gradprobe.cli.console import stdout

    columns = ("method", "task", "weight", "progress", "change to joint", "harmed", "step length")
    table = Table(title="Replay (medians over rows)", title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < 2 else "right", overflow="fold")
    for row in rows:
        harmed = "-" if row["harmed"] is None else f"{100 * row['harmed']:.0f} %"
        medians = [_text(value) for value in (row["weight"], row["progress"], row["change"]["median"])]
        table.add_row(row["method"], row["task"], *medians, harmed, _text(row["length"]))
    console = stdout()
    console.print(table)
    for text in (*notes, *map(str, written)):
        console.print(text, soft_wrap=True)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
