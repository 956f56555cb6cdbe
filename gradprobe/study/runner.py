"""Runs the runs of a study, some at a time, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import gradprobe
from gradprobe.errors import GradprobeError, RunFileError
from gradprobe.study import folder
from gradprobe.study.arms import Planned
from gradprobe.study.folder import ABSENT, BEGUN, FINISHED, RECORDING, RESUMABLE, Folder
from gradprobe.trainers.registry import TRAINERS

__all__ = [
    "COMMAND",
    "DONE",
    "Entry",
    "FAILED",
    "Launcher",
    "RUNNING",
    "SKIPPED",
    "Study",
    "cores",
    "cores_each",
    "subprocesses",
]


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

COMMAND = (sys.executable, str(Path(gradprobe.__file__).with_name("__main__.py")))
"""``gradprobe`` by its path: ``-m`` would take what is called so in the present folder."""

_WAITING, RUNNING, DONE, SKIPPED, FAILED = "waiting", "running", "done", "there already", "failed"

_UNREADABLE = 3
"""The exit code of ``record --resume`` where there is nothing to go on from."""

PATIENCE = 60.0
"""Seconds that runs are given to close their files when the study is stopped."""

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""That stop a study."""


class BusyError(GradprobeError):
    """Another process has begun to record the run."""


class Process(Protocol):
    """A run under way; :class:`subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Its exit code; None while it goes on."""

    def terminate(self) -> None:
        """Ask the process to close its file and stop."""

    def kill(self) -> None:
        """End the process at once."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process; its exit code."""


class Launcher(Protocol):
    """Starts runs."""

    def __call__(self, words: Sequence[str], log: os.PathLike[str]) -> Process:
        """Start ``gradprobe`` with these words; its output is appended to ``log``, which a new run empties.

        Raises:
            BusyError: Another process has begun to record the run.
        """


@dataclass
class Entry:
    """One run and what became of it.

    Attributes:
        run: Which.
        state: ``waiting``, ``running``, ``done``, ``there already`` or ``failed``.
        reason: Why it failed.
        seconds: How long it took.
        began: When it was started.
        process: While it runs.
        anew: Whether it is to be recorded from its beginning, whatever is there.
        recorders: The processes that were found recording it, if any were.
    """

    run: Planned
    state: str = _WAITING
    reason: str = ""
    seconds: float = 0.0
    began: float = 0.0
    process: Process | None = None
    anew: bool = False
    recorders: list[int] = field(default_factory=list)


class _StudyWatcher(Protocol):
    """Follows the progress of a study."""

    def began(self, entry: Entry) -> None:
        """A run was started."""

    def ended(self, entry: Entry) -> None:
        """A run is done, was there already, or failed."""

    def waits(self, entry: Entry) -> None:
        """Others record a run, and are let go on."""

    def going_on(self, entries: Sequence[Entry], done: float) -> None:
        """Called often; ``done`` is in runs, parts of those under way included."""


@dataclass
class Study:
    """All that is to be run.

    Attributes:
        runs: In order.
        where: The folder.
        common: Flags of every run.
        jobs: How many at a time.
        launch: Starts one.
        plan: What was fixed.
        pause: Seconds between two looks.
    """

    runs: Sequence[Planned]
    where: Folder
    common: Sequence[str]
    jobs: int
    launch: Launcher
    plan: Mapping[str, Any] = field(default_factory=dict)
    pause: float = 0.2
    entries: list[Entry] = field(init=False)

    def __post_init__(self) -> None:
        self.entries = [Entry(run) for run in self.runs]

    def run(self, watcher: _StudyWatcher) -> list[Entry]:
        """Run all that is not there yet; a failure stops no other run.

        Raises:
            KeyboardInterrupt: Stopped; the runs under way have been asked to close their files, and waited for.
        """
        with _noted() as came:
            try:
                while any(entry.state in (_WAITING, RUNNING) for entry in self.entries):
                    self._look(watcher)
                    self._start(watcher)
                    watcher.going_on(self.entries, self._done())
                    if came:  # here alone: no process has been started that is not known yet
                        raise KeyboardInterrupt
                    time.sleep(self.pause)
            except BaseException:
                self._stop()
                raise
        return self.entries

    def _look(self, watcher: _StudyWatcher) -> None:
        """Take note of the runs that have ended since the last look."""
        for entry in self.entries:
            if entry.process is None or (code := entry.process.poll()) is None:
                continue
            entry.process, entry.seconds = None, time.monotonic() - entry.began
            self._settle(entry, code)
            if entry.state != _WAITING:
                watcher.ended(entry)

    def _settle(self, entry: Entry, code: int) -> None:
        state = folder.state(self.where.run(entry.run))
        if code == _UNREADABLE and not entry.anew and state in (BEGUN, RESUMABLE):
            entry.state, entry.anew = _WAITING, True  # its checkpoint is of no use
        elif code == 0 and state == FINISHED:
            entry.state = DONE
        elif state == RECORDING or (code == _UNREADABLE and state == FINISHED):
            entry.state, entry.anew = _WAITING, False  # another study was faster, or only what started it was killed
        else:
            entry.state, entry.reason = FAILED, f"exit code {code}; {_last_line(self.where, entry.run)}"

    def _start(self, watcher: _StudyWatcher) -> None:
        """Start as many of the waiting runs as there is room for."""
        for entry in self.entries:
            if sum(other.state == RUNNING for other in self.entries) >= self.jobs:
                return
            if entry.state != _WAITING:
                continue
            state = self.where.state(entry.run)
            if state == RECORDING:  # of a study that was killed, or another's: it is let go on
                self._wait(entry, watcher)
            elif reason := self._foreign(entry.run, state):
                entry.state, entry.reason = FAILED, reason
                watcher.ended(entry)
            elif state == FINISHED and not entry.anew:
                entry.state = SKIPPED
                watcher.ended(entry)
            elif self._ready(entry, watcher):
                self._launch(entry, BEGUN if entry.anew else state, watcher)

    def _wait(self, entry: Entry, watcher: _StudyWatcher) -> None:
        found = self.where.recorders(entry.run)
        if found and not entry.recorders:
            entry.recorders = found
            watcher.waits(entry)

    def _foreign(self, run: Planned, state: str) -> str:
        """Why the file that is there is left alone; empty: it is this run, or there is none."""
        path = self.where.run(run)
        if state == ABSENT:
            return ""
        try:
            reason = folder.stranger(path, run, self.plan)
        except RunFileError as error:
            reason = str(error).removeprefix(f"{path}: ").rstrip(".")
        return reason and f"{reason}. Move {path} away, and it is recorded again"

    def _ready(self, entry: Entry, watcher: _StudyWatcher) -> bool:
        """Whether the run that it is made from is there; without that it fails."""
        if not entry.run.source:
            return True
        source = next(other for other in self.entries if other.run.name == entry.run.source)
        if source.state == FAILED:
            entry.state, entry.reason = FAILED, f"not started: it is made from {source.run.name}, which failed"
            watcher.ended(entry)
        return source.state in (DONE, SKIPPED)

    def _launch(self, entry: Entry, state: str, watcher: _StudyWatcher) -> None:
        log = self.where.log(entry.run)
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            entry.process = self.launch(command(self.where, entry.run, self.common, state), log)
        except BusyError:  # a moment ago: the next look finds it being recorded
            return
        entry.state, entry.began = RUNNING, time.monotonic()
        watcher.began(entry)

    def _done(self) -> float:
        whole = sum(entry.state in (DONE, SKIPPED, FAILED) for entry in self.entries)
        return whole + sum(
            folder.progress(self.where.log(entry.run)) for entry in self.entries if entry.state == RUNNING
        )

    def _stop(self) -> None:
        running = [entry.process for entry in self.entries if entry.process is not None]
        for process in running:
            process.terminate()
        until = time.monotonic() + PATIENCE
        for process in running:
            end(process, until - time.monotonic())


