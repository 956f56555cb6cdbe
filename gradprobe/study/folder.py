"""The folder of a study: where each run lies, and how far it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gradprobe.errors import RunFileError
from gradprobe.runfile import Run, live
from gradprobe.study.arms import Planned
from gradprobe.trainers.paths import Paths

ABSENT, BEGUN, RESUMABLE, RECORDING, FINISHED = "absent", "begun", "resumable", "recording", "finished"

_EPOCH = re.compile(rb"^epoch (\d+)/(\d+) on val", re.MULTILINE)


@dataclass(frozen=True)
class Folder:
    """Names of files."""

    path: Path

    def run(self, planned: Planned) -> Path:
        """The run file."""
        return self.path / f"{planned.name}.h5"

    def source(self, planned: Planned) -> Path:
        """The run file that a run is made from."""
        return self.path / f"{planned.source}.h5"

    def log(self, planned: Planned) -> Path:
        """What the run said."""
        return self.path / "logs" / f"{planned.name}.log"

    @property
    def plan(self) -> Path:
        """What was fixed before."""
        return self.path / "plan.json"

    @property
    def results(self) -> Path:
        """What became of every run."""
        return self.path / "results.json"


def state(path: Path) -> str:
    """How far a run is, from its file.

    ``absent``; ``recording`` (another process is at it); ``finished``; ``resumable`` (it stopped, and can be gone on
    with); ``begun`` (it stopped, and has to be recorded anew).
    """
    if live.being_recorded(path):
        return RECORDING
    if not path.exists():
        return ABSENT
    try:
        with Run(path) as run:
            if run.end == "finished":
                return FINISHED
    except RunFileError:
        return BEGUN
    return RESUMABLE if Paths(path).checkpoint.exists() else BEGUN


def progress(log: Path) -> float:
    """The part of a run that is done, by the epochs that its log tells of; 0 where it tells of none."""
    try:
        found = _EPOCH.findall(log.read_bytes())
    except OSError:
        return 0.0
    return min(int(found[-1][0]) / int(found[-1][1]), 1.0) if found else 0.0
