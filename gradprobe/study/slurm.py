"""Writes the array job that runs a study under Slurm. Pure functions."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from gradprobe.study.arms import Planned

NAME = "slurm.sh"

TEMPLATE = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}{limit}
#SBATCH --cpus-per-task={cores}
{gpus}#SBATCH --output={logs}/slurm-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# Each task records the runs of one line, or goes on with them: after a lost node or the time limit submit this again.
# What else the cluster wants is said to sbatch: sbatch --time=8:00:00 --partition=long {script}
cd {here} || exit
for name in OMP MKL OPENBLAS; do # a cluster need not hold a task to the cores that it asked for
    threads=${{name}}_NUM_THREADS
    export "$threads=${{!threads:-${{SLURM_CPUS_PER_TASK:-{cores}}}}}"
done
RUNS=(
{runs}
)
exec {command} --only "${{RUNS[$SLURM_ARRAY_TASK_ID]}}" -- {record}
"""


def chains(runs: Sequence[Planned]) -> list[list[Planned]]:
    """Runs that have to follow each other, as one is made from the other; most are alone."""
    heads: dict[str, list[Planned]] = {}
    for run in runs:
        heads.setdefault(run.source if run.source in heads else run.name, []).append(run)
    return list(heads.values())


def script(
    runs: Sequence[Planned],
    words: Sequence[str],
    record: Sequence[str],
    *,
    out: Path,
    here: Path,
    cores: int,
    gpus: int,
    jobs: int | None,
) -> str:
    """The job's script, for ``sbatch``.

    Args:
        runs: What is left to record, sources first.
        words: The whole command of the study up to the flags for ``gradprobe record``.
        record: Those flags.
        out: The study's folder.
        here: Where the command is to be run.
        cores: That each run gets.
        gpus: That each run gets.
        jobs: How many runs at a time; None: as many as Slurm will.
    """
    lines = chains(runs)
    where = here / out
    return TEMPLATE.format(
        name=shlex.quote(out.name),
        last=len(lines) - 1,
        limit=f"%{jobs}" if jobs else "",
        cores=cores,
        gpus=f"#SBATCH --gres=gpu:{gpus}\n" if gpus else "",
        logs=shlex.quote(str(where / "logs").replace("%", "%%")),  # a percent sign there begins %a, %j, ...
        here=shlex.quote(str(here)),
        script=shlex.quote(str(out / NAME)),
        runs="\n".join(shlex.quote(",".join(run.name for run in chain)) for chain in lines),
        command=shlex.join(words),
        record=shlex.join(record),
    )