def command(folder: Folder, run: Planned, common: Sequence[str], state: str = ABSENT) -> list[str]:
    """The words behind ``gradprobe`` that record one run.

    Args:
        folder: Where everything lies.
        run: Which.
        common: Flags of every run.
        state: Of its file, see :func:`gradprobe.study.folder.state`.
    """
    if state == RESUMABLE:
        own = [] if run.arm.trainer in TRAINERS else ["--trainer", run.arm.trainer]  # imported only where it is named
        return ["record", "--resume", str(folder.run(run)), *own]
    source = ["--from", str(folder.source(run))] if run.source else []
    return [
        *("record", "--trainer", run.arm.trainer, *source, *common, *run.arm.flags),
        *("--seed", str(run.seed), "--arm", run.arm.name),
        *("--plan", str(folder.plan), "--out", str(folder.run(run))),
        *(["--overwrite"] if state != ABSENT else []),
    ]


def end(process: Process, patience: float) -> None:
    """Wait for the end of a run that was asked to stop; its file is readable up to the last flush whatever comes."""
    try:
        process.wait(max(patience, 0.0))
    except subprocess.TimeoutExpired:
        process.kill()


@contextmanager
def _noted() -> Iterator[list[int]]:
    """Signals that are to stop the study, as they come; those that were ignored before still are."""
    came: list[int] = []
    old = {}
    try:
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                old[number] = signal.signal(number, lambda number, _: came.append(number))
    except ValueError:  # not in the main thread
        pass
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def subprocesses(jobs: int) -> Launcher:
    """Starts each run in a process of its own, the machine's cores divided among ``jobs``."""
    environment = threads(cores_each(jobs), os.environ)

    def launch(words: Sequence[str], log: os.PathLike[str]) -> Process:
        return start(words, Path(log), environment)

    return launch


def start(
    words: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start ``gradprobe`` with these words on this machine.

    Args:
        words: Behind ``gradprobe``.
        log: What it says goes behind what is in there, or anew with a new run. It is locked until the run ends,
            whatever becomes of this process: so nobody starts the run a second time, before it has a file, either.
        environment: What is set beside, or instead of, what this process has.
        folder: In which to run it; None: where this process runs.

    Raises:
        BusyError: Another process has begun to record the run.
    """
    with log.open("ab") as output:
        _lock(output.fileno(), log)
        if "--resume" not in words:
            output.truncate(0)
        return subprocess.Popen(
            [*COMMAND, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **environment},
        )


def _lock(descriptor: int, log: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(f"{log}: another process has begun to record this run.") from None
    except OSError:  # some network file systems have no locks; that of the run file says so
        return


def threads(each: int, given: Mapping[str, str]) -> dict[str, str]:
    """Environment variables with the number of threads of a run; those of the user stay.

    Args:
        each: That many.
        given: The user's environment.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: given.get(name, str(each)) for name in names} | {
        # threads that spin while they wait take the cores from the other runs
        "OMP_WAIT_POLICY": given.get("OMP_WAIT_POLICY", "PASSIVE")
    }


def cores_each(jobs: int) -> int:
    """Cores of this machine that each of so many runs may use."""
    return max(1, cores() // jobs)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _last_line(where: Folder, run: Planned) -> str:
    try:
        lines = where.log(run).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "its log is empty"
    last = [line for line in lines if line.startswith("gradprobe:")] or [line for line in lines if line.strip()]
    return last[-1].removeprefix("gradprobe: ") if last else "its log is empty"
