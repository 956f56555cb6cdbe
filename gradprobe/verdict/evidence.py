"""What a comparison looks at in one run, and its measures: cosines, shares and C. The one file here that reads runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.ledger.windows import Window, window
from gradprobe.measures import Array, first_settled_step, from_norms, over_counted
from gradprobe.runfile import Run, schema
from gradprobe.statistics import Estimate, pooled, pooled_ratio, series_mean

__all__ = ["Evidence", "read"]


_SINGLE = "single"
"""The trainer of the controls: one task alone."""

CONDITIONS = {
    "data": ("data.fingerprint",),
    "initial weights": ("model.reference",),
    "batches": ("batches.hash",),
    "budget": (
        "batches.count",
        "settings.epochs",
        "settings.batch_size",
        "settings.imgsz",
        "settings.cfg",
        "settings.micro_batches",
    ),
}
"""What has to be equal in the runs of a seed, and the entries of the provenance that show it."""

SHOULD_BE_EQUAL = ("optimizer", "lr", "lrf", "momentum", "weight_decay", "clip_norm", "bn_batches")
"""Other settings that change a training; a difference in them is a caution."""


@dataclass(frozen=True)
class Rows:
    """Gramians of one stream, rows in order of time.

    Attributes:
        step: (n,).
        gram, noise: (n, L, T, T); NaN where not measured.
        batch_size: (n,) samples behind a row; 0: unknown.
        counts: (n, L, T) bool: whose gradient counts on which layer in a row's sums; None: everybody's.
    """

    step: NDArray[np.int64]
    gram: Array
    noise: Array
    batch_size: NDArray[np.int64]
    counts: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class SplitScores:
    """The test split.

    Attributes:
        values: Metric -> value.
        clusters: (K,) names of what is independent in it; empty: not recorded.
        without: Metric -> (K,) values with one cluster left out.
    """

    values: Mapping[str, float]
    clusters: tuple[str, ...] = ()
    without: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Evidence:
    """One run, as far as a comparison needs it.

    Attributes:
        file: Its name, without folder.
        arm: Which arm it belongs to.
        trainer: As it was recorded.
        single: The task, where it trains one alone; empty: it trains all.
        seed: None: the file does not say.
        tasks, layers: Names, (T,) and (L,).
        reach: (L, T).
        layer_size: (L,).
        finished: Whether the recording came to its end.
        provenance: All of it, with dotted names.
        step: (n,) of the rows at the root, which are single minibatches.
        loss, weight: (n, T) of those rows.
        batch_size: (n,) of those rows; 0: unknown.
        content: A hash of what those rows hold: equal for the same run made twice.
        made: A hash of when they were measured: equal for copies of one file.
        training: Those rows' Gramians; None: their noise part was not recorded.
        probed: Rows on independent batches at frozen parameters; None: not recorded.
        ledger: The loss ledger by name, as ``run.ledger``; empty: not recorded.
        tested: The test split.
    """

    file: str
    arm: str
    trainer: str
    single: str
    seed: int | None
    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    reach: NDArray[np.bool_]
    layer_size: NDArray[np.int64]
    finished: bool
    provenance: Mapping[str, Any]
    step: NDArray[np.int64]
    loss: Array
    weight: Array
    batch_size: NDArray[np.int64]
    content: str
    made: str
    training: Rows | None = None
    probed: Rows | None = None
    ledger: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    tested: SplitScores = field(default_factory=lambda: SplitScores({}))

    @cached_property
    def conditions(self) -> dict[str, dict[str, Any]]:
        """What the file says of each of :data:`CONDITIONS`; empty: nothing."""
        provenance = self.provenance
        return {name: {key: provenance[key] for key in keys if key in provenance} for name, keys in CONDITIONS.items()}

    @cached_property
    def setting(self) -> dict[str, Any]:
        """The settings of the training."""
        return self._group("settings.")

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What was fixed before the runs."""
        return self._group("plan.")

    def _group(self, group: str) -> dict[str, Any]:
        return {key.removeprefix(group): value for key, value in self.provenance.items() if key.startswith(group)}

    @property
    def samples(self) -> int:
        """Number of training samples; 0: the file does not say."""
        return int(self.provenance.get("data.train_images", 0) or 0)

    @property
    def ledger_on_probe_batch(self) -> bool:
        """Whether the ledger values updates by the gradients of its fixed probe batch, and not by the training's."""
        provenance = self.provenance
        return str(provenance.get("probe.ledger.ends", provenance.get("settings.ledger_ends", ""))) == "probe"

    def weights_at(self, steps: NDArray[np.int64]) -> Array:
        """(k, T) weights in force at these steps: of the newest row up to each, or of the first one."""
        if not len(self.step):
            return np.full((len(steps), len(self.tasks)), math.nan)
        place = np.searchsorted(self.step, steps, side="right") - 1
        result: Array = self.weight[np.maximum(place, 0)]
        return result


