"""What a probe hands on: a header once, a row per measured step, metrics per epoch; and who takes them.

The probes make these (with torch), the run file stores them (with h5py), displays show them; this file knows
neither torch nor h5py, so that none of the three needs the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gradprobe.measures import Array, by_several, over_layers

MEASURED = "measured"
NONFINITE_GRADIENT = "a task's gradient is not finite"
FIRST_CALL = "only the first of this step's calls was measured: the steps before had a single one"
JOINED_WITHIN = "layers joined between this step's calls: what earlier ones brought there is missing"
OVERFLOWED = "a gradient overflowed under the loss scale: the step is left out"
NONFINITE_LOSS = "a task's loss is not finite"
MISSING_GRADIENT = "a task does not reach a layer that it reached at first"
"""Of files of earlier versions: such a row is measured now, over the layers that it has."""

UNKNOWN_GRADIENT = (NONFINITE_GRADIENT, OVERFLOWED, NONFINITE_LOSS)
"""In rows of such a status NaN may be a gradient that is not finite; in others it says that there is none."""


def absent(tasks: Sequence[str]) -> str:
    """The status of a row of a step from which some tasks are absent: what they share with others is not measured.

    >>> absent(["cls"])
    'absent at this step: cls'
    """
    return f"{_ABSENT}{', '.join(tasks)}"


def says_absent(status: str) -> bool:
    """Whether a status is one of :func:`absent`."""
    return status.startswith(_ABSENT)


_ABSENT = "absent at this step: "

EARLIER_SOURCES = ("weight decay", "earlier momentum")
"""What an update comes from beside the tasks, in the order of the columns of a ledger."""

Provenance = Mapping[str, Any]
"""Names to strings, numbers, or lists of those; nested mappings are stored with dotted names."""


@dataclass(frozen=True)
class FeatureHeader:
    """What holds for all feature rows of a run.

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
        features: None until, or unless, features are measured; they are announced by ``start_features``.
        updates: Whether there are rows on what the optimizer made of the gradients; announced by ``start_updates``.
        ledger: The same for rows of a loss ledger; announced by ``start_ledger``.
        test: Metrics of the test split by cluster; known only when a run has ended.
        noise: Whether rows tell the noise of their Gramians; known from the first row that does.
        probe_loader: Whether there are rows of the probe loader; announced by ``start_probe_loader``.
    """

    tasks: Sequence[str]
    layers: Sequence[str]
    layer_size: NDArray[np.int64]
    reach: NDArray[np.bool_]
    provenance: Provenance = field(default_factory=dict)
    features: FeatureHeader | None = None
    updates: bool = False
    ledger: bool = False
    test: TestClusters | None = None
    noise: bool = False
    probe_loader: bool = False


@dataclass(frozen=True)
class Row:
    """One measured step.

    Attributes:
        step: Training step, counted from 0; the parameters are those *before* this step's update.
        epoch: Counted from 0.
        time: Seconds since the start.
        loss: (T,) unweighted losses.
        weight: (T,) weights in force at this step.
        gram: (L, T, T) float64; NaN where a task does not reach a layer or its gradient is not finite. L may have grown
            since the first row, see :class:`GrowingSink`.
        lr: Learning rate of the optimizer's first group; NaN where the probe knows no optimizer.
        overhead: Seconds spent on measuring this row.
        batch_size: Samples in the batch; 0 where the probe was not told.
        status: :data:`MEASURED`, or the reason why the row holds less than a measurement.
        gram_noise: (L, T, T) float64: the noise part of ``gram``, see :func:`gradprobe.statistics.noise_part`; NaN
            where it is not known. None: the run is not measured in micro-batches.
        micro_batches: In how many the step was measured, over all processes; 1: as a whole.
        reach: (L, T) bool: whose gradient counts on which layer in sums over the shared layers of this row, see
            :func:`gradprobe.measures.counted`. None: the run file goes by its rows so far, displays by the header.
    """

    step: int
    epoch: int
    time: float
    loss: Array
    weight: Array
    gram: Array
    lr: float = float("nan")
    overhead: float = 0.0
    batch_size: int = 0
    status: str = MEASURED
    gram_noise: Array | None = None
    micro_batches: int = 1
    reach: NDArray[np.bool_] | None = None

    def shared(self, reach: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Norms (T,) and pair cosines (P,) over all shared layers together; ``reach`` of the header, (L, T)."""
        return over_layers(self.gram, self.counts(reach))

    def counts(self, reach: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whose gradient counts on which of the layers that the row has; ``reach`` of the header, (L, T)."""
        return by_several(np.asarray(reach)[: len(self.gram)]) if self.reach is None else np.asarray(self.reach)


BY_LAYER = ("gram", "gram_noise", "reach", "parts", "effect", "term")
"""What the rows of a run have by layer, on the first axis; features' rows have none."""


@dataclass(frozen=True)
class FeatureRow:
    """The task gradients at the features that the heads share, at one step.

    A bound on what :class:`Row` holds, and no measurement of it: see ``gradprobe.probes.features``.

    Attributes:
        step, epoch, time, overhead: As in :class:`Row`.
        gram: (F, T, T) float64, of the gradients of the unweighted losses with respect to the features; NaN where a
            task does not enter at a feature, its weight is 0, or its gradient is not finite.
    """

    step: int
    epoch: int
    time: float
    gram: Array
    overhead: float = 0.0


@dataclass(frozen=True)
class UpdateRow:
    """What the optimizer made of the gradients of one step.

    The update is taken apart by S sources: the tasks, then :data:`EARLIER_SOURCES`. What is not known is NaN.

    Attributes:
        step, epoch, time, overhead: As in :class:`Row`.
        status: :data:`MEASURED`, or the reason why the update is not taken apart.
        joint_norm: Norm of the joint gradient over all that the optimizer trains, before it was clipped.
        clip_scale: By what the gradient was multiplied between the backward and the optimizer; 1: not clipped.
        clip_share: (T,) each task's part in the square of ``joint_norm``; they sum to 1.
        clip_scale_without: (T,) what ``clip_scale`` would have been had the task been absent.
        calls: Of the probe, for this update.
        skipped: Steps so far that changed nothing.
        bn_mean_drift, bn_variance_drift, bn_batches: Of running statistics since the row before; see
            :mod:`gradprobe.updates.drift`.
        parts: (L, S, S) inner products of the parts of the update, in (unit of parameter)^2.
        effect: (L, T, S) inner products of each unweighted task gradient with each part: what the part changes the
            task's loss by, to first order.
    """

    step: int
    epoch: int
    time: float
    joint_norm: float
    clip_scale: float
    clip_share: Array
    clip_scale_without: Array
    calls: int
    skipped: int
    bn_mean_drift: float
    bn_variance_drift: float
    bn_batches: float
    parts: Array
    effect: Array
    overhead: float = 0.0
    status: str = MEASURED


@dataclass(frozen=True)
class LedgerRow:
    """What one update did to the losses, by the S sources that :class:`UpdateRow` has too. What is not known is NaN.

    Attributes:
        step, epoch, time, overhead: As in :class:`Row`.
        status: :data:`MEASURED`, or the reason why the row does not count.
        burst: Of which burst of neighbouring steps the row is.
        term: (L, T, S) change of each task's unweighted loss by each part of the update of each layer: the mean of both
            ends of the step, corrected.
        left, correction, right: (T, S) over all layers: to first order at the left end as it was measured; what that
            lacks for sharing its batch with the update; at the right end. ``term`` is half their sum.
        head: (T,) as ``term``, by the whole update of what the task has for itself.
        loss_change: (T,) as it was measured on the fixed probe batch.
        drift: (T,) the part of ``loss_change`` that is no part of any gradient: by what the losses detach, such as
            targets made of the present predictions.
    """

    step: int
    epoch: int
    time: float
    burst: int
    term: Array
    left: Array
    correction: Array
    right: Array
    head: Array
    loss_change: Array
    drift: Array
    overhead: float = 0.0
    status: str = MEASURED


@dataclass(frozen=True)
class ProbeLoaderRow:
    """One measurement on independent samples, with the parameters as they are at a step.

    Attributes:
        step, epoch, time, overhead, status: As in :class:`Row`.
        loss: (T,) unweighted, means over the samples.
        gram, gram_noise: (L, T, T), as in :class:`Row`.
        micro_batches, batch_size: In how many it was measured, and of how many samples together.
    """

    step: int
    epoch: int
    time: float
    loss: Array
    gram: Array
    gram_noise: Array
    micro_batches: int
    batch_size: int
    overhead: float = 0.0
    status: str = MEASURED


@runtime_checkable
class LedgerSink(Protocol):
    """What a :class:`Sink` has besides, where it takes rows of a loss ledger. Others are not asked to."""

    def start_ledger(self, header: Header) -> None:
        """Called once, after ``start`` and before the first such row, with the same header."""

    def write_ledger(self, row: LedgerRow) -> None:
        """Called once per step of the ledger, steps increasing, when its right end is known."""


@runtime_checkable
class ProbeLoaderSink(Protocol):
    """What a :class:`Sink` has besides, where it takes rows of the probe loader. Others are not asked to."""

    def start_probe_loader(self, header: Header) -> None:
        """Called once, after ``start`` and before the first such row, with the same header."""

    def write_probe_loader(self, row: ProbeLoaderRow) -> None:
        """Called once per step that was measured so, steps increasing."""


@runtime_checkable
class UpdateSink(Protocol):
    """What a :class:`Sink` has besides, where it takes rows on updates. Others are not asked to."""

    def start_updates(self, header: Header) -> None:
        """Called once, after ``start`` and before the first such row, with the same header."""

    def write_updates(self, row: UpdateRow) -> None:
        """Called once per step whose update was looked at, steps increasing."""


@runtime_checkable
class FeatureSink(Protocol):
    """What a :class:`Sink` has besides, where it takes feature rows. Others are not asked to."""

    def start_features(self, header: FeatureHeader) -> None:
        """Called once, after ``start`` and before the first feature row."""

    def write_features(self, row: FeatureRow) -> None:
        """Called once per step at which features were measured, steps increasing."""


class Sink(Protocol):
    """Takes what a probe measures. Called from the training thread: it must return at once."""

    def start(self, header: Header) -> None:
        """Called once, before the first row."""

    def write(self, row: Row) -> None:
        """Called once per measured step, steps increasing."""

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
        """Called before the first row that needs it: layers were added at the end, a layer has got more parameters, or
        ``reach`` is known better.
        """


@runtime_checkable
class ResumableSink(Sink, Protocol):
    """A sink that keeps rows beyond the process, and can go on with them in another."""

    def rewind(self, step: int, epoch: int) -> None:
        """The training goes on from ``step``: forgets rows from there on, and metrics of epochs after ``epoch``.

        Called before ``start`` where a run is gone on with, and later where the training goes back.
        """
