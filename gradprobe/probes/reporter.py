"""Hands rows to the sinks, and turns a failure of the probe's own into words instead of an exception."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradprobe.errors import GradprobeError
from gradprobe.probes.shared_layers import SharedLayers
from gradprobe.rows import (
    FEATURES,
    ROWS,
    TABLE_NAMES,
    AnyRow,
    FeatureHeader,
    GrowingSink,
    Header,
    Provenance,
    ResumableSink,
    Sink,
    takes,
)
from gradprobe.rows.layers import shortened
from gradprobe.rows.table import Table

T = TypeVar("T")
_SOON = 10
"""Measured steps after which a task that took part in none is asked after."""


class Reporter:
    """What stands between a probe and its sinks.

    Args:
        tasks: Their names.
        sinks: Who gets the rows.
        provenance: Stored in the header.

    Attributes:
        header: None before the layers were found.
        last_metrics: The last epoch that metrics came of; -1 before the first.
        overhead: Seconds spent on all rows.
        started: When recording began, on the clock of ``time.perf_counter``.
        trouble: What sinks could not complete when they were closed; empty: nothing.
    """

    def __init__(self, tasks: Sequence[str], sinks: Sequence[Sink], provenance: Provenance | None) -> None:
        self._tasks, self._sinks, self._provenance = tuple(tasks), list(sinks), dict(provenance or {})
        self._taking: dict[str, list[Sink]] = {}  # table -> who takes its rows
        self._warned: set[str] = set()
        self._closed, self._process = False, os.getpid()
        self._began_with = 0  # layers
        self._seen, self._steps = np.zeros(len(tasks), dtype=bool), 0
        self._last = dict.fromkeys(TABLE_NAMES, -1)  # step, by table
        self.header: Header | None = None
        self.last_metrics = -1
        self.overhead = 0.0
        self.started = time.perf_counter()
        self.trouble = ""

    def start(self, shared: SharedLayers) -> None:
        """Announce the layers. A second call does nothing."""
        if self.header is not None:
            return
        self._began_with = len(shared.layers)
        header = Header(**self._described(shared), tasks=self._tasks, provenance=self._provenance)
        self.header = header  # first: no sink is started twice, whatever happens below
        for sink in list(self._sinks):
            self._start(sink, sink.start, header)

    def grow(self, shared: SharedLayers) -> None:
        """Announce layers that have joined, or who reaches what as it is known now, to sinks that take it."""
        if self.header is None:
            return
        self.header = replace(self.header, **self._described(shared))
        for sink in self._sinks:
            if isinstance(sink, GrowingSink):
                self._hand(sink, max(self.last_step, 0), sink.grow, self.header)

    def _described(self, shared: SharedLayers) -> dict[str, Any]:
        return {
            "layers": tuple(layer.name for layer in shared.layers),
            "layer_size": np.array([layer.size for layer in shared.layers], dtype=np.int64),
            "reach": np.array(shared.reach, dtype=bool).reshape(len(shared.layers), len(self._tasks)),
        }

    def start_features(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Announce the features. A second call does nothing."""
        if self.header is None or self.header.features is not None:
            return
        found = FeatureHeader(self._tasks, tuple(names), np.array(sizes, dtype=np.int64))
        self.header = replace(self.header, features=found)
        for sink in list(self._sinks):
            if isinstance(sink, GrowingSink) and takes(sink, FEATURES):
                self._start(sink, sink.grow, self.header)

    def row(self, row: AnyRow) -> None:
        """Hand on a row to the sinks that take its table; not a second one of the same step."""
        if self.header is None or row.step <= self._last[row.table.name]:
            return  # without a header not even the layers could be found; the warning is out
        self._last[row.table.name] = row.step
        self.overhead += row.overhead
        for sink in self._takers(row.table):
            self._hand(sink, row.step, sink.write, row)

    def _takers(self, table: Table) -> list[Sink]:
        if table.name not in self._taking:
            self._taking[table.name] = [sink for sink in self._sinks if takes(sink, table)]
        return self._taking[table.name]

    @property
    def last_step(self) -> int:
        """Of the last measured row; -1 before the first."""
        return self._last[ROWS.name]

    def took_part(self, there: NDArray[np.bool_]) -> None:
        """Of a measured step: (T,) who took part in it."""
        self._seen |= there
        self._steps += 1
        if self._steps == _SOON:
            self.ask_after()

    def ask_after(self) -> None:
        """Say of a task once that it took part in no step: its loss may be detached by mistake."""
        for task in (task for task, seen in zip(self._tasks, self._seen, strict=True) if self._steps and not seen):
            self.warn(
                max(self.last_step, 0),
                f"task {task!r} has been absent from every measured step so far, so that nothing is known of it. Was "
                "its loss left out, detached, or made under no_grad?",
            )

    def annotate(self, values: Provenance) -> None:
        """Add to the provenance."""
        for sink in self._sinks:
            self._try(sink, partial(sink.annotate, values))

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Hand on metrics of one epoch.

        Raises:
            GradprobeError: A name or an epoch that a sink refuses.
        """
        for sink in self._sinks:
            self._try(sink, partial(sink.write_epoch, epoch, values))
        self.last_metrics = max(self.last_metrics, epoch)

    def flush(self) -> bool:
        """Make all rows so far safe, and say whether they are."""
        answers = [self._try(sink, sink.flush) for sink in self._sinks]  # each is asked, whatever the others say
        return all(answers)

    def rewind(self, step: int, epoch: int) -> None:
        """The training goes on from ``step``, with metrics up to ``epoch``: sinks that can forget what came after."""
        self._last = {table: min(last, step - 1) for table, last in self._last.items()}
        self.last_metrics = epoch
        for sink in self._sinks:
            if isinstance(sink, ResumableSink):
                sink.rewind(step, epoch)

    def close(self, end: str) -> None:
        """Close the sinks. A second call does nothing, nor does one in a forked child, whose sinks are copies.

        Raises:
            GradprobeError: A file could not be completed. Whatever is raised, the other sinks are closed all the same.
        """
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        failed: list[BaseException] = []
        closing = [partial(self._try, sink, partial(sink.close, end)) for sink in self._sinks]
        for call in (partial(self.start, SharedLayers((), ())), *closing):
            try:
                call()
            except BaseException as error:  # also Ctrl-C, which ends one sink's patience and not another's
                failed.append(error)
        said = [str(error) for error in failed if isinstance(error, Exception)]
        troubles = [*said, *(getattr(sink, "trouble", None) for sink in self._sinks)]
        self.trouble = " ".join(dict.fromkeys(t for t in troubles if t and isinstance(t, str)))
        if failed:
            raise next((error for error in failed if not isinstance(error, Exception)), failed[0])

    def warn(self, step: int, reason: str) -> None:
        """Say it once, however often it happens."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"gradprobe: step {step}: {reason}. Training goes on.", RuntimeWarning, stacklevel=5)

    def _start(self, sink: Any, start: Callable[[Header], None], header: Header) -> None:
        """Start one sink; one that cannot is left out."""
        try:
            start(header)
        except GradprobeError:
            raise  # a file that cannot be written is for the user to see
        except Exception as error:
            self._sinks.remove(sink)
            self._taking.clear()
            what = f"{type(sink).__name__} could not start and is left out: {type(error).__name__}: {error}"
            self.warn(max(self.last_step, 0), what)

    def _hand(self, sink: Any, step: int, write: Callable[[Any], None], row: Any) -> None:
        try:
            write(row if isinstance(sink, GrowingSink) else shortened(row, self._began_with))
        except Exception as error:  # a display or a logger must not end a training
            self._failed(sink, step, error)

    def _try(self, sink: Sink, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except GradprobeError:
            raise
        except Exception as error:
            self._failed(sink, max(self.last_step, 0), error)
            return None

    def _failed(self, sink: Any, step: int, error: Exception) -> None:
        self.warn(step, f"{type(sink).__name__} failed: {type(error).__name__}: {error}")
