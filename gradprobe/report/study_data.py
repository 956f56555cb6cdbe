"""What a report draws, reduced to bounded size: arrays by arm and seed, read from one run file at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.foreign import clean
from gradprobe.ledger.windows import window
from gradprobe.report import bins
from gradprobe.report.bins import Array, Floats
from gradprobe.report.chart import distinct
from gradprobe.runfile import Run, schema, thin

__all__ = ["ArmFiles"]


@dataclass(frozen=True)
class LedgerSums:
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
    ledger: LedgerSums | None
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
        return bins.centres(self.borders)

    def any(self, quantity: str) -> bool:
        """Whether any run has a value of "loss", "weight", "cosine", "ledger", "probe", "epochs" or "test"."""
        return any(_has(getattr(run, quantity)) for run in self.runs)


def _has(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(np.isfinite(value).any())
    return bool(value)


_ARMS, TASKS, _PAIRS = 24, 6, 3
"""Drawn at most; what is left out is counted."""

_CELLS = 300_000
"""Cells of all heatmaps together, at most."""

_FACTS = ("trainer", "machine", "system", "steps_per_epoch", "level")
_GROUPS = ("settings", "data", "model", "probe", "probe_loader", "versions", "batches", "plan", "hyp", "test")
_LONGEST_FACT = 300


@dataclass(frozen=True)
class ArmFiles:
    """What belongs to an arm: its files, and the seed of each, in the same order."""

    name: str
    files: Sequence[Path]
    seeds: Sequence[object]


def gather(
    arms: Sequence[ArmFiles],
    baseline: str | None = None,
    controls: Sequence[str] = (),
    targets: Mapping[str, float] | None = None,
    span: tuple[int, int] | None = None,
) -> StudyData:
    """Everything a report draws.

    Args:
        arms: At least one with a file.
        baseline: The arm that the others are compared with; drawn first.
        controls: Arms of single tasks.
        targets: Metric -> value to reach.
        span: Steps of the ledger that count, from the first to before the second; None: all.

    Raises:
        RunFileError: One cannot be read.
    """
    ordered = sorted(arms, key=lambda arm: (arm.name != baseline, arm.name in controls))
    shown = ordered[:_ARMS]
    frame = _frame(shown, span)
    left = {"arms": len(ordered) - len(shown), **frame.left_out}
    return StudyData(
        [_arm(arm, frame) for arm in shown],
        clean(baseline) if baseline is not None else None,
        [clean(name) for name in controls],
        tuple(clean(t) for t in frame.tasks),
        tuple(clean(p.replace("|", " | ")) for p in frame.pairs),
        frame.borders,
        frame.heat_borders,
        {name: number for name, number in left.items() if number},
        dict(targets or {}),
    )


@dataclass(frozen=True)
class _Frame:
    """What all runs are put into.

    Attributes:
        tasks, pairs: Those that are drawn, as they are recorded.
        borders: Of the bins of steps; ``heat_borders`` of those of heatmaps.
        span: Steps of the ledger that count.
        left_out: How many tasks and pairs are not drawn.
    """

    tasks: Sequence[str]
    pairs: Sequence[str]
    borders: Array
    heat_borders: Array
    span: tuple[int, int] | None
    left_out: Mapping[str, int]


def _frame(arms: Sequence[ArmFiles], span: tuple[int, int] | None) -> _Frame:
    """The tasks and pairs of all runs, in the order of the first, and the bins that hold all their steps."""
    tasks: dict[str, None] = {}
    pairs: dict[str, None] = {}
    first, last, rows, cells, corrected = 0, 0, 1, 0, False
    for arm in arms:
        width = 0
        for path in arm.files:
            with Run(path) as run:
                tasks |= dict.fromkeys(run.tasks)
                pairs |= dict.fromkeys(run.pairs)
                corrected |= "gram_noise" in run
                width = max(width, len(run.layers))
                if len(run):
                    steps = run["step"]
                    first, last = min(first, int(steps.min())), max(last, int(steps.max()))
                    rows = max(rows, len(run))
        cells += width
    chosen = _telling(arms, list(pairs))
    borders = bins.edges(first, last, rows)
    most = min(len(borders) - 1, max(_CELLS // max(cells * len(chosen), 1), bins.FEWEST_COLUMNS))
    count = bins.heat_columns(rows, corrected, most)
    kept = list(tasks)[:TASKS]
    left = {"tasks": len(tasks) - len(kept), "pairs": len(pairs) - len(chosen)}
    return _Frame(kept, chosen, borders, np.linspace(borders[0], borders[-1], count + 1), span, left)


def _telling(arms: Sequence[ArmFiles], pairs: list[str]) -> list[str]:
    """The pairs with the lowest median cosine in the first arm's first run, where there are too many."""
    if len(pairs) <= _PAIRS:
        return pairs
    with Run(arms[0].files[0]) as whole:
        run = thin.thin(whole)
        middle = dict(zip(run.pairs, bins.quietly(np.nanmedian, run.cosine()), strict=True)) if len(run) else {}
    order = sorted(pairs, key=lambda pair: (not np.isfinite(middle.get(pair, np.nan)), middle.get(pair, np.nan)))
    return order[:_PAIRS]


def _arm(arm: ArmFiles, frame: _Frame) -> ArmData:
    read = [_run(arm.name, path, seed, frame) for path, seed in zip(arm.files, arm.seeds, strict=True)]
    layers, cosines, corrected = bins.heat_of_arm([found for _, found in read])
    return ArmData(clean(arm.name), [data for data, _ in read], tuple(distinct(layers)), cosines, corrected)


