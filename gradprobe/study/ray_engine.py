"""Runs the runs of a study on a Ray cluster.

A worker of the cluster only starts ``gradprobe record`` and waits for it, so that a run's file is what a run on this
machine writes. The folder of the study has to lie where every node sees it under the same path; a node that does not
see the plan there starts nothing.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradprobe.errors import GradprobeError, UsageError
from gradprobe.study.runner import PATIENCE, Launcher, end, start, threads

_LOST = 1
"""Exit code of a run whose worker is gone."""

_STOPPED = 130

_PAUSE = 0.2
"""Seconds between two looks at a run."""

REACH = 10.0
"""Seconds in which a cluster has to answer."""


def connect() -> None:
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


Node = Mapping[str, float]
"""What a node has, as Ray names it: ``CPU``, ``GPU``."""


def nodes() -> list[Node]:
    """Nodes of the cluster that are alive."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def at_a_time(have: Sequence[Node], gpus: int, jobs: int | None) -> int:
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


def cores_each(have: Sequence[Node], gpus: int, jobs: int) -> int:
    """Cores of a run: as many as let the nodes hold so many runs at a time, each run on one node; at least 1."""
    jobs = max(1, min(jobs, _room(have, 1, gpus)))  # more than that wait for their turn
    most = int(sum(node.get("CPU", 0) for node in have)) // jobs
    return next((cores for cores in range(most, 1, -1) if _room(have, cores, gpus) >= jobs), 1)


def _room(have: Sequence[Node], cores: int, gpus: int) -> int:
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
            told = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            with self.log.open("a", encoding="utf-8") as output:
                output.write(f"gradprobe: {told}\n")
            return _LOST


def tasks(plan: Path, cores: int, gpus: int) -> Launcher:
    """Starts each run on the cluster, with as many cores and GPUs of a node.

    Args:
        plan: That of the study; a node that does not see it sees another folder.
        cores: Threads of each run, and what it takes of a node.
        gpus: That each takes.
    """
    import ray

    # A run that is lost is for the study to try again, by resuming it: hence no retries.
    remote = ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=0)(record)
    here, fixed = Path.cwd(), plan.read_text(encoding="utf-8")
    # Ray gives every worker its own OMP_NUM_THREADS; the user's, set here, comes first, as elsewhere.
    environment = threads(cores, os.environ)

    def launch(words: Sequence[str], log: os.PathLike[str]) -> _Task:
        reference = remote.remote(list(words), str(log), str(here), (str(plan), fixed), environment)
        return _Task(reference, log)

    return launch


def record(words: Sequence[str], log: str, folder: str, plan: tuple[str, str], environment: Mapping[str, str]) -> int:
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
