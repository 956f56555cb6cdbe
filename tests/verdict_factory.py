"""Runs whose direction, interference, dominance and outcome are planted, each apart from the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.rows import Header, LedgerRow, ProbeLoaderRow, Row, TestClusters
from gradprobe.runfile import RunWriter
from gradprobe.statistics import noise_part
from gradprobe.verdict.evidence import Evidence, Rows, SplitScores

TASKS = ("det", "cls")
MICRO = np.full(4, 0.25)
METRICS = {"mAP50": 0.6, "mAP50-95": 0.35, "accuracy": 0.8}
ALONE = {"mAP50": 0.7, "mAP50-95": 0.45, "accuracy": 0.9}
SETTLED = 20
"""The first steps of Adam, which a ledger's window leaves out."""
OWNER = {"mAP50": "det", "mAP50-95": "det", "accuracy": "cls"}


@dataclass(frozen=True)
class Truth:
    """What an arm's runs are drawn about.

    Attributes:
        cosine: Of the two true gradients.
        cancelled: C by pair.
        weight: In force throughout.
        metrics: On the test split.
        spread: Standard deviation over seeds of the paired differences of all of them.
        resolved: How many of its standard errors a run's own progress is above 0; 0: very many.
    """

    cosine: float = -0.3
    cancelled: Mapping[str, float] = field(default_factory=lambda: {"cls>det": 0.5, "det>cls": 0.2})
    weight: tuple[float, float] = (1.0, 1.0)
    metrics: Mapping[str, float] = field(default_factory=lambda: dict(METRICS))
    spread: float = 0.02
    resolved: float = 0.0

    def but(self, **changes: Any) -> Truth:
        """The same with some of it otherwise."""
        return replace(self, **changes)


def provenance(seed: int, trainer: str, **more: Any) -> dict[str, Any]:
    return {
        "trainer": trainer,
        "settings.seed": seed,
        "settings.optimizer": "AdamW",
        "settings.epochs": 3,
        "settings.batch_size": 16,
        "settings.lr": 0.01,
        "data.fingerprint": "a-fingerprint",
        "data.train_images": 100_000,
        "model.reference": f"weights-of-{seed}",
        "batches.hash": f"batches-of-{seed}",
        "batches.count": 120,
        "self_check": np.array([1.0, -1.0]),
        **more,
    }


def gradients(rng: np.random.Generator, cosine: float, rows: int, layers: int, noise: float) -> tuple[Any, Any]:
    """Gramians (rows, layers, 2, 2) of two gradients with this cosine on every layer, and their noise parts."""
    size = 8
    truth = np.zeros((layers, 2, size))
    truth[:, 0, 0] = 1.0
    truth[:, 1, 0], truth[:, 1, 1] = cosine, np.sqrt(1 - cosine**2)
    micro = truth[:, None] + noise / np.sqrt(size) * 2 * rng.normal(size=(rows, layers, len(MICRO), 2, size))
    mean = micro.mean(axis=2)
    gram = mean @ np.swapaxes(mean, -1, -2)
    within = np.einsum("a,rlatd,rlaud->rltu", np.square(MICRO), micro, micro)
    return gram, noise_part(gram, within, MICRO)


def shortened(run: Evidence, shrunk: float = 0.8) -> Evidence:
    """The same run, of whose first task's lone progress so much is lost as its steps are shorter."""
    if not run.ledger:
        return run
    own = np.diagonal(run.ledger["term"][..., : len(TASKS)], axis1=2, axis2=3)
    return replace(run, ledger={**run.ledger, "alone": own / np.array([1 - shrunk, 1.0])})


def ledger(
    rng: np.random.Generator, truth: Mapping[str, float], rows: int, layers: int, resolved: float = 0.0
) -> dict[str, Any]:
    """A ledger whose C is that of ``truth``: what is measured is what the terms sum to, and a little beside."""
    own = np.array([0.01, 0.02])
    term = np.zeros((rows, layers, 2, 4))
    for i, task in enumerate(TASKS):
        for j, by in enumerate(TASKS):
            part = -own[i] if i == j else own[i] * truth[f"{by}>{task}"]
            term[:, :, i, j] = part / layers * (1 + 0.05 * rng.normal(size=(rows, layers)))
        if resolved:
            noise = own[i] * np.sqrt((rows - SETTLED) / layers) / resolved
            term[:, :, i, i] += noise * rng.normal(size=(rows, layers))
        term[:, :, i, 2] = 1e-4 / layers
    head = np.tile(-0.005, (rows, 2))
    change = term.sum(axis=(1, 3)) + head + 2e-4 * rng.normal(size=(rows, 2))
    return {
        "step": np.arange(rows),
        "burst": np.zeros(rows, dtype=int),
        "term": term,
        "head": head,
        "loss_change": change,
        "status": np.zeros(rows, dtype=int),
    }


