"""The folder of a study: where each run lies, and how far it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradprobe.errors import RunFileError
from gradprobe.runfile import Run, lock, storable
from gradprobe.runfile.untrusted import printable
from gradprobe.study.arms import Planned
from gradprobe.trainers.paths import Paths

ABSENT, BEGUN, RESUMABLE, RECORDING, FINISHED = "absent", "begun", "resumable", "recording", "finished"
_UNREADABLE = "unreadable"

_EPOCH = re.compile(rb"^epoch (\d+)/(\d+) on val", re.MULTILINE)


@dataclass(frozen=True)
class Folder:
    """Where a study keeps the files of its runs."""

    path: Path

    def run(self, planned: Planned) -> Path:
        """The run file."""
        return self.path / f"{planned.name}.h5"

    def source(self, planned: Planned) -> Path:
        """The run file that a run is made from."""
        return self.path / f"{planned.source}.h5"

    def log(self, planned: Planned) -> Path:
        """The log of the run."""
        return self.path / "logs" / f"{planned.name}.log"

    @property
    def plan(self) -> Path:
        """The file that says what was fixed before the first run."""
        return self.path / "plan.json"

    @property
    def results(self) -> Path:
        """The file that says what became of every run."""
        return self.path / "results.json"

    def state(self, planned: Planned) -> str:
        """How far a run is, see :func:`state`; a process that has only begun to start locks no more than its log."""
        return RECORDING if lock.holders(self.log(planned)) else state(self.run(planned))

    def recorders(self, planned: Planned) -> list[int]:
        """The processes that record a run, as far as the system tells."""
        return lock.holders(lock.lock_path(self.run(planned))) or lock.holders(self.log(planned)) or []


def state(path: Path) -> str:
    """How far a run is, from its file.

    ``absent``; ``recording`` (another process is at it); ``finished``; ``resumable`` (it stopped, and can be gone on
    with); ``begun`` (it stopped, and has to be recorded anew); ``unreadable`` (it may be anything, and is left alone).
    """
    if lock.being_recorded(path):
        return RECORDING
    if not path.exists():
        return ABSENT
    try:
        with Run(path) as run:
            if run.end == "finished":
                return FINISHED
    except RunFileError:
        return _UNREADABLE
    return RESUMABLE if Paths(path).checkpoint.exists() else BEGUN


def progress(log: Path) -> float:
    """The part of a run that is done, by the epochs that its log tells of; 0 where it tells of none."""
    try:
        found = _EPOCH.findall(log.read_bytes())
    except OSError:
        return 0.0
    return min(int(found[-1][0]) / int(found[-1][1]), 1.0) if found else 0.0


def stranger(path: Path, planned: Planned, plan: Mapping[str, Any]) -> str:
    """Why a run file is not this run of this study; empty: it is.

    Args:
        path: The file.
        planned: Which run it should be.
        plan: What was fixed.

    Raises:
        RunFileError: It cannot be read.
    """
    with Run(path) as run:
        told = run.provenance
    wanted: dict[str, Any] = {"arm": planned.arm.name, "settings.seed": planned.seed}
    wanted |= {f"plan.{name}": _as_read(value) for name, value in storable.provenance(plan).items()}
    other = [name for name, value in wanted.items() if told.get(name) != value]
    return f"it is no run of this study: its {other[0]} is {told.get(other[0])!r}" if other else ""


def _as_read(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_read(each) for each in value]
    return printable(value) if isinstance(value, str) else value
