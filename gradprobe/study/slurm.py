"""Writes the array job that runs a study under Slurm. Pure functions.

Whatever a name or a flag holds, it is one word of one line: nothing in it is run, and none of it is a line of its own.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from gradprobe.errors import UsageError
from gradprobe.foreign import quoted
from gradprobe.study.arms import Planned, chains

NAME = "slurm.sh"

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_UNUSUAL = re.compile(r"[^\w.-]", re.ASCII)

_TEMPLATE = """\
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
cd -- {here} || exit
for name in OMP MKL OPENBLAS; do # a cluster need not hold a task to the cores that it asked for
    threads=${{name}}_NUM_THREADS
    export "$threads=${{!threads:-${{SLURM_CPUS_PER_TASK:-{cores}}}}}"
done
RUNS=(
{runs}
)
exec {command} --only "${{RUNS[$SLURM_ARRAY_TASK_ID]}}" -- {record}
"""


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

    Raises:
        UsageError: Slurm cannot be given the folder of the logs.
    """
    lines = chains(runs)
    logs = str(here / out / "logs")
    if _CONTROL.search(logs):
        raise UsageError(
            f"--engine slurm: the folder {logs!r} holds a line break or another control character, which Slurm takes "
            "in no name of a log. Take another one: --out."
        )
    return _TEMPLATE.format(
        name=_UNUSUAL.sub("_", out.name).strip("-_.")[:64] or "gradprobe",
        last=len(lines) - 1,
        limit=f"%{jobs}" if jobs else "",
        cores=cores,
        gpus=f"#SBATCH --gres=gpu:{gpus}\n" if gpus else "",
        logs=shlex.quote(logs.replace("%", "%%")),  # a percent sign there begins %a, %j, ...
        here=quoted(here),
        script=quoted(out / NAME),
        runs="\n".join(quoted(",".join(run.name for run in chain)) for chain in lines),
        command=" ".join(map(quoted, words)),
        record=" ".join(map(quoted, record)),
    )
