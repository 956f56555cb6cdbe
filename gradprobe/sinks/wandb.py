"""A sink that logs scalars to Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradprobe.errors import MissingExtraError
from gradprobe.rows import FeatureRow, Row
from gradprobe.sinks.scalars import GROUPS, ScalarSink, scalars

__all__ = ["WandbSink"]


_PREFIX = "gradprobe"


class WandbSink(ScalarSink):
    """Logs every row under ``gradprobe/``, over ``gradprobe/step``; metrics over ``gradprobe/epoch``.

    These axes are the sink's own, so that a run which logs other things at other steps takes it beside them.

    >>> attach(model, tasks, "conflict.h5", sinks=[WandbSink(project="multitask")])  # doctest: +SKIP

    Args:
        run: A run of yours, which stays open; None: one is begun and finished here.
        init: For ``wandb.init`` where the run is begun here, such as ``project="..."`` or ``mode="offline"``.

    Raises:
        MissingExtraError: The package wandb is not installed.
    """

    def __init__(self, run: Any = None, **init: Any) -> None:
        self._ours = run is None
        self._run = _begin(init) if run is None else run
        for axis, groups in (("step", GROUPS), ("epoch", ("epoch",))):
            self._run.define_metric(f"{_PREFIX}/{axis}", hidden=True)
            for group in groups:  # one by one: PREFIX/* would draw the metrics of epochs over steps, too
                self._run.define_metric(f"{_PREFIX}/{group}/*", step_metric=f"{_PREFIX}/{axis}")

    def write(self, row: Row | FeatureRow) -> None:
        """Hand the row's scalars to wandb, which sends them in the background."""
        self._log("step", row.step, scalars(self._header, row), "")

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Hand on metrics."""
        self._log("epoch", epoch, values, "epoch/")

    def flush(self) -> bool:
        """Nothing to wait for: wandb keeps on disk what it was given until it is sent."""
        return True

    def close(self, end: str) -> None:
        """Finish the run if it is ours; any other end than "finished" is a failed run there."""
        if self._ours:
            self._run.finish(exit_code=0 if end == "finished" else 1)

    def _log(self, axis: str, at: int, values: Mapping[str, float], group: str) -> None:
        self._run.log(
            {f"{_PREFIX}/{axis}": at, **{f"{_PREFIX}/{group}{name}": value for name, value in values.items()}}
        )


def _begin(init: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise MissingExtraError("wandb", "wandb", "WandbSink") from error
    return wandb.init(**init)