def read(path: Path, arm: str = "") -> Evidence:
    """The evidence of one run file.

    Args:
        path: The file.
        arm: Name of the arm; empty: the file's own.

    Raises:
        RunFileError: As on opening a run.
    """
    with Run(path) as run:
        provenance = run.provenance
        trainer = str(provenance.get("trainer", "") or "")
        single = str(provenance.get("settings.task", "") or "") if trainer == _SINGLE else ""
        return Evidence(
            file=path.name,
            arm=arm
            or str(provenance.get("arm", "") or "")
            or (f"{trainer}-{single}" if single else trainer or path.stem),
            trainer=trainer,
            single=single,
            seed=_seed(provenance),
            tasks=tuple(run.tasks),
            layers=tuple(run.layers),
            reach=run.reach,
            layer_size=run.layer_size,
            finished=run.end == "finished",
            provenance=provenance,
            step=run["step"],
            loss=run["loss"].astype(np.float64),
            weight=run["weight"].astype(np.float64),
            batch_size=run["batch_size"],
            content=_hash(run, ("step", "loss", "weight", "grad_norm", "cosine")),
            made=_hash(run, ("time", "overhead")),
            training=_training(run),
            probed=_probed(run),
            ledger=run.ledger,
            tested=_tested(run),
        )


def _seed(provenance: Mapping[str, Any]) -> int | None:
    found = provenance.get("settings.seed", provenance.get("seed"))
    return None if found is None or isinstance(found, str) else int(found)


def _hash(run: Run, names: Sequence[str]) -> str:
    digest = hashlib.sha256(str(run.file_time).encode() if not len(run) else b"")
    for name in names:
        digest.update(np.ascontiguousarray(run[name]).tobytes())
    return digest.hexdigest()


def _training(run: Run) -> Rows | None:
    noise = run.gram_noise()
    return None if noise is None else Rows(run["step"], run.gram(), noise, run["batch_size"], run.counts())


def _probed(run: Run) -> Rows | None:
    table = run.probe_loader
    if not table:
        return None
    good = np.asarray(table["status"]) == 0
    gram = from_norms(table["grad_norm"][good], table["cosine"][good])
    noise = np.asarray(table["gram_noise"][good], dtype=np.float64)
    counts = run.counts(table=schema.PROBE_LOADER)[good]
    return Rows(table["step"][good], gram, noise, table["batch_size"][good], counts)


def _tested(run: Run) -> SplitScores:
    values = {
        key.removeprefix("test."): float(value)
        for key, value in run.provenance.items()
        if key.startswith("test.") and isinstance(value, (int, float, np.number))
    }
    table = run.test_clusters
    if not table:
        return SplitScores(values)
    without = np.asarray(table["without"], dtype=np.float64)
    columns = {str(name): without[:, m] for m, name in enumerate(table["metric"])}
    return SplitScores(values, tuple(map(str, table["cluster"])), columns)


Span = tuple[int, int] | None
"""Training steps that count, from the first up to before the second; None: all."""


@dataclass(frozen=True)
class Pair:
    """An ordered pair of tasks: what ``by`` does to ``task``."""

    task: str
    by: str

    @property
    def name(self) -> str:
        """``cls>det``: what cls does to det."""
        return f"{self.by}>{self.task}"

    @property
    def unordered(self) -> str:
        """``det|cls`` is the same pair for the cosine."""
        return f"{self.task}|{self.by}"


