"""Small run files for tests, with the shape of real ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gradprobe.rows import MEASURED, NONFINITE_GRADIENT, Header, Row
from gradprobe.runfile import RunWriter
from gradprobe.runfile.files import seal

SCORES = ("mAP50", "mAP50-95", "precision", "recall", "f1", "accuracy", "macro_f1", "auroc")


def trunk_layers() -> list[str]:
    """The 66 layers of a YOLOv5n trunk, as the probe names them."""
    blocks: list[str] = []
    for index, depth in ((0, 0), (1, 0), (2, 1), (3, 0), (4, 2), (5, 0), (6, 3), (7, 0), (8, 1)):
        if not depth:
            blocks.append(f"model.{index}")
            continue
        blocks.append(f"model.{index}.cv1")
        blocks += [f"model.{index}.m.{k}.{part}" for k in range(depth) for part in ("cv1", "cv2")]
        blocks += [f"model.{index}.cv2", f"model.{index}.cv3"]
    blocks += ["model.9.cv1", "model.9.cv2"]
    return [f"{block}.{kind}" for block in blocks for kind in ("conv", "bn")]


def make_header(
    layers: int | Sequence[str] = 6,
    tasks: Sequence[str] = ("det", "cls"),
    reach: NDArray[np.bool_] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Header:
    names = [f"model.{i}.conv" for i in range(layers)] if isinstance(layers, int) else list(layers)
    size = np.array([32 if name.endswith("bn") else 432 * (i + 1) for i, name in enumerate(names)], np.int64)
    return Header(
        list(tasks),
        names,
        size,
        np.ones((len(names), len(tasks)), dtype=bool) if reach is None else reach,
        {"trainer": "gradnorm"} if provenance is None else provenance,
    )


def make_rows(
    header: Header,
    rows: int,
    *,
    every: int = 10,
    epochs: int = 3,
    seed: int = 0,
    bad_rows: Sequence[int] = (),
    zero: Sequence[tuple[int, int]] = (),
) -> Iterator[Row]:
    """Rows whose losses fall and whose gradients start aligned and drift apart in the late layers.

    Args:
        header: Gives tasks, layers and reach.
        bad_rows: Rows that were not measured: gradients NaN.
        zero: (layer, task) whose gradient is exactly zero in the second half.
    """
    rng = np.random.default_rng(seed)
    tasks, layers, width = len(header.tasks), len(header.layers), 24
    common = rng.normal(size=(layers, 1, width))
    sign = np.where(np.arange(tasks) % 2, -1.0, 1.0)[None, :, None]
    for t in range(rows):
        done = t / max(rows - 1, 1)
        pull = (0.35 - 0.7 * done * np.linspace(0, 1, layers))[:, None, None]
        gradient = rng.normal(size=(layers, tasks, width)) + common * np.where(sign > 0, np.abs(pull), pull)
        gradient *= (1 + np.arange(tasks))[None, :, None] * np.exp(-2 * done) * 0.05 * rng.lognormal(0, 0.3)
        if done > 0.5:
            for layer, task in zero:
                gradient[layer, task] = 0.0
        gram = gradient @ gradient.transpose(0, 2, 1)
        missing = ~header.reach[:, :, None] | ~header.reach[:, None, :]
        gram = np.where(missing | (t in bad_rows), np.nan, gram)
        weight = 1 + 0.9 * np.cos(np.pi * np.arange(tasks)) * (1 - done)
        yield Row(
            step=t * every,
            epoch=t * max(epochs, 1) // max(rows, 1),
            time=0.2 * (t + 1),
            loss=(1 + np.arange(tasks)) * np.exp(-1.5 * done) * rng.lognormal(0, 0.15, tasks),
            weight=weight * tasks / weight.sum(),
            gram=gram,
            lr=0.01 * (1 - done),
            overhead=0.02,
            batch_size=8,
            status=NONFINITE_GRADIENT if t in bad_rows else MEASURED,
        )


def make_epoch(epoch: int, epochs: int, tasks: Sequence[str]) -> dict[str, float]:
    done = (epoch + 1) / epochs
    values = {name: (0.95 - 0.05 * i) * done**0.7 for i, name in enumerate(SCORES)}
    return values | {f"loss_{task}": (i + 1) * float(np.exp(-1.2 * done)) for i, task in enumerate(tasks)}


def make_run(
    path: Path,
    *,
    rows: int = 60,
    layers: int | Sequence[str] = 6,
    tasks: Sequence[str] = ("det", "cls"),
    epochs: int = 3,
    seed: int = 0,
    reach: NDArray[np.bool_] | None = None,
    provenance: Mapping[str, Any] | None = None,
    end: str = "finished",
    **row_options: Any,
) -> Path:
    """Write a run file and return its path. ``end=""`` leaves it as a kill after the last flush would."""
    header = make_header(layers, tasks, reach, provenance)
    writer = RunWriter(path, overwrite=True)
    writer.start(header)
    for row in make_rows(header, rows, epochs=epochs, seed=seed, **row_options):
        writer.write(row)
    for epoch in range(epochs):
        writer.write_epoch(epoch, make_epoch(epoch, epochs, tasks))
    writer.close(end or "finished")
    if not end:
        with h5py.File(path, "r+") as file:
            file.attrs["end"] = ""
        with path.open("rb+") as raw:
            seal(raw)
    return path
