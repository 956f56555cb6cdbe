"""Two tasks whose gradients on the shared layers are known: their angle, the ratio of their lengths, their noise.

Task i sees of sample n the vector x_i = u_i + e_i on each shared layer; u_i is the same for all samples, e_i is noise.
The model (:mod:`gradprobe.trainers.models.dial`) turns it into a gradient of exactly that vector times the scale of
the task. The directions u_a and u_b are as long as each other and have the angle of the dial on every layer, task a's
loss is scaled by the ratio. Over the training data noise has mean 0 and the length (and correlation) of the dials
exactly, so that the gradient of all samples is known to rounding.

Val and test have noise of their own. A test sample belongs to a clip, with which it shares half of the variance of its
noise and of its threshold: it counts as solved where the output has passed the threshold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradprobe.trainers.data.grouping import clip_of
from gradprobe.trainers.data.loader import Loader
from gradprobe.trainers.hyp import DetectionHyp
from gradprobe.trainers.models.dial import DialModel
from gradprobe.trainers.problems import DIAL
from gradprobe.trainers.problems.dial_spec import DialSpec, parse
from gradprobe.trainers.running_statistics import left_as_it_was
from gradprobe.trainers.settings import Settings

CLIPS, FRAMES = 24, 8
"""Of the test split; val has as many samples."""

THRESHOLD, SPREAD = 1.0, 0.3
"""Mean and standard deviation of what an output has to pass."""

Array = NDArray[np.float64]


class Sample(NamedTuple):
    """One sample."""

    image: Tensor  # (2, layers, dim): what each task sees on each layer
    threshold: Tensor  # (2,)
    name: str


@dataclass(frozen=True)
class _DialBatch:
    """Samples of a batch."""

    images: Tensor  # (batch, 2, layers, dim), float32
    thresholds: Tensor  # (batch, 2), float32
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> _DialBatch:
        return replace(self, images=self.images.to(device), thresholds=self.thresholds.to(device))

    def part(self, start: int, stop: int) -> _DialBatch:
        """The samples from ``start`` up to ``stop``, as a batch of their own."""
        return _DialBatch(self.images[start:stop], self.thresholds[start:stop], self.names[start:stop])


@dataclass(frozen=True)
class _DialSplit:
    """Samples of a split."""

    images: Tensor
    thresholds: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], self.thresholds[index], self.names[index])


def collate(samples: list[Sample]) -> _DialBatch:
    """One batch from its samples, in their order."""
    images, thresholds, names = zip(*samples, strict=True)
    return _DialBatch(torch.stack(images), torch.stack(thresholds), names)


@dataclass(frozen=True)
class _DialData:
    """All splits."""

    name: str
    spec: DialSpec
    seed: int
    train: _DialSplit
    val: _DialSplit
    test: _DialSplit
    fingerprint: str
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _DialScores:
    """An evaluation sample by sample; see :class:`gradprobe.trainers.problems.Scores`."""

    names: tuple[str, ...]
    solved: Array  # (N, 2), 0 or 1
    losses: Array  # (N, 2)

    def metrics(self, keep: Sequence[int] | None = None) -> dict[str, float]:
        """Means over the samples; NaN where there is none."""
        chosen = slice(None) if keep is None else list(keep)
        solved, losses = self.solved[chosen], self.losses[chosen]
        values = [*solved.mean(0), *losses.mean(0)] if len(solved) else [math.nan] * 4
        return {metric.name: float(value) for metric, value in zip(DIAL.metrics, values, strict=True)}


class Dial:
    """See :class:`gradprobe.trainers.problems.Problem`."""

    kind = DIAL

    def load(self, settings: Settings) -> _DialData:
        """Made from the dials."""
        return make_data(settings.data, settings.seed)

    def describe(self, data: _DialData) -> dict[str, Any]:
        """Where the dials stand."""
        spec = data.spec
        return {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "train_images": len(data.train),
            "val_images": len(data.val),
            "test_images": len(data.test),
            "dial": {
                "angle": spec.angle,
                "ratio": spec.ratio,
                "noise": spec.noise,
                "correlation": spec.correlation,
                "seed": data.seed,
            },
        }

    def build_model(self, settings: Settings, data: _DialData, hyp: DetectionHyp) -> DialModel:
        """Of the size of the data; ``--cfg``, ``--imgsz`` and ``--hyp`` mean nothing here."""
        return DialModel(data.spec.layers, data.spec.dim, (data.spec.ratio, 1.0), settings.seed)

    def loader(self, split: _DialSplit, batch_size: int, *, seed: int = 0, shuffle: bool = True) -> Any:
        return Loader(split, batch_size, seed, shuffle, collate)

    def example(self, settings: Settings, data: _DialData) -> Tensor:
        """A sample of zeros."""
        return torch.zeros(1, 2, data.spec.layers, data.spec.dim)

    def score(self, model: Any, loader: Iterable[_DialBatch], *, device: Any) -> _DialScores:
        """Outputs against thresholds, and losses."""
        names: list[str] = []
        solved, losses = [np.zeros((0, 2))], [np.zeros((0, 2))]
        with left_as_it_was(model, loader), torch.no_grad():
            model.eval()
            for batch in loader:
                batch = batch.to(device)
                outputs = model(batch.images)
                passed = torch.stack(list(outputs.values()), dim=1) > batch.thresholds
                solved.append(passed.double().cpu().numpy())
                losses.append(torch.stack(list(model.sample_losses(outputs).values()), 1).double().cpu().numpy())
                names += batch.names
        return _DialScores(tuple(names), np.concatenate(solved), np.concatenate(losses))

    def fitness(self, metrics: Mapping[str, float]) -> float:
        """The mean of what both tasks solve."""
        parts = (metrics["solved_a"], metrics["solved_b"])
        return sum(part for part in parts if not math.isnan(part)) / 2

    def clusters(self, split: _DialSplit) -> tuple[str, ...]:
        """The clips."""
        return tuple(clip_of(Path(name).stem) or name for name in split.names)


def make_data(source: str, seed: int) -> _DialData:
    """The samples that the dials ask for.

    Args:
        source: ``dial`` or ``dial:angle=120,...``.
        seed: Of directions and noise, where the dials have no seed of their own.

    Raises:
        UsageError: As :func:`parse`.
    """
    spec = parse(source)
    seed = seed if spec.seed is None else spec.seed
    directions, train, val, test = (np.random.default_rng([seed, part]) for part in range(4))
    means = _task_means(spec, directions)
    held_out = CLIPS * FRAMES
    splits = {
        "train": _split(means + _exact_noise(spec, train), np.zeros((spec.size, 2)), _numbered("train", spec.size)),
        "val": _split(means + _noise(spec, held_out, val), _thresholds(held_out, val), _numbered("val", held_out)),
        "test": _split(
            means + _shared(lambda count: _noise(spec, count, test)),
            _shared(lambda count: _thresholds(count, test) - THRESHOLD) + THRESHOLD,
            tuple(f"clip{clip:02d}_frame{frame}" for clip in range(CLIPS) for frame in range(FRAMES)),
        ),
    }
    digest = hashlib.sha256(repr(spec.ratio).encode())
    for name, split in splits.items():
        digest.update(name.encode() + split.images.numpy().tobytes() + split.thresholds.numpy().tobytes())
    return _DialData(source, spec, seed, splits["train"], splits["val"], splits["test"], digest.hexdigest())


def _task_means(spec: DialSpec, stream: np.random.Generator) -> Array:
    """The vectors u, (2, layers, dim): of length 1 over all layers, with the angle of the dial on each of them."""
    plane = np.stack([np.linalg.qr(stream.standard_normal((spec.dim, 2)))[0].T for _ in range(spec.layers)])
    angle = math.radians(spec.angle)
    a = plane[:, 0]
    b = math.cos(angle) * plane[:, 0] + math.sin(angle) * plane[:, 1]
    return np.stack([a, b]) / math.sqrt(spec.layers)


def _noise(spec: DialSpec, count: int, stream: np.random.Generator) -> Array:
    """(count, 2, layers, dim), of the expected length and correlation of the dials."""
    drawn = stream.standard_normal((count, 2, spec.layers, spec.dim))
    own = math.sqrt(1 - spec.correlation**2)
    drawn[:, 1] = spec.correlation * drawn[:, 0] + own * drawn[:, 1]
    return drawn * (spec.noise / math.sqrt(spec.layers * spec.dim))


def _exact_noise(spec: DialSpec, stream: np.random.Generator) -> Array:
    """The same, where mean, length and correlation over all samples are exact."""
    a, b = np.moveaxis(stream.standard_normal((spec.size, 2, spec.layers, spec.dim)), 1, 0)
    a = _unit(a - a.mean(0))
    b = b - b.mean(0)
    b = _unit(b - a * (a * b).sum() / (a * a).sum())
    b = spec.correlation * a + math.sqrt(1 - spec.correlation**2) * b
    return spec.noise * np.stack([a, b], axis=1)


def _unit(vectors: Array) -> Array:
    """Scaled to a root mean square length of 1."""
    scaled: Array = vectors / math.sqrt(np.square(vectors).sum() / len(vectors))
    return scaled


def _thresholds(count: int, stream: np.random.Generator) -> Array:
    return THRESHOLD + SPREAD * stream.standard_normal((count, 2))


def _shared(draw: Any) -> Array:
    """What test samples have, half of the variance of which is that of their clip."""
    clips, own = draw(CLIPS), draw(CLIPS * FRAMES)
    shared: Array = (np.repeat(clips, FRAMES, axis=0) + own) / math.sqrt(2)
    return shared


def _split(images: Array, thresholds: Array, names: tuple[str, ...]) -> _DialSplit:
    return _DialSplit(
        torch.from_numpy(images.astype(np.float32)), torch.from_numpy(thresholds.astype(np.float32)), names
    )


def _numbered(split: str, count: int) -> tuple[str, ...]:
    return tuple(f"{split}_{index:06d}" for index in range(count))
