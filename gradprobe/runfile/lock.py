"""Who records into a run now: a lock that ends with the process that holds it, and how others see it."""

from __future__ import annotations

import errno
import logging
import os
import time
import weakref
from contextlib import suppress
from pathlib import Path

from gradprobe.errors import RunFileError
from gradprobe.runfile.pieces import parts_folder
from gradprobe.runfile.reader import Run
from gradprobe.whole_files import Disk

__all__ = ["ENDED", "STOPPED", "being_recorded", "holders", "lock_path", "recording_state", "seconds_unchanged"]


try:
    import fcntl
except ImportError:  # Windows: the lock file is then only a mark
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("gradprobe")


class Lock:
    """One writer per run: an advisory lock that ends with the process that holds it.

    Args:
        path: The lock file.
        run: The run it is for; its folder is there.
        disk: Where it is made.

    Raises:
        RunFileError: Another process holds it.
        OSError: The lock file cannot be made.
    """

    def __init__(self, path: Path, run: Path, disk: Disk) -> None:
        self.path, self._run, self._disk = path, run, disk
        self._process, self._device = os.getpid(), run.parent.stat().st_dev
        self._descriptor = disk.create_lock(path)
        try:
            _lock(self._descriptor, run)
        except BaseException:
            disk.close(self._descriptor)
            raise
        _held.add(self)

    def is_current(self) -> bool:
        """Whether the locked file is still the one at its path: its last holder may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.lstat())
        except FileNotFoundError:
            return False

    def renew(self) -> bool:
        """Where the lock file was removed, make and hold it anew, with the folders that it takes; whether it was.

        Raises:
            RunFileError: Another process has begun to record into the run meanwhile.
            OSError: It cannot be made; or the disk is not there, but only the folder that it was mounted on.
        """
        if self.is_current():
            return False
        there = next(folder for folder in self._run.parents if folder.exists())
        if there.stat().st_dev != self._device:
            raise OSError(errno.ENODEV, "another disk is there than at the beginning", str(there))
        new = acquire(self._run, self.path.parent, self._disk)
        self._disk.close(self._descriptor)
        self._descriptor, new._descriptor = new._descriptor, -1
        return True

    def release(self) -> None:
        """Let the next writer in; children that inherited the lock do not keep it."""
        if self._descriptor < 0 or os.getpid() != self._process:
            return
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._disk.close(self._descriptor)
        self._descriptor = -1

    def forget(self) -> None:
        """In a forked child: let go of the copy, so that it does not outlive the parent's."""
        if self._descriptor >= 0:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = -1


def _lock(descriptor: int, run: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunFileError(
            f"{run}: is being recorded into already, by another process or by a probe of this one that was not "
            "closed. Choose another file with --out, or stop that process, or close that probe."
        ) from None
    except OSError as error:  # some network file systems have no locks
        _log.warning("%s: this file system has no locks (%s); see that nothing else records into this run", run, error)


def acquire(run: Path, folder: Path, disk: Disk) -> Lock:
    """Lock a run, whose parts lie in ``folder``; the folders are made if need be.

    Raises:
        RunFileError: Another process records into the run.
        OSError: There can be no file here.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(100):
        try:
            disk.mkdir(folder)
            if folder.is_symlink():  # which may lead to anything, that would be written into and swept
                raise OSError(errno.ELOOP, "it is a symbolic link, which a folder of parts never is", str(folder))
            lock = Lock(folder / "lock", run, disk)
        except FileNotFoundError:  # its last holder is just removing the folder
            if attempt == 99:
                raise
            time.sleep(0.01)
            continue
        if lock.is_current():
            return lock
        lock.release()
    raise OSError("the lock file is removed again and again")


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _in_child() -> None:
    for lock in list(_held):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


LOCKS = Path("/proc/locks")

RECORDING, ENDED, STOPPED, UNKNOWN = "recording", "ended", "stopped", "unknown"


def lock_path(path: Path) -> Path:
    """The file that the recording process holds a lock on."""
    return parts_folder(path) / "lock"


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


def recording_state(run: Run) -> str:
    """``recording``; ``ended`` (the file says how); ``stopped``: killed before it could say so; or ``unknown``."""
    if run.complete:
        return ENDED
    held = being_recorded(run.path)
    return UNKNOWN if held is None else RECORDING if held else STOPPED


def seconds_unchanged(run: Run) -> float:
    """Seconds since the last row reached the disk."""
    return max(0.0, time.time() - run.changed)
