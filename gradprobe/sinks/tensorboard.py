"""A sink that writes scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradprobe.errors import MissingExtraError
from gradprobe.rows import FeatureRow, Row
from gradprobe.sinks.scalars import ScalarSink, scalars

__all__ = ["TensorBoardSink"]


_PREFIX = "gradprobe"


class TensorBoardSink(ScalarSink):
    """Puts every row into TensorBoard under ``gradprobe/``, at its training step; metrics at their epoch.

    >>> attach(model, tasks, "conflict.h5", sinks=[TensorBoardSink("runs/1")])  # doctest: +SKIP

    Args:
        to: A folder; or a ``SummaryWriter`` of yours, which stays open. The folder is written from the first row on.

    Raises:
        MissingExtraError: The package tensorboard is not installed.
    """

    def __init__(self, to: str | Path | Any) -> None:
        self._ours = isinstance(to, str | Path)
        self._writer: Any = _summary_writer(to) if isinstance(to, str | Path) else to

    def write(self, row: Row | FeatureRow) -> None:
        """Queue the row's scalars; a thread of TensorBoard's writes them."""
        self._add(scalars(self._header, row), row.step)

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Queue metrics."""
        self._add({f"epoch/{name}": value for name, value in values.items()}, epoch)

    def flush(self) -> bool:
        """Write what is queued."""
        self._writer.flush()
        return True

    def close(self, end: str) -> None:
        """Write what is queued; close the writer if it is ours."""
        self._writer.flush()
        if self._ours:
            self._writer.close()

    def _add(self, values: Mapping[str, float], at: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{_PREFIX}/{name}", value, at)


def _summary_writer(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingExtraError("tensorboard", "tensorboard", "TensorBoardSink") from error
    # Absolute: it opens its file anew by name, and a program may change its folder meanwhile.
    return SummaryWriter(str(folder) if "://" in str(folder) else str(Path(folder).absolute()))
