"""Whether somebody is recording into a run now, found out without getting in the way."""

from __future__ import annotations

import time
from pathlib import Path

from gradprobe.runfile import parts
from gradprobe.runfile.reader import Run

LOCKS = Path("/proc/locks")

RECORDING, ENDED, STOPPED, UNKNOWN = "recording", "ended", "stopped", "unknown"


def lock_path(path: Path) -> Path:
    """The file that the recording process holds a lock on."""
    return parts.folder(path) / "lock"


def being_recorded(path: Path) -> bool | None:
    """Whether a process holds the run's lock; None where the system does not tell."""
    found = holders(lock_path(path))  # which the recording process makes first and removes last
    return None if found is None else bool(found)


def holders(lock: Path) -> list[int] | None:
    """The processes that took a lock on a file which is held now; none where there is no file; None: nobody tells.

    The kernel's list is read. Trying the lock would keep a writer out that starts at that very moment.
    """
    try:
        inode = str(lock.stat().st_ino)
    except OSError:
        return []
    try:
        lines = LOCKS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    held = [fields[5:7] if fields[1] == "->" else fields[4:6] for fields in map(str.split, lines) if "FLOCK" in fields]
    return [int(process) for process, place in held if place.rsplit(":", 1)[-1] == inode]


def state(run: Run) -> str:
    """``recording``; ``ended`` (the file says how); ``stopped``: killed before it could say so; or ``unknown``."""
    if run.complete:
        return ENDED
    held = being_recorded(run.path)
    return UNKNOWN if held is None else RECORDING if held else STOPPED


def age(run: Run) -> float:
    """Seconds since the last row reached the disk."""
    return max(0.0, time.time() - run.changed)
