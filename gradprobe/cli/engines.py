"""Who carries out a study: this machine, a Ray cluster, or Slurm."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from gradprobe import whole_files
from gradprobe.cli.studying import Asked, Prepared, run, words
from gradprobe.errors import UsageError
from gradprobe.foreign import quoted
from gradprobe.study import ray_engine, slurm
from gradprobe.study.runner import COMMAND, cores, cores_each

Engine = Callable[[Asked, Prepared], bool]
"""Carries out what is prepared; says whether no run failed."""


def find(name: str) -> Engine:
    """The engine of this name.

    Raises:
        UsageError: There is none.
    """
    engines: dict[str, Engine] = {"local": local, "ray": on_ray, "slurm": by_slurm}
    if name not in engines:
        raise UsageError(f"--engine {name}: there is no such engine (there are: {', '.join(engines)}).")
    return engines[name]


def local(asked: Asked, prepared: Prepared) -> bool:
    """Processes of this machine."""
    return run(prepared)


def on_ray(asked: Asked, prepared: Prepared) -> bool:
    """Tasks on a Ray cluster, watched from here; where none is left, none is joined."""
    if not prepared.left:
        return run(prepared)
    ray_engine.connect()
    have = ray_engine.nodes()
    jobs = min(ray_engine.at_a_time(have, prepared.gpus, prepared.jobs), len(prepared.runs))
    each = ray_engine.cores_each(have, prepared.gpus, jobs)
    launch = ray_engine.tasks(prepared.where.plan, each, prepared.gpus)
    return run(dataclasses.replace(prepared, jobs=jobs), launch)


def by_slurm(asked: Asked, prepared: Prepared) -> bool:
    """Write an array job of the runs that are left; where none is, say what became of them."""
    if not prepared.left:
        return run(prepared)
    where = prepared.where.path
    text = slurm.script(
        prepared.left,
        [*COMMAND, *words(asked)],
        asked.record,
        out=where,
        here=Path.cwd(),
        cores=cores_each(prepared.jobs or cores()),
        gpus=prepared.gpus,
        jobs=prepared.jobs,
    )
    (where / "logs").mkdir(parents=True, exist_ok=True)
    path = where / slurm.NAME
    with whole_files.telling(path):
        whole_files.write(path, text)
    for note in prepared.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{len(prepared.left)} of {len(prepared.runs)} runs are left", file=sys.stderr)
    print(f"next:     sbatch {quoted(path)}")
    print("          and the command of now once more when it is done: it says what became of the runs")
    return True
