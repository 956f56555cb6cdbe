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
    """Whether a process holds the run's lock; None where the system does not tell.

    The kernel's list is read. Trying the lock would keep a writer out that starts at that very moment.
    """
    try:
        inode = str(lock_path(path).stat().st_ino)
    except OSError:
        return False  # the recording process makes it first and removes it last
    try:
        lines = LOCKS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    held = [fields[6 if fields[1] == "->" else 5] for fields in map(str.split, lines) if "FLOCK" in fields]
    return any(place.rsplit(":", 1)[-1] == inode for place in held)


def state(run: Run) -> str:
    """``recording``; ``ended`` (the file says how); ``stopped``: killed before it could say so; or ``unknown``."""
    if run.complete:
        return ENDED
    held = being_recorded(run.path)
    return UNKNOWN if held is None else RECORDING if held else STOPPED


def age(run: Run) -> float:
    """Seconds since the last row reached the disk."""
    return max(0.0, time.time() - run.changed)
