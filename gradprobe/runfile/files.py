"""HDF5 files that appear whole or not at all.

HDF5 crashes the interpreter when a disk fills under it, and a file that is appended to in place is unreadable
after a kill at the wrong moment. So HDF5 never meets the disk here: it writes through :class:`CarefulFile`,
which keeps an error to itself until HDF5 is done, into a file that takes its place when it is complete
(:mod:`gradprobe.whole_files`).
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py

from gradprobe.runfile.sums import seal
from gradprobe.whole_files import Disk, replacing


class CarefulFile(io.RawIOBase):
    """A file for h5py's file-object driver that remembers a failure instead of raising it.

    HDF5 cannot cope with a write that fails while it closes a file; we look at ``error`` afterwards and
    throw the temporary file away. In a forked child it writes nothing: HDF5 closes there, at exit, what it
    inherited half written.
    """

    def __init__(self, descriptor: int, disk: Disk) -> None:
        self._descriptor, self._disk = descriptor, disk
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

    def check(self) -> None:
        """Raise the first error that any operation met."""
        if self.error is not None:
            raise self.error


def write_whole(path: Path, fill: Callable[[h5py.File], None], disk: Disk, folder: Path | None = None) -> None:
    """Make an HDF5 file at ``path`` that is either complete or not there.

    Args:
        path: Replaced if it exists; the old content stays until the new one is on the disk.
        fill: Writes the content.
        disk: Where all this happens.
        folder: Where it is made; see :func:`gradprobe.whole_files.replacing`.

    Raises:
        OSError: The disk is full or gone. ``path`` is as it was.
    """
    with replacing(path, disk, folder) as descriptor:
        raw = CarefulFile(descriptor, disk)
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
        raw.check()


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
