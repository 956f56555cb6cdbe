"""`gradprobe compare`: is interference there, and was it reduced."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

GATE_TRIPPED, INCONCLUSIVE = 10, 11
FORMATS = ("text", "md")


def compare(
    files: Annotated[list[Path] | None, typer.Argument(help="Run files, or folders of them.")] = None,
    baseline: Annotated[
        str, Option(help="The arm that others are compared with. [default: as planned, or joint]")
    ] = "",
    control: Annotated[
        list[str] | None, Option(help="An arm that trains one task alone. [default: those of --trainer single]")
    ] = None,
    arm: Annotated[list[str] | None, Option(metavar="NAME=GLOB", help="The files of an arm, by name.")] = None,
    margin: Annotated[
        float | None, Option(help="Smallest difference that matters. [default: as planned, or .1]")
    ] = None,
    outcome_margin: Annotated[
        float | None, Option(help="The same for metrics of the test split. [default: as planned, or .02]")
    ] = None,
    window: Annotated[str, Option(metavar="A:B", help="Training steps that count. [default: as planned, or all]")] = "",
    pairs: Annotated[str, Option(help="Such as 'cls>det': what cls does to det. [default: as planned, or all]")] = "",
    metrics: Annotated[str, Option(help="Of the test split. [default: as planned, or the main ones]")] = "",
    paired: Annotated[
        bool | None,
        Option("--paired/--unpaired", help="Runs of one seed belong together, or not. [default: if the files show it]"),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object, for programs.")] = False,
    fail_on: Annotated[str, Option(metavar="increased", help="Leave with 10 if anything increased.")] = "",
    table_format: Annotated[str, Option(help=f"Of the tables: {', '.join(FORMATS)}.")] = "text",
    csv: Annotated[
        Path | None, Option(help="A bare table instead: step,loss_det,loss_cls,weight_det,weight_cls.")
    ] = None,
) -> int:
    """Say whether tasks interfere, and whether an intervention reduced it: in words, then in tables.

    Leaves with 0 when all is answered, 10 when --fail-on trips, 11 when interference is left open.

    Example: gradprobe compare study/*.h5 --baseline joint
    """
    import json

    from gradprobe.cli import comparing
    from gradprobe.errors import UsageError
    from gradprobe.verdict.answers import as_json as plain
    from gradprobe.verdict.comparison import compare as judge
    from gradprobe.verdict.options import Options

    if fail_on not in ("", "increased"):
        raise UsageError(f"--fail-on {fail_on!r}: increased is what it knows.")
    if table_format not in FORMATS:
        raise UsageError(f"--table-format {table_format!r}: one of {', '.join(FORMATS)}.")
    if csv is not None:
        if files or arm:
            raise UsageError("--csv is a comparison of its own; leave the run files out.")
        return comparing.bare(csv, as_json)
    options = Options(
        baseline=baseline,
        controls=control or (),
        margin=margin,
        outcome_margin=outcome_margin,
        window=comparing.parse_window(window),
        pairs=comparing.words(pairs),
        metrics=comparing.words(metrics),
        paired=paired,
    )
    found = judge(comparing.gather(files or [], arm or []), options)
    if as_json:
        print(json.dumps(plain(found), indent=2, allow_nan=False))
    else:
        comparing.show(found, table_format)
    if fail_on and found.increased:
        return GATE_TRIPPED
    return INCONCLUSIVE if found.open else 0
