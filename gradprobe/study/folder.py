"""The folder of a study: where each run lies, how far it is, and whether the runs agree as they should."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.errors import RunFileError
from gradprobe.runfile import Run, lock, schema, storable
from gradprobe.runfile.untrusted import printable
from gradprobe.study.arms import Planned
from gradprobe.trainers.paths import Paths

__all__ = ["FINISHED", "Folder", "differing", "unequal"]


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
        """The processes that record a run, as far as the system shows them."""
        return lock.holders(lock.lock_path(self.run(planned))) or lock.holders(self.log(planned)) or []


def state(path: Path) -> str:
    """How far a run is, from its file.

    ``absent``; ``recording`` (another process is at it); ``finished``; ``resumable`` (it stopped, and can be continued
    with); ``begun`` (it stopped, and has to be recorded again); ``unreadable`` (it may be anything, and stays).
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
    """The part of a run that is done, by the last epoch in its log; 0 without one."""
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
        recorded = run.provenance
    wanted: dict[str, Any] = {"arm": planned.arm.name, "settings.seed": planned.seed}
    wanted |= {f"plan.{name}": _as_read(value) for name, value in storable.provenance(plan).items()}
    other = [name for name, value in wanted.items() if recorded.get(name) != value]
    return f"it is no run of this study: its {other[0]} is {recorded.get(other[0])!r}" if other else ""


def _as_read(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_read(each) for each in value]
    return printable(value) if isinstance(value, str) else value


SAME = ("data.fingerprint", "model.reference", "batches.hash", "batches.count")
"""Provenance that has to be equal in all runs of a seed."""

_TIMES = ("time", "overhead")


def unequal(paths: Sequence[Path]) -> list[str]:
    """Names among :data:`SAME` in which the runs of one seed differ, or which one of them does not tell."""
    recorded: list[dict[str, Any]] = []
    for path in paths:
        with Run(path) as run:
            recorded.append({name: run.provenance.get(name) for name in SAME})
    return [name for name in SAME if any(one[name] is None or one[name] != recorded[0][name] for one in recorded)]


def differing(one: Path, other: Path) -> list[str]:
    """Names of what differs between two recordings of the same run, bit for bit; nothing: they are identical.

    Times are left out, and where the files come from.
    """
    with Run(one) as a, Run(other) as b:
        names = sorted({*a.names(), *b.names()})
        skipped = {table.path(name) for table in schema.TABLES for name in _TIMES}
        found = [name for name in names if name not in skipped and not _equal(a, b, name)]
        values = [{**_tested(run), **_epochs(run)} for run in (a, b)]
    found += sorted(name for name in {**values[0], **values[1]} if not _same(values[0].get(name), values[1].get(name)))
    return found


def _equal(a: Run, b: Run, name: str) -> bool:
    return name in a and name in b and _same(a[name], b[name])


def _same(one: Any, other: Any) -> bool:
    first, second = np.asarray(one), np.asarray(other)
    if first.dtype.kind != "f":
        return bool(np.array_equal(first, second))
    return first.shape == second.shape and first.tobytes() == second.tobytes()


def _tested(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.provenance.items() if name.startswith(("test.", "batches."))}


def _epochs(run: Run) -> dict[str, Any]:
    return {f"epochs/{name}": values for name, values in run.epochs.items()}
