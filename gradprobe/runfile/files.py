"""Files that appear whole or not at all.

HDF5 crashes the interpreter when a disk fills under it, and a file that is appended to in place is unreadable
after a kill at the wrong moment. So HDF5 never meets the disk here: it writes through :class:`CarefulFile`,
which keeps an error to itself until HDF5 is done, into a temporary file that is renamed when it is complete.

Every change of the file system goes through one :class:`Disk`, so that tests can stop the world at each of them.
"""

from __future__ import annotations

import io
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py

from gradprobe.runfile.sums import seal


class Disk:
    """The operations on files that a writer is made of, each a thin name for the system's."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)

    def create_lock(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        # pwrite: a position in the file would be shared with forked children
        if hasattr(os, "pwrite"):
            return os.pwrite(descriptor, data, offset)
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)

    def read(self, descriptor: int, count: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(descriptor, count, offset)
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, count)

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        source.replace(target)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def mkdir(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def sync_folder(self, folder: Path) -> None:
        """Make renames in ``folder`` survive a loss of power, where the system can."""
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def free(self, folder: Path) -> int:
        """Bytes that can still be written."""
        return shutil.disk_usage(folder).free


class CarefulFile(io.RawIOBase):
    """A file for h5py's file-object driver that remembers a failure instead of raising it.

    HDF5 cannot cope with a write that fails while it closes a file; we look at ``error`` afterwards and
    throw the temporary file away. In a forked child it writes nothing: HDF5 closes there, at exit, what it
    inherited half written.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self._disk = disk
        self._descriptor = disk.create(path)
        self._process = os.getpid()
        self._position = self._size = 0
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = b""
        try:
            while len(data) < len(view):
                more = self._disk.read(self._descriptor, len(view) - len(data), self._position + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            self.error = self.error or error
        # What was never written reads as zeros, as in a sparse file.
        view[:] = data + bytes(len(view) - len(data))
        self._position += len(view)
        return len(view)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while self.error is None and done < len(view) and os.getpid() == self._process:
            try:
                done += self._disk.write(self._descriptor, view[done:], self._position + done)
            except OSError as error:
                self.error = error
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self._position if size is None else size
        self._size = size
        if os.getpid() == self._process and self.error is None:
            try:
                self._disk.truncate(self._descriptor, size)
            except OSError as error:
                self.error = error
        return size

    def flush(self) -> None:
        """Nothing to do: the file beneath is unbuffered, and HDF5 flushes more than it needs to."""

    def sync(self) -> None:
        """Bring the bytes to the disk, or raise the first error that any operation met."""
        if self.error is not None:
            raise self.error
        self._disk.sync(self._descriptor)

    def close(self) -> None:
        if not self.closed and os.getpid() == self._process:
            self._disk.close(self._descriptor)
        super().close()


def write_whole(path: Path, temporary: Path, fill: Callable[[h5py.File], None], disk: Disk) -> None:
    """Make an HDF5 file at ``path`` that is either complete or not there.

    Args:
        path: Replaced if it exists; the old content stays until the new one is on the disk.
        temporary: Where it is made; on the same disk. Removed if it cannot be completed.
        fill: Writes the content.
        disk: Where all this happens.

    Raises:
        OSError: The disk is full or gone. ``path`` is as it was.
    """
    try:
        raw = CarefulFile(temporary, disk)
        try:
            # v108..v110: what the h5dump and netCDF of today's distributions can open.
            with _no_fork:
                file = h5py.File(raw, "w", libver=("v108", "v110"))
                _half_written.append(file)
            try:
                fill(file)
            finally:
                with _no_fork:
                    file.close()
                    _half_written.remove(file)
            seal(raw)
            raw.sync()
        finally:
            raw.close()
        disk.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            disk.unlink(temporary)
        raise
    disk.sync_folder(path.parent)


_half_written: list[h5py.File] = []
_no_fork = threading.RLock()


def _in_child() -> None:
    """In a forked child: close what is half written there, into nothing.

    At the child's exit HDF5 would close it through Python objects that are gone by then, and crash. h5py sees to it
    that no call into HDF5 is under way during a fork.
    """
    for file in _half_written:
        with suppress(Exception):
            file.close()
    _half_written.clear()
    _no_fork.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_in_child)