def make(
    arm: str,
    seed: int,
    truth: Truth,
    rng: np.random.Generator,
    *,
    common: float = 0.0,
    rows: int = 60,
    layers: int = 3,
    clusters: int = 12,
    **more: Any,
) -> Evidence:
    """One run. ``common`` is what its seed does to all arms alike."""

    def drawn(value: float) -> float:
        return value + common + truth.spread / np.sqrt(2) * rng.normal()

    cosine = float(np.clip(drawn(truth.cosine), -0.95, 0.95))
    gram, noise = gradients(rng, cosine, rows, layers, 0.4)
    factor = np.exp(truth.spread / 4 * rng.normal(size=2))
    names = tuple(f"model.{i}.conv" for i in range(layers))
    step = np.arange(rows) * 2
    first = np.random.default_rng(seed)  # the same batch and weights in all arms: the same first losses
    loss = 2 * np.exp(-np.arange(rows) / rows)[:, None] * np.array([1.0, 0.5]) * rng.uniform(0.98, 1.02, (rows, 2))
    loss[0] = first.uniform(1, 2, 2)
    metrics = {name: drawn(value) for name, value in truth.metrics.items()}
    without = {name: metrics[name] + 0.002 * rng.normal(size=clusters) / clusters for name in metrics}
    return Evidence(
        file=f"{arm}-{seed}.h5",
        arm=arm,
        trainer=arm,
        single="",
        seed=seed,
        tasks=TASKS,
        layers=names,
        reach=np.ones((layers, 2), dtype=bool),
        layer_size=np.full(layers, 100),
        finished=True,
        provenance=provenance(seed, arm, **more),
        step=step,
        loss=loss,
        weight=np.tile(factor * truth.weight, (rows, 1)),
        batch_size=np.full(rows, 16),
        content=f"{arm}-{seed}",
        made=f"{arm}-{seed}",
        probed=Rows(step, gram, noise, np.full(rows, 64)),
        ledger=ledger(rng, {k: drawn(v) for k, v in truth.cancelled.items()}, 2 * rows, layers, truth.resolved),
        tested=SplitScores(metrics, tuple(f"clip-{k}" for k in range(clusters)), without),
    )


def alone(task: str, seed: int, rng: np.random.Generator, common: float = 0.0, clusters: int = 12) -> Evidence:
    """A control: no gradients of two tasks, only what it reaches on the test split."""
    run = make("single", seed, Truth(metrics=ALONE), rng, common=common, clusters=clusters, rows=4)
    mine = {name: value for name, value in run.tested.values.items() if OWNER[name] == task}
    kept = {name: run.tested.without[name] for name in mine}
    said = {**run.provenance, "settings.task": task}
    return replace(
        run,
        file=f"single-{task}-{seed}.h5",
        arm=f"single-{task}",
        single=task,
        provenance=said,
        content=f"single-{task}-{seed}",
        made=f"single-{task}-{seed}",
        probed=None,
        ledger={},
        tested=SplitScores(mine, run.tested.clusters, kept),
    )


AGAIN = "another time"


def again(run: Evidence) -> Evidence:
    """The same run, made a second time."""
    return replace(run, file=run.file.replace(".h5", "-again.h5"), made=AGAIN)


def study(
    arms: Mapping[str, Truth],
    seeds: Sequence[int] = range(5),
    *,
    draw: int = 0,
    controls: bool = True,
    twice: bool = True,
    **more: Any,
) -> list[Evidence]:
    """All runs of a study; unless ``twice`` is false, the first run of the first arm is there a second time."""
    rng = np.random.default_rng(draw)
    common = {seed: 0.05 * rng.normal() for seed in seeds}
    found = [make(arm, seed, truth, rng, common=common[seed], **more) for arm, truth in arms.items() for seed in seeds]
    if controls:
        found += [alone(task, seed, rng, common[seed]) for task in TASKS for seed in seeds]
    return [*found, again(found[0])] if twice else found


def write(folder: Path, run: Evidence) -> Path:
    """A run file that holds what the evidence does."""
    header = Header(run.tasks, run.layers, run.layer_size, run.reach, run.provenance)
    path = folder / run.file
    writer = RunWriter(path, overwrite=True)
    writer.start(header)
    nothing = np.full((len(run.layers), len(run.tasks), len(run.tasks)), np.nan)
    for k, step in enumerate(run.step):
        row = Row(
            int(step),
            0,
            k + 0.5 * (run.made == AGAIN),
            run.loss[k],
            run.weight[k],
            nothing,
            batch_size=int(run.batch_size[k]),
        )
        if run.training is not None:
            row = replace(row, gram=run.training.gram[k], gram_noise=run.training.noise[k], micro_batches=len(MICRO))
        writer.write(row)
    if run.probed is not None:
        for row in probed_rows(run):
            writer.write(row)
    if run.ledger:
        for row in ledger_rows(run):
            writer.write(row)
    writer.annotate({"test": dict(run.tested.values)})
    writer.write_test(clusters(run))
    writer.close("finished")
    return path


def clusters(run: Evidence) -> TestClusters | None:
    split = run.tested
    if not split.clusters:
        return None
    names = list(split.without)
    size = np.ones(len(split.clusters), np.int64)
    return TestClusters(split.clusters, size, names, np.stack([split.without[name] for name in names], axis=1))


def probed_rows(run: Evidence) -> Iterator[ProbeLoaderRow]:
    rows = run.probed
    assert rows is not None
    for k, step in enumerate(rows.step):
        size = int(rows.batch_size[k])
        yield ProbeLoaderRow(int(step), 0, float(k), np.ones(2), rows.gram[k], rows.noise[k], len(MICRO), size)


def ledger_rows(run: Evidence) -> Iterator[LedgerRow]:
    table = run.ledger
    for k, step in enumerate(table["step"]):
        whole = table["term"][k].sum(axis=0)
        ends = (whole, 0 * whole, whole)
        change = table["loss_change"][k]
        term, head = table["term"][k], table["head"][k]
        alone = table["alone"][k] if "alone" in table else np.full(term.shape[:2], np.nan)
        yield LedgerRow(int(step), 0, float(k), 0, term, *ends, head, change, np.zeros_like(change), alone)
