"""``gradprobe record``: train with a probe and keep what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import click
from typer import Option

from gradprobe.cli.options import Hyp, Preset, Source, given, takes_settings


@takes_settings()
def record(
    out: Annotated[Path | None, Option(help="The run file. [default: conflict.h5]", rich_help_panel="Common")] = None,
    resume: Annotated[
        Path | None, Option(help="Go on with this run from its last whole epoch.", rich_help_panel="Common")
    ] = None,
    preset: Preset = "",
    list_trainers: Annotated[
        bool,
        Option("--list-trainers", help="Say what each trainer does and costs, and leave.", rich_help_panel="Common"),
    ] = False,
    hyp: Hyp = None,
    source: Source = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace a run that is there.", rich_help_panel="Output")
    ] = False,
    plan: Annotated[
        Path | None,
        Option(
            help="What was fixed before the runs (a JSON file); kept in the file as plan.*.", rich_help_panel="Output"
        ),
    ] = None,
    arm: Annotated[
        str,
        Option(help="The arm of a study that the run belongs to. [default: its trainer]", rich_help_panel="Output"),
    ] = "",
    project: Annotated[
        Path | None, Option(help="Folder of the run, as YOLOv5 names it.", rich_help_panel="Output")
    ] = None,
    name: Annotated[str | None, Option(help="Its sub-folder.", rich_help_panel="Output")] = None,
    **flags: Any,
) -> int:
    """Train detection and classification together and record what their gradients do to each other."""
    from gradprobe.cli.interventions import trainer_list
    from gradprobe.cli.recording import Request, record_run

    if list_trainers:
        print(trainer_list())
        return 0
    return record_run(
        Request(
            flags=given(flags),
            preset=preset,
            hyp=hyp,
            out=out,
            project=project,
            name=name,
            overwrite=overwrite,
            resume=resume,
            source=source,
            plan=plan,
            arm=arm,
            arguments=click.get_current_context().obj or (),
        )
    )
