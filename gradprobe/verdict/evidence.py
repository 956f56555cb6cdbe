"""What a comparison looks at in one run, and how it is read from the run's file. The one file here that reads runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.measures import Array, from_norms
from gradprobe.runfile import Run, schema

SINGLE = "single"
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
"""Settings that change a training too; a difference in them is told."""


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
class Scores:
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
    tested: Scores = field(default_factory=lambda: Scores({}))

    @cached_property
    def conditions(self) -> dict[str, dict[str, Any]]:
        """What the file says of each of :data:`CONDITIONS`; empty: nothing."""
        said = self.provenance
        return {name: {key: said[key] for key in keys if key in said} for name, keys in CONDITIONS.items()}

    @cached_property
    def setting(self) -> dict[str, Any]:
        """The settings of the training."""
        return self._said("settings.")

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What was fixed before the runs."""
        return self._said("plan.")

    def _said(self, group: str) -> dict[str, Any]:
        return {key.removeprefix(group): value for key, value in self.provenance.items() if key.startswith(group)}

    @property
    def samples(self) -> int:
        """Number of training samples; 0: the file does not say."""
        return int(self.provenance.get("data.train_images", 0) or 0)

    @property
    def ledger_on_probe_batch(self) -> bool:
        """Whether the ledger values updates by the gradients of its fixed probe batch, and not by the training's."""
        said = self.provenance
        return str(said.get("probe.ledger.ends", said.get("settings.ledger_ends", ""))) == "probe"

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
        said = run.provenance
        trainer = str(said.get("trainer", "") or "")
        single = str(said.get("settings.task", "") or "") if trainer == SINGLE else ""
        return Evidence(
            file=path.name,
            arm=arm or str(said.get("arm", "") or "") or (f"{trainer}-{single}" if single else trainer or path.stem),
            trainer=trainer,
            single=single,
            seed=_seed(said),
            tasks=tuple(run.tasks),
            layers=tuple(run.layers),
            reach=run.reach,
            layer_size=run.layer_size,
            finished=run.end == "finished",
            provenance=said,
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


def _seed(said: Mapping[str, Any]) -> int | None:
    found = said.get("settings.seed", said.get("seed"))
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


def _tested(run: Run) -> Scores:
    values = {
        key.removeprefix("test."): float(value)
        for key, value in run.provenance.items()
        if key.startswith("test.") and isinstance(value, (int, float, np.number))
    }
    table = run.test_clusters
    if not table:
        return Scores(values)
    without = np.asarray(table["without"], dtype=np.float64)
    columns = {str(name): without[:, m] for m, name in enumerate(table["metric"])}
    return Scores(values, tuple(map(str, table["cluster"])), columns)