def shared_layers(run: Evidence, tasks: Sequence[str]) -> set[str]:
    """Layers that all of these tasks reach."""
    if run.single or not all(task in run.tasks for task in tasks):
        return set()
    columns = [run.tasks.index(task) for task in tasks]
    return {name for name, reached in zip(run.layers, run.reach[:, columns], strict=True) if reached.all()}


def layer_places(run: Evidence, layers: Sequence[str]) -> NDArray[np.intp]:
    """Where layers are in a run, in its order."""
    wanted = set(layers)
    return np.array([i for i, name in enumerate(run.layers) if name in wanted], dtype=np.intp)


def gradient_rows(run: Evidence) -> Rows | None:
    """The rows that a claim on gradients may rest on: of the probe loader, else of the training with their noise."""
    return run.probed if run.probed is not None else run.training


def estimate(
    run: Evidence, layers: Sequence[str], tasks: Sequence[str], span: Span = None, *, apart: bool = False
) -> Estimate | None:
    """The pooled estimate of some tasks over some layers together; None: nothing was recorded in micro-batches.

    Args:
        run: One run.
        layers: Names; those that it has.
        tasks: Names, in the order of the estimate.
        span: Which steps count.
        apart: Each layer by itself, in the run's order, instead of all together.
    """
    return _estimate(run, tuple(layers), tuple(tasks), span, apart)


@lru_cache(maxsize=1024)  # several questions and gates ask for the same
def _estimate(
    run: Evidence, layers: tuple[str, ...], tasks: tuple[str, ...], span: Span, apart: bool
) -> Estimate | None:
    rows = gradient_rows(run)
    if rows is None:
        return None
    gram, noise, chosen = _over_layers(run, rows, layers, tasks, span, apart)
    size = rows.batch_size[chosen].astype(np.float64)
    return pooled(gram, noise, np.where(size > 0, size, math.nan))


def _over_layers(
    run: Evidence, rows: Rows, layers: Sequence[str], tasks: Sequence[str], span: Span, apart: bool
) -> tuple[Array, Array, NDArray[np.bool_]]:
    chosen = _inside(rows.step, span)
    columns = np.array([run.tasks.index(task) for task in tasks], dtype=np.intp)
    given, there = np.flatnonzero(chosen), layer_places(run, layers)
    where = np.ix_(given, there, columns, columns)
    gram, noise = (np.asarray(one[where], dtype=np.float64) for one in (rows.gram, rows.noise))
    if not apart:
        counts = (
            np.ones(gram.shape[:-1], dtype=bool) if rows.counts is None else rows.counts[np.ix_(given, there, columns)]
        )
        every = np.broadcast_to(counts.all(axis=-1, keepdims=True), counts.shape)  # what all of them reach at that row
        gram, noise = over_counted(gram, every), over_counted(noise, every)
    return gram, noise, chosen


def _inside(step: NDArray[np.int64], span: Span) -> NDArray[np.bool_]:
    """(n,): which steps count."""
    if span is None:
        return np.ones(len(step), dtype=bool)
    found: NDArray[np.bool_] = (step >= span[0]) & (step < span[1])
    return found


@dataclass(frozen=True)
class Shares:
    """Who decides the update.

    Attributes:
        share: (T,) of the summed squared lengths of the weighted gradients, less their noise; NaN: a gradient cannot
            be distinguished from noise.
        largest: The largest of them.
    """

    share: Array
    largest: float


def shares(run: Evidence, layers: Sequence[str], span: Span = None) -> Shares | None:
    """The shares of all tasks over some layers; None: nothing was recorded in micro-batches."""
    rows = gradient_rows(run)
    found = estimate(run, layers, run.tasks, span)
    if rows is None or found is None:
        return None
    gram, noise, chosen = _over_layers(run, rows, layers, run.tasks, span, apart=False)
    weight = run.weights_at(rows.step[chosen])
    square = np.diagonal(gram - noise, axis1=1, axis2=2) * np.square(weight)
    known = np.isfinite(square).all(axis=1)
    total = square[known].sum(axis=0)
    if not known.any() or not found.square_resolved.all() or total.sum() <= 0:
        return Shares(np.full(len(run.tasks), math.nan), math.nan)
    share = total / total.sum()
    return Shares(share, float(share.max()))


