"""Start the processes of one recording, by torch's own launcher: what ``torchrun`` runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import gradprobe
from gradprobe.errors import UsageError

INTERRUPTED = 130


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``gradprobe ARGUMENTS`` in several processes of this machine and wait for them.

    Where one fails the others are stopped, politely at first, so that the first of them closes its file. A Ctrl-C, or a
    polite kill, is handed on to all.

    Returns:
        0, or the exit code of the process that failed first; 130 where they were stopped.

    Raises:
        UsageError: This torch has no torch.distributed.
    """
    import torch.distributed

    if not torch.distributed.is_available():
        raise UsageError(f"--processes {processes}: the installed torch has no torch.distributed.")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Threads that outnumber the cores make every process wait for the others.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"gradprobe-{os.getpid()}",
        rdzv_endpoint="localhost:0",
        rdzv_backend="c10d",
        max_restarts=0,
        monitor_interval=0.1,
    )
    _be_quiet()
    # By its path: `-m gradprobe` would take a folder of that name that lies in the present one.
    command = str(Path(gradprobe.__file__).with_name("__main__.py"))
    try:
        elastic_launch(config, sys.executable)(command, *arguments)
    except ChildFailedError as error:
        return _exit_code(error.get_first_failure()[1].exitcode)
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    return 0


def _exit_code(code: int) -> int:
    """Of a process that a signal ended: what a shell says."""
    return code if code >= 0 else (INTERRUPTED if code in (-signal.SIGINT, -signal.SIGTERM) else 128 - code)


def _be_quiet() -> None:
    """The launcher logs what each process says itself."""
    import logging

    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
