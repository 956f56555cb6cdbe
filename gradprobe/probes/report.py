"""Hands rows to the sinks, and turns a failure of the probe's own into words instead of an exception."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from gradprobe.errors import GradprobeError
from gradprobe.measures import Array
from gradprobe.probes.graph import SharedLayers
from gradprobe.rows import (
    MEASURED,
    NONFINITE_GRADIENT,
    NONFINITE_LOSS,
    FeatureHeader,
    FeatureRow,
    FeatureSink,
    Header,
    Provenance,
    Row,
    Sink,
)

T = TypeVar("T")


class Reporter:
    """What stands between a probe and its sinks.

    Args:
        tasks: Their names.
        sinks: Who gets the rows.
        provenance: Stored in the header.

    Attributes:
        header: None before the layers were found.
        last_step: Of the last row; -1 before the first.
        overhead: Seconds spent on all rows.
        started: When recording began, on the clock of ``time.perf_counter``.
    """

    def __init__(self, tasks: Sequence[str], sinks: Sequence[Sink], provenance: Provenance | None) -> None:
        self._tasks, self._sinks, self._provenance = tuple(tasks), list(sinks), dict(provenance or {})
        self._warned: set[str] = set()
        self._closed = False
        self._last_feature_step = -1
        self.header: Header | None = None
        self.feature_header: FeatureHeader | None = None
        self.last_step = -1
        self.overhead = 0.0
        self.started = time.perf_counter()

    def start(self, shared: SharedLayers) -> None:
        """Announce the layers. A second call does nothing."""
        if self.header is not None:
            return
        header = Header(
            tasks=self._tasks,
            layers=tuple(layer.name for layer in shared.layers),
            layer_size=np.array([layer.size for layer in shared.layers], dtype=np.int64),
            reach=np.array(shared.reach, dtype=bool).reshape(len(shared.layers), len(self._tasks)),
            provenance=self._provenance,
        )
        for sink in self._sinks:
            sink.start(header)
        self.header = header

    def start_features(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Announce the features. A second call does nothing."""
        if self.feature_header is not None:
            return
        self.feature_header = FeatureHeader(self._tasks, tuple(names), np.array(sizes, dtype=np.int64))
        for sink in self._sinks:
            if isinstance(sink, FeatureSink):
                sink.start_features(self.feature_header)

    def row(self, row: Row) -> None:
        """Hand on a row; not a second one of the same step."""
        if self.header is None or row.step <= self.last_step:
            return  # without a header not even the layers could be found; the warning is out
        self.last_step = row.step
        self.overhead += row.overhead
        for sink in self._sinks:
            self._hand(sink, row.step, sink.write, row)

    def features(self, row: FeatureRow) -> None:
        """Hand on a feature row; not a second one of the same step."""
        if self.feature_header is None or row.step <= self._last_feature_step:
            return
        self._last_feature_step = row.step
        self.overhead += row.overhead
        for sink in self._sinks:
            if isinstance(sink, FeatureSink):
                self._hand(sink, row.step, sink.write_features, row)

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Hand on metrics of one epoch."""
        for sink in self._sinks:
            sink.write_epoch(epoch, values)

    def flush(self) -> None:
        """Make all rows so far safe."""
        for sink in self._sinks:
            sink.flush()

    def close(self, end: str) -> None:
        """Close the sinks. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.start(SharedLayers((), ()))
        for sink in self._sinks:
            sink.close(end)

    def guarded(self, step: int, measure: Callable[[], T]) -> tuple[T | None, str]:
        """The result of ``measure`` and the row's status; a failure is a status, not an exception."""
        try:
            return measure(), MEASURED
        except GradprobeError:
            raise  # a wrong call, or a file that cannot be written: for the user to see
        except Exception as error:
            reason = f"measuring failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            self.warn(step, reason)
            return None, reason

    def warn(self, step: int, reason: str) -> None:
        """Say it once, however often it happens."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"gradprobe: step {step}: {reason}. Training goes on.", RuntimeWarning, stacklevel=5)

    def _hand(self, sink: Sink | FeatureSink, step: int, write: Callable[[Any], None], row: Any) -> None:
        try:
            write(row)
        except Exception as error:  # a display or a logger must not end a training
            self.warn(step, f"{type(sink).__name__} failed: {type(error).__name__}: {error}")


def status_of(losses: Array, gram: Array, reach: Any) -> str:
    """The status of a row whose passes went through.

    Args:
        losses: (T,) values.
        gram: (L, T, T).
        reach: (L, T) bool.
    """
    if not np.isfinite(losses).all():
        return NONFINITE_LOSS
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    return NONFINITE_GRADIENT if np.isnan(diagonal[reach]).any() else MEASURED
