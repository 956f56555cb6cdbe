"""Runs the runs of a study on a cluster: Ray, watched from here, or Slurm, by the script of an array job.

A worker of Ray only starts ``gradprobe record`` and waits for it, so that a run's file is what a run on this
machine writes. The folder of the study has to lie where every node sees it under the same path; a node that does not
see the plan there starts nothing. Of the script, whatever a name or a flag holds, it is one word of one line: nothing
in it is run, and none of it is a line of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradprobe.errors import GradprobeError, UsageError
from gradprobe.foreign import quoted
from gradprobe.study.arms import Planned, chains
from gradprobe.study.runner import PATIENCE, Launcher, end, start, threads

__all__ = ["SLURM_SCRIPT", "at_a_time", "connect_ray", "cores_per_run", "ray_nodes", "ray_tasks", "slurm_script"]


_LOST = 1
"""Exit code of a run whose worker is gone."""

_STOPPED = 130

_PAUSE = 0.2
"""Seconds between two looks at a run."""

REACH = 10.0
"""Seconds in which a cluster has to answer."""


def connect_ray() -> None:
    """Join the cluster of ``RAY_ADDRESS``, or the one that runs here; where there is none, start one on this machine.

    Raises:
        UsageError: Ray is not installed.
        GradprobeError: The cluster cannot be joined.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--engine ray: {error}. Install it: pip install 'gradprobe[ray]'.") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a measurement tells nobody that it is made
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray will do anyway, and warns of until then
    _reach(os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(log_to_driver=False, logging_level="error", ignore_reinit_error=True)
    except Exception as error:  # of many classes, those of gRPC among them
        raise GradprobeError(f"--engine ray: the cluster cannot be joined: {error}") from error


def _reach(address: str) -> None:
    """Whether somebody answers there: Ray itself ends the process where nobody does."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():  # "auto", "local", or nothing
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH).close()
    except OSError as error:
        raise GradprobeError(
            f"--engine ray: RAY_ADDRESS={address}: no cluster answers there ({error}). Start one with "
            "ray start --head, or unset RAY_ADDRESS to use this machine."
        ) from None


_Node = Mapping[str, float]
"""What a node has, as Ray names it: ``CPU``, ``GPU``."""


def ray_nodes() -> list[_Node]:
    """Nodes of the cluster that are alive."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def at_a_time(have: Sequence[_Node], gpus: int, jobs: int | None) -> int:
    """How many runs at a time: as asked, or one on each core, or on as many GPUs as a run takes.

    Args:
        have: What each node has.
        gpus: That a run takes.
        jobs: What was asked for.

    Raises:
        UsageError: A run takes more GPUs than any node has.
    """
    most = max((node.get("GPU", 0) for node in have), default=0)
    if gpus > most:
        raise UsageError(
            f"--device asks for {gpus} GPUs for each run; no node of the cluster has more than {most:g}. "
            "Use --device cpu."
        )
    return jobs or max(1, _room(have, 1, gpus))


def cores_per_run(have: Sequence[_Node], gpus: int, jobs: int) -> int:
    """Cores of a run: as many as let the nodes hold so many runs at a time, each run on one node; at least 1."""
    jobs = max(1, min(jobs, _room(have, 1, gpus)))  # more than that wait for their turn
    most = int(sum(node.get("CPU", 0) for node in have)) // jobs
    return next((cores for cores in range(most, 1, -1) if _room(have, cores, gpus) >= jobs), 1)


def _room(have: Sequence[_Node], cores: int, gpus: int) -> int:
    """How many runs of so many cores and GPUs the nodes hold."""
    wanted = {"CPU": cores, **({"GPU": gpus} if gpus else {})}
    return int(sum(min(node.get(name, 0) // each for name, each in wanted.items()) for node in have))


class _Task:
    """A run on the cluster, as the study sees it."""

    def __init__(self, reference: Any, log: os.PathLike[str]) -> None:
        self.reference, self.log = reference, Path(log)

    def poll(self) -> int | None:
        """Its exit code; None while it waits for its turn, or goes on."""
        import ray

        ended, _ = ray.wait([self.reference], timeout=0)
        return self.wait() if ended else None

    def terminate(self) -> None:
        """Ask the run to close its file."""
        import ray

        ray.cancel(self.reference)

    def kill(self) -> None:
        """End its worker."""
        import ray

        ray.cancel(self.reference, force=True)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; what became of a worker that is gone is written into the log.

        Raises:
            subprocess.TimeoutExpired: It goes on.
        """
        import ray

        try:
            return int(ray.get(self.reference, timeout=timeout))
        except ray.exceptions.GetTimeoutError:
            raise subprocess.TimeoutExpired(str(self.log), timeout or 0) from None
        except ray.exceptions.TaskCancelledError:
            return _STOPPED
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            with self.log.open("a", encoding="utf-8") as output:
                output.write(f"gradprobe: {reason}\n")
            return _LOST


def ray_tasks(plan: Path, cores: int, gpus: int) -> Launcher:
    """Starts each run on the cluster, with as many cores and GPUs of a node.

    Args:
        plan: That of the study; a node that does not see it sees another folder.
        cores: Threads of each run, and what it takes of a node.
        gpus: That each takes.
    """
    import ray

    # A run that is lost is for the study to try again, by resuming it: hence no retries.
    remote = ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=0)(record_on_node)
    here, fixed = Path.cwd(), plan.read_text(encoding="utf-8")
    # Ray gives every worker its own OMP_NUM_THREADS; the user's, set here, comes first, as elsewhere.
    environment = threads(cores, os.environ)

    def launch(words: Sequence[str], log: os.PathLike[str]) -> _Task:
        reference = remote.remote(list(words), str(log), str(here), (str(plan), fixed), environment)
        return _Task(reference, log)

    return launch


def record_on_node(
    words: Sequence[str], log: str, folder: str, plan: tuple[str, str], environment: Mapping[str, str]
) -> int:
    """Run ``gradprobe`` with these words, on the node where this is called; returns its exit code.

    Args:
        words: Behind ``gradprobe``.
        log: What it says goes behind what is in there.
        folder: In which to run it.
        plan: Where the plan lies, and its text.
        environment: What else is set there.

    Raises:
        GradprobeError: The node does not see the study's folder.
    """
    path = Path(folder, plan[0])
    try:
        seen = path.read_text(encoding="utf-8")
    except OSError as error:
        seen, why = "", f"{error.strerror}"
    else:
        why = "it holds another plan"
    if seen != plan[1]:
        raise GradprobeError(
            f"{os.uname().nodename}: {path}: {why}. Every node of the cluster has to see the folder of the study under "
            "the same path: let --out lie on a shared file system."
        )
    process = start(words, Path(folder, log), environment, Path(folder))
    try:
        while (code := process.poll()) is None:
            time.sleep(_PAUSE)  # waiting for good would not be broken by the KeyboardInterrupt with which Ray cancels
        return code
    except BaseException:
        process.terminate()
        end(process, PATIENCE)
        raise


SLURM_SCRIPT = "slurm.sh"

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


def slurm_script(
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
        script=quoted(out / SLURM_SCRIPT),
        runs="\n".join(quoted(",".join(run.name for run in chain)) for chain in lines),
        command=" ".join(map(quoted, words)),
        record=" ".join(map(quoted, record)),
    )
