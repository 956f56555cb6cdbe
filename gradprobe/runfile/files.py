"""Files that appear whole or not at all, and one writer at a time.

HDF5 crashes the interpreter when a disk fills under it, and a file that is appended to in place is unreadable
after a kill at the wrong moment. So HDF5 never meets the disk here: it writes through :class:`CarefulFile`,
which keeps an error to itself until HDF5 is done, into a temporary file that is renamed when it is complete.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py

from gradprobe.errors import RunFileError
from gradprobe.runfile.sums import seal

try:
    import fcntl
except ImportError:  # Windows: the lock file is then only a mark
    fcntl = None  # type: ignore[assignment]


class CarefulFile(io.RawIOBase):
    """A file for h5py's file-object driver that remembers a failed write instead of raising it.

    HDF5 cannot cope with a write that fails while it closes a file; we look at ``error`` afterwards and
    throw the temporary file away.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb+", buffering=0)
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        if count < len(buffer):  # what was never written reads as zeros, as in a sparse file
            memoryview(buffer).cast("B")[count:] = bytes(len(buffer) - count)
        return len(buffer)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while self.error is None and done < len(view):
            try:
                done += self._file.write(view[done:]) or 0
            except OSError as error:
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def flush(self) -> None:
        """Nothing to do: the file beneath is unbuffered, and HDF5 flushes more than it needs to."""

    def sync(self) -> None:
        """Bring the bytes to the disk, or raise the first error that any write met."""
        if self.error is not None:
            raise self.error
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()


def write_whole(path: Path, fill: Callable[[h5py.File], None]) -> None:
    """Make an HDF5 file at ``path`` that is either complete or not there.

    Args:
        path: Replaced if it exists; the old content stays until the new one is on the disk.
        fill: Writes the content.

    Raises:
        OSError: The disk is full or gone. ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        raw = CarefulFile(temporary)
        try:
            # v108..v110: what the h5dump and netCDF of today's distributions can open.
            with h5py.File(raw, "w", libver=("v108", "v110")) as file:
                fill(file)
            seal(raw)
            raw.sync()
        finally:
            raw.close()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a loss of power."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not every system lets a folder be opened
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


class Lock:
    """One writer per run: an advisory lock that ends with the process that holds it."""

    def __init__(self, path: Path, run: Path) -> None:
        self._file = path.open("a+")
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise RunFileError(
                f"{run}: another process is recording into this run. Choose another file with --out, or stop "
                "that process first."
            ) from None

    def release(self) -> None:
        """Let the next writer in."""
        self._file.close()
