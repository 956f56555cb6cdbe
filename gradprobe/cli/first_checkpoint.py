"""The first checkpoint of a recording."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradprobe.trainers.paths import Paths

if TYPE_CHECKING:
    from gradprobe.rows import Header, Row


class FirstCheckpoint:
    """When the new run begins: a first checkpoint, so that a kill in the first epoch leaves something to go on from,
    and no weights of an older run of the same name, which would pass for this one's. A sink beside the writer.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self.state: Mapping[str, Any] = {}

    def start(self, header: Header) -> None:
        """The new run has begun."""
        from gradprobe.trainers import checkpoint

        paths = Paths(self._out)
        for path in paths.existing():
            path.unlink()
        with suppress(OSError):  # the loop tells of a full disk after the first epoch
            checkpoint.save(paths.checkpoint, self.state)
        self.state = {}

    def write(self, row: Row) -> None:
        """Nothing to do."""

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Nothing to do."""

    def annotate(self, values: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def flush(self) -> bool:
        return True

    def close(self, end: str) -> None:
        """Nothing to do."""
