"""Files that appear whole or not at all, and only where a file may be. Everything that is written goes through here.

A file is made beside its target under a random name, which nobody can have prepared, and renamed over it. Who has the
old one open, or another hard link to it, keeps the old one. A device, a pipe, a socket or a folder is never replaced.

Every change of the file system goes through one :class:`Disk`, so that tests can stop the world at each of them.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gradprobe.errors import RunFileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_MOST_LINKS = 40
"""A chain of symbolic links that is longer is taken for a circle."""

_OURS = re.compile(r"\.gradprobe-[0-9a-f]{16}\.tmp")
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_HDF5 = b"\x89HDF\r\n\x1a\n"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Disk:
    """The operations on files that a writer is made of, each a thin name for the system's."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY, 0o666)

    def create_lock(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o666)

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


# ---- where a file may be


def followed(path: Path) -> Path:
    """Where a symbolic link leads, also one to nothing yet; ``path`` itself where it is none.

    Raises:
        OSError: Links lead in a circle, or to what a process has open, which has no name of its own.
    """
    try:
        named = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise OSError(errno.EINVAL, "a path cannot hold the character NUL, nor half of a surrogate pair")
    for _ in range(_MOST_LINKS):
        if not path.is_symlink():
            return path
        folder = path.parent.resolve()
        if folder.parts[:2] == ("/", "proc"):  # /dev/stdout, say
            raise OSError("it stands for what a process has open, which a file cannot replace")
        path = folder / path.readlink()
    raise OSError(errno.ELOOP, "symbolic links lead in a circle")


def target(path: Path, *, overwrite: bool = False, run: bool = False) -> Path:
    """Where a file goes that is to be written at ``path``: there, or where a symbolic link there leads.

    Args:
        path: What it leads to may exist or not; the folder of that must.
        overwrite: Also what is write-protected.
        run: A run file is to be written, which may replace one; nothing else may, whatever that one is called.

    Raises:
        OSError: Nothing can be written there, or something is there that is no file, that is write-protected, or that
            is a run file.
    """
    found = followed(path)
    mode = _mode(found)
    if mode is not None and not overwrite and not mode & 0o222:
        raise PermissionError(errno.EACCES, "it is write-protected")
    if mode is not None and not run and _is_run(found):
        raise FileExistsError(errno.EEXIST, "it is a run file, which nothing but a run replaces")
    if found is not path and not found.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"it is a symbolic link into {found.parent}, which is not there")
    return found


def _is_run(path: Path) -> bool:
    """Whether a file is HDF5; one that cannot be read counts as none."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(_HDF5)) == _HDF5
    return False


def there(path: Path) -> bool:
    """Whether something is at a path, where links are followed; at one that is too long for any file there is not.

    Raises:
        OSError: The system does not say.
    """
    try:
        return path.exists()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _mode(path: Path) -> int | None:
    """Of the file there; None: there is nothing.

    Raises:
        OSError: Something else than a file is there, which a file would replace.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError(f"it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, which a file must not replace")
    return mode


# ---- reading


def read(path: Path, most: int) -> bytes:
    """The content of a regular file of up to so many bytes: what anybody may have put there is not read without end.

    Raises:
        OSError: It cannot be read, is larger, or is a folder, a device or a pipe.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFDIR):  # of a folder the system says it
        raise OSError(errno.EINVAL, f"is no regular file, but {_KINDS.get(kind, 'something else')}")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"has more than {most:,} bytes")
    return content


# ---- writing


def write(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file, on the disk when this returns. Its folder is made, links are followed, and its mode is kept.

    Raises:
        OSError: It could not be written; what was there is as it was.
    """
    data = memoryview(content.encode() if isinstance(content, str) else content)
    path.parent.mkdir(parents=True, exist_ok=True)
    disk, done = Disk(), 0
    with replacing(target(path), disk) as descriptor:
        while done < len(data):
            done += disk.write(descriptor, data[done:], done)


@contextmanager
def replacing(path: Path, disk: Disk, folder: Path | None = None) -> Iterator[int]:
    """A file that becomes ``path`` when the block ends, or vanishes with an error.

    Args:
        path: No link. A file there stays until the new one is on the disk, which gets its mode.
        disk: Where all this happens.
        folder: Where it is made; default: that of ``path``, where what killed writers left is removed.

    Yields:
        A descriptor, open for reading and writing.

    Raises:
        OSError: It could not be written, or something else than a file is at ``path``. All is as it was.
    """
    if folder is None:
        sweep(path.parent)
    temporary, descriptor = _temporary(folder or path.parent, disk.create, disk.close)
    with ExitStack() as closing:
        closing.callback(disk.close, descriptor)
        try:
            yield descriptor
            mode = _mode(path)
            if mode is not None and hasattr(os, "fchmod"):
                with suppress(OSError):
                    os.fchmod(descriptor, mode & 0o777 | 0o600)
            disk.sync(descriptor)
            if fcntl is None:  # no lock to keep, and an open file cannot be renamed there
                closing.close()
            disk.replace(temporary, path)
        except BaseException:
            closing.close()
            with suppress(OSError):
                disk.unlink(temporary)
            raise
    disk.sync_folder(path.parent)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A place for a new file or folder, which becomes ``path`` when the block ends, or vanishes with an error.

    Raises:
        OSError: Something is at ``path`` by then, or it cannot be written.
    """
    sweep(path.parent)
    folder, descriptor = _temporary(path.parent, _make_folder, os.close)
    try:
        yield folder / path.name
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "it was made by somebody else meanwhile")
        (folder / path.name).rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def telling(path: Path, flag: str = "--out") -> Iterator[None]:
    """Turns what the system says of a file that cannot be written into our error, which says what to do."""
    try:
        yield
    except OSError as error:
        raise RunFileError(f"{path}: cannot be written here ({error}). Choose another place with {flag}.") from error


def sweep(folder: Path) -> None:
    """Remove what killed writers left half made. What is being written is locked, and stays."""
    for stray in folder.glob(".gradprobe-*.tmp") if fcntl is not None else ():
        if _OURS.fullmatch(stray.name):
            with suppress(OSError):
                _remove_left(stray)


def _remove_left(stray: Path) -> None:
    descriptor = os.open(stray, os.O_RDONLY | os.O_NONBLOCK | _NO_FOLLOW)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(stray, ignore_errors=True)
        elif stat.S_ISREG(found.st_mode):
            stray.unlink()
    finally:
        os.close(descriptor)


def _temporary(folder: Path, make: Callable[[Path], int], close: Callable[[int], None]) -> tuple[Path, int]:
    """Something new, of a name that nobody could foresee, and a descriptor of it that holds a lock."""
    for _ in range(100):
        path = folder / f".gradprobe-{secrets.token_hex(8)}.tmp"
        try:
            descriptor = make(path)
        except FileExistsError:
            continue
        if _lock(path, descriptor):
            return path, descriptor
        close(descriptor)
    raise OSError(errno.EEXIST, "a temporary file cannot be made", str(folder))


def _lock(path: Path, descriptor: int) -> bool:
    """Whether it is ours: somebody may have swept it up before it was locked."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # some network file systems have no locks; nobody sweeps there
        return True


def _make_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | _NO_FOLLOW) if fcntl is not None else os.open(os.devnull, os.O_RDONLY)
