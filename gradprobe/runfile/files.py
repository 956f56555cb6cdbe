"""HDF5 files that appear whole or not at all, and of which no byte is believed that does not match its sum.

HDF5 crashes the interpreter when a disk fills under it, and a file that is appended to in place is unreadable
after a kill at the wrong moment. So HDF5 never meets the disk here: it writes through :class:`_CarefulFile`,
which keeps an error to itself until HDF5 is done, into a file that takes its place when it is complete
(:mod:`gradprobe.whole_files`).

HDF5 ignores what follows the end that its superblock names. There a run file carries a CRC-32 of every 4 KiB block
before it (docs/run-file.md, "Sums"). Reading checks the blocks that are read, before HDF5 sees them: a flipped bit
reaches neither HDF5's own structures, which could crash on it, nor the numbers.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from gradprobe.whole_files import Disk, replacing

BLOCK = 1 << 12
_FOOTER = struct.Struct("<16sQIII")  # magic, bytes of HDF5, bytes per block, blocks, CRC-32 of the table and of these
_MAGIC = b"gradprobe-crc32\n"
_SIGNATURE = b"\x89HDF\r\n\x1a\n"

_HEAP = b"GCOL"  # how a global heap, where HDF5 keeps variable-length text, begins

_AT_ONCE = 256  # blocks
_CACHED_BLOCKS = 64  # HDF5 reads its own structures in small scattered pieces
_IN_MEMORY = 1 << 18  # so small a file (a part) is taken whole: a long live run must not use up file descriptors


class _File(Protocol):
    def seek(self, offset: int, whence: int = ..., /) -> int: ...
    def readinto(self, buffer: Any, /) -> int | None: ...


class _Writable(_File, Protocol):
    def write(self, data: Any, /) -> int | None: ...


def seal(file: _Writable) -> None:
    """Append the sums to a complete HDF5 file that has none.

    Args:
        file: Open for reading and writing, at any position.
    """
    length = file.seek(0, os.SEEK_END)
    table = np.empty(-(-length // BLOCK), dtype="<u4")
    buffer = memoryview(bytearray(_AT_ONCE * BLOCK))
    file.seek(0)
    for first in range(0, len(table), _AT_ONCE):
        part = buffer[: min(len(buffer), length - first * BLOCK)]
        file.readinto(part)
        for at in range(0, len(part), BLOCK):
            table[first + at // BLOCK] = zlib.crc32(part[at : at + BLOCK])
    file.seek(length)
    file.write(_trailer(table, length))


def _trailer(table: NDArray[np.uint32], length: int) -> bytes:
    """The bytes that follow ``length`` bytes of HDF5 whose blocks have the sums in ``table``."""
    fields = _FOOTER.pack(_MAGIC, length, BLOCK, len(table), 0)[:-4]
    return table.tobytes() + fields + struct.pack("<I", zlib.crc32(fields, zlib.crc32(table.tobytes())))


class SummedFile(io.RawIOBase):
    """A run file, read-only, for h5py's file-object driver.

    A file that another program changed since has lost its sums: HDF5 cuts off what lies behind its end. What was
    wrong with the bytes is kept in ``error``, as text: HDF5 may word it otherwise, and a traceback would keep what
    crashes Python at its end.

    Args:
        path: A regular file; anything else (a pipe would block for ever) is refused before it is read.
        follow: Whether ``path`` may be a symbolic link.
        lenient: Use what is left of damaged sums, to save what can be saved: a block whose sum is damaged is then
            taken for damaged itself, never the other way round.

    Raises:
        OSError: Not a regular file, not HDF5, cut short, or its sums are damaged.
    """

    def __init__(self, path: Path, *, follow: bool = True, lenient: bool = False) -> None:
        super().__init__()
        self._lenient = lenient
        self.error = ""
        self._at = 0
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._file = _open_regular(path, follow)
        try:
            self._size = self._file.seek(0, os.SEEK_END)
            self._length, self._sums = self._read_trailer()
        except BaseException:
            self._file.close()
            raise

    def _read_trailer(self) -> tuple[int, NDArray[np.uint32] | None]:
        head = self._raw(0, min(48, self._size))
        if not head.startswith(_SIGNATURE):
            raise OSError("it is not an HDF5 file")
        end = _hdf5_end(head)
        if end is not None and self._size < end:
            raise OSError(f"it is cut short: {self._size:,} bytes are there of at least {end:,}")
        footer = self._raw(self._size - _FOOTER.size, _FOOTER.size) if self._size > _FOOTER.size else b""
        if not footer.startswith(_MAGIC):
            if end is None or self._size == end:
                return self._size, None
            problem = f"{self._size - end:,} unknown bytes follow its end"
        else:
            _, length, block, count, crc = _FOOTER.unpack(footer)
            if block != BLOCK or count != -(-length // BLOCK) or length + 4 * count + _FOOTER.size != self._size:
                problem = "they are not those of a file of this length"
            else:
                table = self._raw(length, 4 * count)
                if zlib.crc32(footer[:-4], zlib.crc32(table)) == crc:
                    return length, np.frombuffer(table, dtype="<u4")
                problem = "they do not match their own sum"
        count = -(-(end or 0) // BLOCK)
        if self._lenient and end is not None and end + 4 * count + _FOOTER.size == self._size:
            return end, np.frombuffer(self._raw(end, 4 * count), dtype="<u4")
        raise OSError(f"its sums are damaged: {problem}")

    @property
    def sealed(self) -> bool:
        """Whether the file carries sums."""
        return self._sums is not None

    @property
    def length(self) -> int:
        """Bytes of HDF5."""
        return self._length

    def damaged(self) -> list[tuple[int, int]]:
        """Byte ranges (start, stop) that do not match their sum, by reading all; joined where they touch."""
        found: list[tuple[int, int]] = []
        for index in range(len(self._sums) if self._sums is not None else 0):
            start, stop = index * BLOCK, min((index + 1) * BLOCK, self._length)
            if not self._matches(index, self._raw(start, stop - start)):
                if found and found[-1][1] == start:
                    start = found.pop()[0]
                found.append((start, stop))
        return found

    def unverified(self, start: int, size: int) -> bytes:
        """Bytes as they are, whether or not they match their sums; for who knows from :meth:`damaged` which do.

        Raises:
            OSError: They lie beyond the end.
        """
        if start < 0 or start + size > self._length:
            raise OSError(f"it ends at byte {self._length:,} but refers to byte {start + size:,}")
        return self._raw(start, size)

    # ---- what HDF5 calls

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        try:
            self._fill(view)
            if view[:4] == _HEAP:
                _check_heap(view)
        except OSError as error:
            self.error = str(error)
            raise
        self._at += len(view)
        return len(view)

    def close(self) -> None:
        self._file.close()
        super().close()

    # ---- blocks

    def _fill(self, view: memoryview) -> None:
        start, stop = self._at, self._at + len(view)
        if stop > self._length:
            raise OSError(f"it ends at byte {self._length:,} but refers to byte {stop:,}")
        first, last = -(-start // BLOCK), stop // BLOCK  # whole blocks are read where they go
        if first < last:
            middle = view[first * BLOCK - start : last * BLOCK - start]
            self._read_at(first * BLOCK, middle)
            for index in range(first, last):
                at = (index - first) * BLOCK
                self._require(index, middle[at : at + BLOCK])
            self._copy(view[: first * BLOCK - start], start)
            self._copy(view[last * BLOCK - start :], last * BLOCK)
        else:
            self._copy(view, start)

    def _copy(self, view: memoryview, start: int) -> None:
        """Less than two blocks, by way of those that were read before."""
        done = 0
        while done < len(view):
            index, offset = divmod(start + done, BLOCK)
            piece = self._block(index)[offset : offset + len(view) - done]
            view[done : done + len(piece)] = piece
            done += len(piece)

    def _block(self, index: int) -> bytes:
        block = self._cache.get(index)
        if block is None:
            start = index * BLOCK
            block = self._raw(start, min(BLOCK, self._length - start))
            self._require(index, block)
            self._cache[index] = block
            if len(self._cache) > _CACHED_BLOCKS:
                self._cache.popitem(last=False)
        return block

    def _require(self, index: int, data: bytes | memoryview) -> None:
        if not self._matches(index, data):
            start = index * BLOCK
            raise OSError(f"it is damaged: bytes {start:,} to {start + len(data):,} do not match their sum")

    def _matches(self, index: int, data: bytes | memoryview) -> bool:
        return self._sums is None or zlib.crc32(data) == int(self._sums[index])

    def _raw(self, start: int, size: int) -> bytes:
        data = bytearray(size)
        self._read_at(start, memoryview(data))
        return bytes(data)

    def _read_at(self, start: int, target: memoryview) -> None:
        self._file.seek(start)
        done = 0
        while done < len(target):
            count = self._file.readinto(target[done:])
            if not count:
                raise OSError(f"it became shorter while it was read, at byte {start + done:,}")
            done += count


def _check_heap(view: bytes | memoryview) -> None:
    """Look through a global heap before HDF5 does, which loops for ever over one with an empty free space.

    Args:
        view: The heap from its beginning, or its first bytes: HDF5 reads those first to learn its size.

    Raises:
        OSError: An object in it is empty free space, or leads beyond the heap.
    """
    size = int.from_bytes(view[8:16], "little")
    if size < len(view) and size < 4096:
        raise OSError(f"it is damaged: a heap of {size} bytes")
    at, end = 16, min(size, len(view))
    while at + 16 <= end:
        index, length = int.from_bytes(view[at : at + 2], "little"), int.from_bytes(view[at + 8 : at + 16], "little")
        taken = 16 + -(-length // 8) * 8 if index else length
        if not taken or at + taken > size:
            raise OSError(f"it is damaged: an object of {length:,} bytes in a heap of {size:,}")
        at += taken


def _open_regular(path: Path, follow: bool) -> io.FileIO | io.BytesIO:
    # Opening a pipe for reading would wait for a writer: O_NONBLOCK does not, and has no effect on regular files.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    if not follow:
        if path.is_symlink():
            raise OSError("it is a symbolic link, which a part of a run never is")
        flags |= getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is not a regular file")
        file = io.FileIO(descriptor, "r")
    except BaseException:
        os.close(descriptor)
        raise
    if found.st_size > _IN_MEMORY:
        return file
    with file:
        return io.BytesIO(file.read())


def _hdf5_end(head: bytes) -> int | None:
    """Where HDF5 says that the file ends; None where it is not of the form that our writer chooses."""
    if len(head) < 48 or head[8] not in (2, 3) or head[9] != 8 or head[12:20] != bytes(8):
        return None
    return int.from_bytes(head[28:36], "little")


class _CarefulFile(io.RawIOBase):
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
        raw = _CarefulFile(descriptor, disk)
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
