"""What holds for all rows of a run, and who takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gradprobe.measures import Array

Provenance = Mapping[str, Any]
"""Names to texts, numbers, or lists of those; nested mappings get dotted names, other values are stored as text."""


@dataclass(frozen=True)
class FeatureHeader:
    """The features at which tasks part, see ``gradprobe.probes.feature_gradients``.

    Attributes:
        tasks: (T,) names.
        features: (F,) names: the layer that makes each feature.
        feature_size: (F,) numbers that the feature had for the batch in which it was found.
    """

    tasks: Sequence[str]
    features: Sequence[str]
    feature_size: NDArray[np.int64]


@dataclass(frozen=True)
class TestClusters:
    """Metrics of a test split with one cluster of samples left out: what a jackknife needs.

    Attributes:
        clusters: (K,) names: a clip or patient, or a sample alone; several where there were too many to try each.
        size: (K,) samples of each.
        metrics: (M,) names.
        without: (K, M) each metric over the samples of all other clusters; NaN where it is undefined.
    """

    __test__ = False  # no test, whatever pytest makes of the name

    clusters: Sequence[str]
    size: NDArray[np.int64]
    metrics: Sequence[str]
    without: Array


@dataclass(frozen=True)
class Header:
    """What holds for all rows of a run.

    Attributes:
        tasks: (T,) names.
        layers: (L,) names, in the order in which the forward runs them. Empty: the tasks share nothing.
        layer_size: (L,) numbers of parameters.
        reach: (L, T) bool: which task has had a gradient other than 0 on which layer so far; of a task that has had
            none at all, which its graph reaches. A layer with fewer than two is shared by the graph alone, and is left
            out of every sum over shared layers.
        provenance: Where the run comes from.
        features: None until, or unless, features are measured.
        test: Metrics of the test split by cluster; known only when a run has ended.
        held: What rows have brought so far beside what every run has: names of tables, and of optional fields by their
            place in the file.
    """

    tasks: Sequence[str]
    layers: Sequence[str]
    layer_size: NDArray[np.int64]
    reach: NDArray[np.bool_]
    provenance: Provenance = field(default_factory=dict)
    features: FeatureHeader | None = None
    test: TestClusters | None = None
    held: frozenset[str] = frozenset()

    @property
    def feature_names(self) -> tuple[str, ...]:
        """(F,) names of the features; empty where none are measured."""
        return () if self.features is None else tuple(self.features.features)

    def __contains__(self, name: str) -> bool:
        """Whether rows have brought a table, or an optional field."""
        return name in self.held


class Sink(Protocol):
    """Takes what a probe measures. Called from the training thread: it must return at once.

    An attribute ``tables`` names the tables of which a sink takes rows beside :data:`gradprobe.rows.ROWS`, such as
    ``("features", "ledger")``; a sink without it is not asked to.
    """

    def start(self, header: Header) -> None:
        """Called once, before the first row."""

    def write(self, row: Any) -> None:
        """Called once per row, steps of each table increasing; ``row.table`` says of which table it is."""

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Metrics of one epoch."""

    def annotate(self, values: Provenance) -> None:
        """Adds to the provenance what became known only after the start."""

    def flush(self) -> bool:
        """Makes all rows so far safe, and says whether they are; called before a state to resume from is saved."""

    def close(self, end: str) -> None:
        """Called once, last. ``end`` says how the run ended: "finished", "interrupted", "failed: ..."."""


@runtime_checkable
class GrowingSink(Protocol):
    """What a :class:`Sink` has besides, where it takes layers that are found to be shared after the start.

    Others get rows of the layers that they were started with.
    """

    def grow(self, header: Header) -> None:
        """Called before the first row that needs it: layers were added at the end, a layer has got more parameters,
        ``reach`` is known better, or features were found.
        """


@runtime_checkable
class ResumableSink(Sink, Protocol):
    """A sink that keeps rows beyond the process, and can go on with them in another."""

    def rewind(self, step: int, epoch: int) -> None:
        """The training goes on from ``step``: forgets rows from there on, and metrics of epochs after ``epoch``.

        Called before ``start`` where a run is gone on with, and later where the training goes back.
        """
