"""`gradprobe study`: every trainer with every seed, fixed beforehand, run in parallel, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

FAILED = 1


def study(
    context: typer.Context,
    out: Annotated[Path, Option(help="The folder of the study; one that was begun is gone on with.")],
    trainers: Annotated[
        str | None, Option(help="The arms, such as single,joint,gradnorm,dual; single is one arm per task.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        Option(metavar="NAME=TRAINER...", help="One more arm, with flags of its own: 'light=joint --lr 1e-3'."),
    ] = None,
    seeds: Annotated[str | None, Option(help="How many, or which: 5, or 0,1,7. [default: 5]")] = None,
    baseline: Annotated[str, Option(help="The arm that others are compared with.")] = "joint",
    jobs: Annotated[
        int | None,
        Option(
            help="Runs at a time; the cores are divided among them. [default: 1; on a cluster, what it has room for]"
        ),
    ] = None,
    engine: Annotated[
        str, Option(help="Who runs them: local (processes of this machine), ray (a Ray cluster), slurm (writes a job).")
    ] = "local",
    preset: Annotated[str, Option(help="quick: 4 trainers, 3 seeds, small images, within an hour on 2 cores.")] = "",
    window: Annotated[str, Option(metavar="A:B", help="Steps that count. [default: 20 under Adam, to the end]")] = "",
    pairs: Annotated[str, Option(help="Such as 'cls>det': what cls does to det. [default: all]")] = "",
    margin: Annotated[float, Option(help="Smallest difference of interference that matters.")] = 0.1,
    outcome_margin: Annotated[float, Option(help="The same for metrics of the test split.")] = 0.02,
    only: Annotated[str, Option(help="Only these runs, such as joint-s0,dual-s0: for schedulers.")] = "",
    dry_run: Annotated[bool, Option("--dry-run", help="Print the commands of what is left; write nothing.")] = False,
) -> int:
    """Run a whole experiment, so that `gradprobe compare` can judge it. Flags of `gradprobe record` go to every run.

    Example: gradprobe study --trainers single,joint,gradnorm,dual --seeds 5 --out study --data my/data.yaml --epochs 30
    """
    from gradprobe.cli.engines import find
    from gradprobe.cli.studying import Asked, prepare, show

    carry_out = find(engine)

    asked = Asked(
        trainers=trainers,
        arms=arm or [],
        seeds=seeds,
        out=out,
        baseline=baseline,
        jobs=jobs,
        preset=preset,
        window=window,
        pairs=pairs,
        margin=margin,
        outcome_margin=outcome_margin,
        only=only,
        record=[word for word in context.args if word != "--"],
    )
    prepared = prepare(asked, check_extras=not dry_run, write=not dry_run)
    if dry_run:
        show(asked, prepared)
        return 0
    return 0 if carry_out(asked, prepared) else FAILED
