"""A disk that remembers every operation, and the folders that a kill or a loss of power at any of them leaves.

A kill keeps what was done. A loss of power keeps what was synced; of the rest it may keep any part: contents that
were not fsynced may be there, be gone, or be full of zeros, and names that were not fsynced in their folder may
have changed or not, each for itself.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gradprobe.runfile.files import Disk


class RecordingDisk(Disk):
    """Does everything, and logs it in ``log``: (operation, arguments)."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, []
        self._inodes: dict[int, int] = {}
        self._count = 0
        self._one = threading.Lock()

    def mark(self, rows: int) -> None:
        """From here on at least ``rows`` rows must be readable."""
        self._say("mark", rows)

    def create(self, path):
        descriptor = super().create(path)
        with self._one:
            self._count += 1
            self._inodes[descriptor] = self._count
            self.log.append(("create", self._name(path), self._count))
        return descriptor

    def create_lock(self, path):
        if not path.exists():
            self.close(self.create(path))
        return super().create_lock(path)

    def write(self, descriptor, data, offset):
        done = super().write(descriptor, data, offset)
        self._say("write", self._inodes[descriptor], offset, bytes(data[:done]))
        return done

    def truncate(self, descriptor, size):
        super().truncate(descriptor, size)
        self._say("truncate", self._inodes[descriptor], size)

    def sync(self, descriptor):
        super().sync(descriptor)
        self._say("sync", self._inodes[descriptor])

    def replace(self, source, target):
        super().replace(source, target)
        self._say("replace", self._name(source), self._name(target))

    def unlink(self, path):
        if path.exists():
            super().unlink(path)
            self._say("unlink", self._name(path))

    def mkdir(self, path):
        if not path.exists():
            super().mkdir(path)
            self._say("mkdir", self._name(path))

    def rmdir(self, path):
        super().rmdir(path)
        self._say("rmdir", self._name(path))

    def sync_folder(self, folder):
        super().sync_folder(folder)
        self._say("sync_folder", self._name(folder))

    def _say(self, *operation):
        with self._one:
            self.log.append(operation)

    def _name(self, path):
        return path.relative_to(self.root).as_posix()


Names = dict[str, int]
"""Path to inode; -1 for a folder."""


@dataclass
class World:
    """The file system after some operations: as it is, and as much of it as is sure to survive."""

    names: Names = field(default_factory=dict)
    contents: dict[int, bytearray] = field(default_factory=dict)
    synced: dict[int, bytes] = field(default_factory=dict)
    sure: Names = field(default_factory=dict)
    pending: list[tuple] = field(default_factory=list)  # changes of names that were not synced
    rows: int = 0

    def do(self, operation: str, *arguments) -> None:
        """One operation."""
        getattr(self, f"_{operation}")(*arguments)

    def _change(self, *change) -> None:
        _rename(self.names, change)
        self.pending.append(change)

    def _mark(self, rows):
        self.rows = rows

    def _create(self, path, inode):
        self.contents[inode], self.synced[inode] = bytearray(), b""
        self._change(None, path, inode)

    def _write(self, inode, offset, data):
        content = self.contents[inode]
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data

    def _truncate(self, inode, size):
        content = self.contents[inode]
        content.extend(bytes(max(0, size - len(content))))
        del content[size:]

    def _sync(self, inode):
        self.synced[inode] = bytes(self.contents[inode])

    def _replace(self, source, target):
        self._change(source, target, self.names[source])

    def _unlink(self, path):
        self._change(path, None, 0)

    def _mkdir(self, path):
        self._change(None, path, -1)

    def _rmdir(self, path):
        self._change(path, None, 0)

    def _sync_folder(self, folder):
        here = [change for change in self.pending if _folder(change) == folder]
        for change in here:
            _rename(self.sure, change)
        self.pending = [change for change in self.pending if _folder(change) != folder]

    # ---- what may be left

    def killed(self) -> tuple[Names, dict[int, bytes]]:
        """After a kill."""
        return self.names, self.contents

    def power_lost(self, rng: random.Random) -> Iterator[tuple[Names, dict[int, bytes]]]:
        """After a loss of power: everything unsure gone, only contents gone, and anything between."""
        yield self.sure, self.synced
        yield self.names, self.synced
        kept = dict(self.sure)
        for change in self.pending:
            if rng.random() < 0.5:
                _rename(kept, change)
        contents = {}
        for inode, live in self.contents.items():
            safe = self.synced[inode]
            contents[inode] = rng.choice([safe, bytes(live), safe + bytes(max(0, len(live) - len(safe)))])
        yield kept, contents


def _rename(names: Names, change: tuple) -> None:
    source, target, inode = change
    names.pop(source, None)
    if target is not None:
        names[target] = inode


def _folder(change: tuple) -> str:
    path = Path(change[1] if change[1] is not None else change[0])
    return path.parent.as_posix()


def lay_out(root: Path, names: Names, contents: dict[int, bytes]) -> None:
    """Make such a folder; a file whose folder is gone is gone with it."""
    for name in sorted(n for n, inode in names.items() if inode == -1):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, inode in names.items():
        if inode != -1 and (root / name).parent.exists():
            (root / name).write_bytes(contents[inode])
