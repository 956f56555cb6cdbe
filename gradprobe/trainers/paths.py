"""Names of the files that lie beside a run file. Imports nothing heavy: a study looks for them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gradprobe.whole_files import followed

__all__ = ["Paths"]


@dataclass(frozen=True)
class Paths:
    """The files that lie beside a run file, and where a link leads beside that. No two run files have one in common.

    >>> [Paths(Path(name)).best.name for name in ("run.h5", "lr0.1", "lr0.1.h5", "run.hdf5", "run")]
    ['run.best.pt', 'lr0.1.best.pt', 'lr0.1.h5.best.pt', 'run.hdf5.best.pt', 'run-best.pt']
    """

    run: Path

    def __post_init__(self) -> None:
        """A run of two names has one checkpoint, and a program may change its folder."""
        object.__setattr__(self, "run", followed(self.run).absolute())

    @property
    def best(self) -> Path:
        """Weights of the best epoch on val."""
        return self._beside("best")

    @property
    def last(self) -> Path:
        """Weights after the last step."""
        return self._beside("last")

    @property
    def checkpoint(self) -> Path:
        """All state after the last whole epoch; removed when the training is finished."""
        return self._beside("checkpoint")

    @property
    def earlier_checkpoint(self) -> Path:
        """As versions named it that took what stands behind the last dot of any name for an ending."""
        return self.run.with_name(f"{self.run.stem}.checkpoint.pt")

    def existing(self) -> list[Path]:
        """Those that are there."""
        return [path for path in (self.best, self.last, self.checkpoint) if os.path.lexists(path)]

    def _beside(self, what: str) -> Path:
        # The usual .h5 is left out, unless what remains could be the whole name of another run; and a name without a
        # dot has a dash, since with a dot it would be the .h5 file's of that name.
        name = self.run.name
        stem = name.removesuffix(".h5")
        if "." not in name:
            return self.run.with_name(f"{name}-{what}.pt")
        return self.run.with_name(f"{name if '.' in stem else stem}.{what}.pt")