def _run(arm: str, path: Path, seed: object, frame: _Frame) -> tuple[RunData, bins.RunCosines]:
    with Run(path) as whole:
        run = thin.thin(whole)
        place, count = bins.places(run["step"], frame.borders), len(frame.borders) - 1
        data = RunData(
            clean(arm),
            clean(seed),
            clean(path.name),
            len(whole),
            int(np.count_nonzero(whole["status"])),
            thin.every(run),
            whole.complete,
            clean(whole.end),
            _columns(bins.medians(run["loss"], place, count), run.tasks, frame.tasks),
            _columns(bins.medians(run["weight"], place, count), run.tasks, frame.tasks),
            _columns(bins.medians(run["shared_cosine"], place, count), run.pairs, frame.pairs),
            _epochs(whole),
            _test(whole.provenance),
            _ledger(whole, frame.tasks, frame.span),
            _probe(whole, frame.pairs),
            _facts(whole.provenance),
        )
        return data, _heat(run, frame)


def _heat(run: Run, frame: _Frame) -> bins.RunCosines:
    place, count = bins.places(run["step"], frame.heat_borders), len(frame.heat_borders) - 1
    naive = bins.median_cosines(run["cosine"], run.pairs, frame.pairs, place, count)
    shared = np.flatnonzero(run.shared_reach.any(axis=1))
    names = [run.layers[i] for i in shared]
    if "gram_noise" not in run:
        return bins.RunCosines(names, naive[:, shared], None)
    true = run.gram() - run["gram_noise"]
    return bins.RunCosines(
        names, naive[:, shared], bins.pair_sums(true[:, shared], run.pairs, frame.pairs, place, count)
    )


def _columns(values: NDArray[Any], have: Sequence[str], want: Sequence[str]) -> Floats:
    """(B, have) -> (B, want); NaN for what the run does not have."""
    return _rows(values.T, have, want).T


def _rows(values: NDArray[Any], have: Sequence[str], want: Sequence[str]) -> NDArray[Any]:
    """(have, ...) -> (want, ...); NaN for what the run does not have."""
    result = np.full((len(want), *values.shape[1:]), np.nan, values.dtype)
    for i, name in enumerate(want):
        if name in have:
            result[i] = values[list(have).index(name)]
    return result


def _epochs(run: Run) -> dict[str, Array]:
    table = dict(run.epochs)
    epoch = table.pop("epoch").astype(np.float64)
    known = {clean(name): np.stack([epoch, v], axis=1)[np.isfinite(v)] for name, v in table.items()}
    return {name: _spaced(values) for name, values in known.items() if len(values)}


def _spaced(values: Array) -> Array:
    """At most :data:`gradprobe.report.bins.BINS` of the rows, the last one among them."""
    if len(values) <= bins.BINS:
        return values
    kept: Array = values[np.unique(np.linspace(0, len(values) - 1, bins.BINS).round().astype(int))]
    return kept


def _test(provenance: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in provenance.items():
        if name.startswith("test.") and isinstance(value, (int, float, np.number)) and np.isfinite(value):
            found[clean(name.removeprefix("test."))] = float(value)
    return found


def _ledger(run: Run, tasks: Sequence[str], span: tuple[int, int] | None) -> LedgerSums | None:
    """Sums over the rows that a verdict counts."""
    table = run.ledger
    if not table or not len(table["step"]):
        return None
    start, stop = span if span is not None else (0, math.inf)
    start = max(start, measures.first_settled_step(str(run.provenance.get("settings.optimizer", ""))))
    found = window(table, run.tasks, start=start, stop=stop)
    if not len(found.rows):
        return None
    term, head, change = (_rows(values, run.tasks, tasks) for values in (found.term, found.head, found.change))
    names = tuple(clean(source) for source in run.sources)
    return LedgerSums(names, term, head, change, len(found.rows), len(found.rows) + sum(found.left_out.values()))


def _probe(run: Run, pairs: Sequence[str]) -> Array | None:
    """Steps and pooled cosines on the probe loader; NaN where noise hides one, as in the heatmaps: none is cut off."""
    table = run.probe_loader
    if not table or not len(table["step"]):
        return None
    true = measures.from_norms(table["grad_norm"], table["cosine"]) - table["gram_noise"]
    steps, where = np.unique(table["step"], return_inverse=True)
    found = np.full((len(steps), len(run.pairs)), np.nan, np.float32)
    counts = run.counts(table=schema.PROBE_LOADER)
    for p, (a, b) in enumerate(zip(*measures.pair_index(len(run.tasks)), strict=True)):
        both: NDArray[np.bool_] = np.all(counts[:, :, [a, b]], axis=2)
        if both.any():  # a pair that shares no layer has no angle
            every = np.repeat(both[..., None], len(run.tasks), axis=-1)
            total = bins.sums(measures.over_counted(true, every), where, len(steps))
            found[:, p] = bins.pooled_cosines(np.stack([total[:, a, b], total[:, a, a], total[:, b, b]], axis=-1))
    values = _columns(found, run.pairs, pairs)
    return _spaced(np.concatenate([steps[:, None].astype(np.float64), values], axis=1))


def _facts(provenance: Mapping[str, Any]) -> dict[str, str]:
    """What the file says of where it is from, as text; personal names and folders are not in it."""
    found = {}
    for name, value in provenance.items():
        if name in _FACTS or name.split(".")[0] in _GROUPS:
            text = " ".join(map(str, value)) if isinstance(value, (list, tuple, np.ndarray)) else str(value)
            found[clean(name)] = clean(text, _LONGEST_FACT)
    return found
