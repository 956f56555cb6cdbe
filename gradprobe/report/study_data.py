"""What a report draws, reduced to bounded size: arrays by arm and seed, and nothing of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.report.bins import Array

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Ledger:
    """The loss ledger of one run, summed over its complete rows.

    Attributes:
        sources: (S,), what an update comes from: the tasks, weight decay, earlier momentum.
        term: (T, S), change of each task's unweighted loss that each source made on the shared layers.
        head: (T,), the same of the task's private parameters.
        change: (T,), the change that was measured.
        rows: How many rows were summed.
        of: How many there are; the others lack a term.
    """

    sources: tuple[str, ...]
    term: Array
    head: Array
    change: Array
    rows: int
    of: int

    @property
    def residual(self) -> Array:
        """(T,), what the terms explain beyond the measured change: 0 for a complete ledger."""
        total: Array = self.term.sum(axis=1) + self.head - self.change
        return total


@dataclass(frozen=True)
class RunData:
    """One run. B bins of steps that are common to all runs, T tasks and P pairs of the report.

    Attributes:
        arm, seed, file: Names, clean.
        rows: Rows in the file; ``unmeasured`` of them hold no measurement.
        every: Every so many rows were looked at.
        complete: Whether the recording closed its file; ``end`` says how.
        loss, weight: (B, T), medians; NaN where the run has none.
        cosine: (B, P), over all shared layers.
        epochs: Metric -> (E, 2), epoch and value, finite ones.
        test: Metric -> value on the test split.
        ledger: None where it was not recorded.
        probe: Cosine over all shared layers on the probe loader: (R, 1 + P), step first; None: not recorded.
        provenance: As text.
    """

    arm: str
    seed: str
    file: str
    rows: int
    unmeasured: int
    every: int
    complete: bool
    end: str
    loss: Floats
    weight: Floats
    cosine: Floats
    epochs: Mapping[str, Array]
    test: Mapping[str, float]
    ledger: Ledger | None
    probe: Array | None
    provenance: Mapping[str, str]


@dataclass(frozen=True)
class ArmData:
    """The runs of one arm.

    Attributes:
        name: Clean.
        runs: At least one.
        layers: Those that all of its runs share, in execution order; clean and distinct.
        heat: (P, L, B'), cosine by layer and time; NaN where nothing was measured, or noise hides it.
        corrected: Whether ``heat`` is corrected for noise.
    """

    name: str
    runs: Sequence[RunData]
    layers: tuple[str, ...]
    heat: Floats
    corrected: bool

    def stack(self, quantity: str, column: int) -> Array:
        """(seeds, B) of "loss", "weight" or "cosine" for one task or pair."""
        return np.stack([getattr(run, quantity)[:, column] for run in self.runs]).astype(np.float64)


@dataclass(frozen=True)
class StudyData:
    """All of it.

    Attributes:
        arms: The baseline first, where there is one.
        baseline: Its name.
        controls: Names of the arms of single tasks.
        tasks, pairs: Those that are drawn; clean.
        borders: (B + 1,), of the bins of steps.
        heat_borders: (B' + 1,), of those of heatmaps.
        left_out: Counts of what is not drawn because there is too much of it: "arms", "tasks", "pairs".
        targets: Metric -> value to reach.
    """

    arms: Sequence[ArmData]
    baseline: str | None
    controls: Sequence[str]
    tasks: tuple[str, ...]
    pairs: tuple[str, ...]
    borders: Array
    heat_borders: Array
    left_out: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)

    @property
    def runs(self) -> list[RunData]:
        """Of all arms."""
        return [run for arm in self.arms for run in arm.runs]

    @property
    def steps(self) -> Array:
        """(B,), the middle of each bin."""
        middle: Array = (self.borders[:-1] + self.borders[1:] - 1) / 2
        return middle

    def any(self, quantity: str) -> bool:
        """Whether any run has a value of "loss", "weight", "cosine", "ledger", "probe", "epochs" or "test"."""
        return any(_has(getattr(run, quantity)) for run in self.runs)


def _has(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(np.isfinite(value).any())
    return bool(value)
