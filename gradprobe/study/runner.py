"""Runs the runs of a study, some at a time, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gradprobe.study import commands, folder
from gradprobe.study.arms import Planned
from gradprobe.study.folder import ABSENT, BEGUN, FINISHED, RECORDING, RESUMABLE, Folder

WAITING, RUNNING, DONE, SKIPPED, FAILED = "waiting", "running", "done", "there already", "failed"

UNREADABLE = 3
"""The exit code of ``record --resume`` where there is nothing to go on from."""

PATIENCE = 60.0
"""Seconds that a run is given to close its file when the study is stopped."""


class Process(Protocol):
    """A run under way; :class:`subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Its exit code; None while it goes on."""

    def terminate(self) -> None:
        """Ask it to stop, with its file closed."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""


class Launcher(Protocol):
    """Starts runs."""

    def __call__(self, words: Sequence[str], log: os.PathLike[str]) -> Process:
        """Start ``gradprobe`` with these words; what it says goes behind what is in ``log``."""


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
    """

    run: Planned
    state: str = WAITING
    reason: str = ""
    seconds: float = 0.0
    began: float = 0.0
    process: Process | None = None
    anew: bool = False


class Watcher(Protocol):
    """Is told how far the study is."""

    def began(self, entry: Entry) -> None:
        """A run was started."""

    def ended(self, entry: Entry) -> None:
        """A run is done, was there already, or failed."""

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
        pause: Seconds between two looks.
    """

    runs: Sequence[Planned]
    where: Folder
    common: Sequence[str]
    jobs: int
    launch: Launcher
    pause: float = 0.2
    entries: list[Entry] = field(init=False)

    def __post_init__(self) -> None:
        self.entries = [Entry(run) for run in self.runs]

    def run(self, watcher: Watcher) -> list[Entry]:
        """Run all that is not there yet; a failure stops no other run.

        Raises:
            KeyboardInterrupt: Stopped; the runs under way have been asked to close their files, and waited for.
        """
        try:
            while any(entry.state in (WAITING, RUNNING) for entry in self.entries):
                self._look(watcher)
                self._start(watcher)
                watcher.going_on(self.entries, self._done())
                time.sleep(self.pause)
        except BaseException:
            self._stop()
            raise
        return self.entries

    def _look(self, watcher: Watcher) -> None:
        """What has ended since."""
        for entry in self.entries:
            if entry.process is None or (code := entry.process.poll()) is None:
                continue
            entry.process, entry.seconds = None, time.monotonic() - entry.began
            self._settle(entry, code)
            if entry.state != WAITING:
                watcher.ended(entry)

    def _settle(self, entry: Entry, code: int) -> None:
        state = folder.state(self.where.run(entry.run))
        if code == UNREADABLE and not entry.anew and state in (BEGUN, RESUMABLE):
            entry.state, entry.anew = WAITING, True  # its checkpoint is of no use
        elif code == 0 and state == FINISHED:
            entry.state = DONE
        elif state == RECORDING or (code == UNREADABLE and state == FINISHED):
            entry.state, entry.anew = WAITING, False  # another study was faster, or only what started it was killed
        else:
            entry.state, entry.reason = FAILED, f"exit code {code}; {_last_line(self.where, entry.run)}"

    def _start(self, watcher: Watcher) -> None:
        """As many as there is room for."""
        for entry in self.entries:
            if sum(other.state == RUNNING for other in self.entries) >= self.jobs:
                return
            if entry.state != WAITING:
                continue
            state = folder.state(self.where.run(entry.run))
            if state == RECORDING:  # of a study that was killed, or another's: it is let go on
                continue
            if state == FINISHED and not entry.anew:
                entry.state = SKIPPED
                watcher.ended(entry)
            elif self._ready(entry, watcher):
                self._launch(entry, BEGUN if entry.anew else state)
                watcher.began(entry)

    def _ready(self, entry: Entry, watcher: Watcher) -> bool:
        """Whether the run that it is made from is there; without that it fails."""
        if not entry.run.source:
            return True
        source = next(other for other in self.entries if other.run.name == entry.run.source)
        if source.state == FAILED:
            entry.state, entry.reason = FAILED, f"not started: it is made from {source.run.name}, which failed"
            watcher.ended(entry)
        return source.state in (DONE, SKIPPED)

    def _launch(self, entry: Entry, state: str) -> None:
        log = self.where.log(entry.run)
        log.parent.mkdir(parents=True, exist_ok=True)
        if state in (ABSENT, BEGUN):
            log.unlink(missing_ok=True)
        entry.state, entry.began = RUNNING, time.monotonic()
        entry.process = self.launch(commands.record(self.where, entry.run, self.common, state), log)

    def _done(self) -> float:
        whole = sum(entry.state in (DONE, SKIPPED, FAILED) for entry in self.entries)
        return whole + sum(
            folder.progress(self.where.log(entry.run)) for entry in self.entries if entry.state == RUNNING
        )

    def _stop(self) -> None:
        running = [entry.process for entry in self.entries if entry.process is not None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:  # its file is readable up to the last flush whatever happens to it
                continue


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
        log: What it says goes behind what is in there.
        environment: What is set beside, or instead of, what this process has.
        folder: In which to run it; None: where this process runs.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "gradprobe", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **environment},
        )


def threads(each: int, given: Mapping[str, str]) -> dict[str, str]:
    """What tells a run how many threads it may use; what the user has set stays.

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
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _last_line(where: Folder, run: Planned) -> str:
    try:
        lines = where.log(run).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it said nothing"
    told = [line for line in lines if line.startswith("gradprobe:")] or [line for line in lines if line.strip()]
    return told[-1].removeprefix("gradprobe: ") if told else "it said nothing"