@dataclass(frozen=True)
class DirectEffect:
    """What an arm's weights would do at the baseline's own checkpoints: ``-sum w_j U_ij / sum w_i U_ii``.

    Attributes:
        above, below: What is divided by what, means over rows.
        value: The ratio, on the scale of C: above 0, ``by`` cancels progress of ``task``. NaN: the gradient of ``task``
            cannot be distinguished from noise, so that what is divided by may be 0; or fewer than three rows.
    """

    above: float
    below: float
    value: float


def direct_effect(
    baseline: Evidence, arm: Evidence, pair: Pair, layers: Sequence[str], span: Span = None
) -> DirectEffect | None:
    """That of an arm's weights, at the checkpoints of one run of the baseline.

    With ``arm`` the baseline itself, that of its own weights. None: nothing was recorded in micro-batches, or the arm
    has no weights.
    """
    rows = gradient_rows(baseline)
    if rows is None or not len(arm.step):
        return None
    gram, noise, chosen = _over_layers(baseline, rows, layers, (pair.task, pair.by), span, apart=False)
    true = gram - noise
    weight = arm.weights_at(rows.step[chosen])
    own, other = (weight[:, arm.tasks.index(task)] for task in (pair.task, pair.by))
    resolved = estimate(baseline, layers, (pair.task, pair.by), span)
    known = resolved is not None and bool(resolved.square_resolved[0])
    above, below = -other * true[:, 0, 1], own * true[:, 0, 0]
    ratio = float(pooled_ratio(above, below).mean) if known else math.nan
    return DirectEffect(float(series_mean(above).mean), float(series_mean(below).mean), ratio)


def ledger_window(run: Evidence, layers: Sequence[str], span: Span = None) -> Window | None:
    """The window sums of a run's ledger, with C over these layers; None: there is no ledger.

    The first steps of Adam are left out, and those of an optimizer that the file does not name.
    """
    return _ledger_window(run, tuple(layers), span)


@lru_cache(maxsize=1024)
def _ledger_window(run: Evidence, layers: tuple[str, ...], span: Span) -> Window | None:
    if not run.ledger:
        return None
    start, stop = span if span is not None else (0, np.inf)
    start = max(start, first_settled_step(str(run.setting.get("optimizer", ""))))
    return window(run.ledger, run.tasks, start=start, stop=stop, layers=[int(i) for i in layer_places(run, layers)])


@dataclass(frozen=True)
class Cancelled:
    """What C of an ordered pair divides by what, in one run; both are means over the rows that count.

    Attributes:
        cancelled: What ``by`` took off the progress of ``task`` over some layers, in units of that loss per row.
        own: What the task's own part of the updates of those layers took off its loss, in the same unit.
        own_error: Its standard error.
    """

    cancelled: float
    own: float
    own_error: float


def cancelled(run: Evidence, layers: Sequence[str], pair: Pair, span: Span = None) -> Cancelled:
    """Both parts of C, whether or not a gate of the window is closed. The run must have a ledger."""
    found = ledger_window(run, layers, span)
    assert found is not None
    i, j, rows = run.tasks.index(pair.task), run.tasks.index(pair.by), len(found.rows)
    order = [run.layers.index(name) for name in layers]
    term = np.asarray(run.ledger["term"], dtype=np.float64)[found.rows][:, order, i, j]
    parts = (float(np.nansum(term)), float(found.own[i]), float(found.own_error[i]))
    return Cancelled(*(part / rows if rows else math.nan for part in parts))


def ledger_by_layer(run: Evidence, found: Window, pair: Pair, layers: Sequence[str]) -> Array:
    """Each layer's part of C, (L',) in the order of ``layers``; they sum to C."""
    i, j = run.tasks.index(pair.task), run.tasks.index(pair.by)
    order = [run.layers.index(name) for name in layers]
    term = np.asarray(run.ledger["term"], dtype=np.float64)[found.rows][:, order, i, j]
    result: Array = np.nansum(term, axis=0) / found.own[i]  # a layer that joined later is in no row before
    return result
