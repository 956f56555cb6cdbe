"""Two tasks whose gradients on the shared layers are known: their angle, the ratio of their lengths, their noise.

Task i sees of sample n the vector x_i = u_i + e_i on each shared layer; u_i is the same for all samples, e_i is noise.
The model turns it into a gradient of exactly that vector times the scale of the task. The directions u_a and u_b are as
long as each other and have the angle of the dial on every layer, task a's loss is scaled by the ratio. Over the
training data noise has mean 0 and the length (and correlation) of the dials exactly, so that the gradient of all
samples is known to rounding.

Val and test have noise of their own. A test sample belongs to a clip, with which it shares half of the variance of its
noise and of its threshold: it counts as solved where the output has passed the threshold.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from gradprobe.errors import UsageError
from gradprobe.trainers.data.clusters import clip_of
from gradprobe.trainers.data.dataset import Loader
from gradprobe.trainers.evaluation import model_kept
from gradprobe.trainers.hyp import DetectionHyp
from gradprobe.trainers.problems import DIAL
from gradprobe.trainers.problems.dial_spec import DialSpec, parse_dial
from gradprobe.trainers.settings import Settings

TARGET = 2.0
"""What every output is to reach."""

BEND = 0.5
"""How far before the target the loss leaves its straight line; up to there gradients are constant."""

REACH = 0.3
"""What a head's number counts: its gradient is so much shorter than that of the trunk, which is to decide the task."""


class _Shift(nn.Module):
    """The head of a task: a number that is added, times :data:`REACH`."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """Of any shape."""
        return features + REACH * self.bias


class DialModel(nn.Module):
    """``output_i = sum over layers of w . x_i + shift_i``, where x_i is what task i sees of a sample.

    The loss of a sample is Huber's, of the distance to :data:`TARGET`: a straight line, until the output is within
    :data:`BEND` of the target. So task i's gradient on a layer is minus the mean of the x_i times the task's scale,
    whatever the parameters are: it has the same length and direction throughout a training that has not come so far.

    Args:
        layers: Number of shared layers.
        dim: Parameters of each.
        scales: Of each task's loss.
        seed: Of the small initial weights.
    """

    tasks = ("a", "b")

    def __init__(self, layers: int, dim: int, scales: tuple[float, float], seed: int) -> None:
        super().__init__()
        self._scales = scales
        self.blocks = nn.ModuleList(nn.utils.skip_init(nn.Linear, dim, 1, bias=False) for _ in range(layers))
        self.second = nn.ModuleDict()
        self.heads = nn.ModuleDict({task: _Shift() for task in self.tasks})
        stream = torch.Generator().manual_seed(seed % 2**63)
        with torch.no_grad():
            for block in self.blocks:
                nn.init.normal_(next(block.parameters()), 0.0, 0.02, generator=stream)
        self.detached = False
        self.scaled_hyp: dict[str, float] = {}

    @property
    def trunk(self) -> tuple[str, ...]:
        """Names of the layers that both tasks use."""
        return tuple(f"blocks.{index}" for index in range(len(self.blocks)))

    @property
    def last_shared_layer(self) -> str:
        """The one that GradNorm looks at."""
        return self.trunk[-1]

    @property
    def doubled(self) -> tuple[str, ...]:
        """Layers of which task b has a copy of its own."""
        return tuple(f"blocks.{index}" for index in self.second)

    def trunk_layers(self, imgsz: int) -> tuple[str, ...]:
        """The layers of the trunk; ``imgsz`` means nothing here."""
        return self.trunk

    def divide(self, doubled: Collection[str]) -> DialModel:
        """This model, with a copy of some layers for task b.

        Raises:
            UsageError: Nothing to double.
        """
        if not doubled:
            raise UsageError("no layer of the trunk is to be doubled; that is the joint model: --trainer joint")
        for name in doubled:
            self.second[name.rpartition(".")[2]] = copy.deepcopy(self.get_submodule(name))
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Task -> outputs (B,) of samples (B, 2, layers, dim)."""
        a = sum(block(images[:, 0, index]) for index, block in enumerate(self.blocks))
        b = sum(self._for_b(index)(images[:, 1, index]) for index in range(len(self.blocks)))
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        features = {"a": a, "b": b.detach() if self.detached else b}
        return {task: self.heads[task](features[task])[:, 0] for task in self.tasks}

    def _for_b(self, index: int) -> nn.Module:
        return self.second[str(index)] if str(index) in self.second else self.blocks[index]

    def losses(self, outputs: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """Task -> the mean over the samples."""
        return {task: loss.mean() for task, loss in self.sample_losses(outputs).items()}

    def sample_losses(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Task -> the loss of each sample, (B,)."""
        return {
            task: scale * F.huber_loss(output, torch.full_like(output, TARGET), reduction="none", delta=BEND) / BEND
            for scale, (task, output) in zip(self._scales, outputs.items(), strict=True)
        }


CLIPS, FRAMES = 24, 8
"""Of the test split; val has as many samples."""

_THRESHOLD, _SPREAD = 1.0, 0.3
"""Mean and standard deviation of what an output has to pass."""

_Array = NDArray[np.float64]


class _DialSample(NamedTuple):
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

    def __getitem__(self, index: int) -> _DialSample:
        return _DialSample(self.images[index], self.thresholds[index], self.names[index])


def collate_dial(samples: list[_DialSample]) -> _DialBatch:
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
    """An evaluation sample by sample; see :class:`gradprobe.trainers.problems.SampleScores`."""

    names: tuple[str, ...]
    solved: _Array  # (N, 2), 0 or 1
    losses: _Array  # (N, 2)

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
        return make_dial_data(settings.data, settings.seed)

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
        return Loader(split, batch_size, seed, shuffle, collate_dial)

    def example(self, settings: Settings, data: _DialData) -> Tensor:
        """A sample of zeros."""
        return torch.zeros(1, 2, data.spec.layers, data.spec.dim)

    def score(self, model: Any, loader: Iterable[_DialBatch], *, device: Any) -> _DialScores:
        """Outputs against thresholds, and losses."""
        names: list[str] = []
        solved, losses = [np.zeros((0, 2))], [np.zeros((0, 2))]
        with model_kept(model, loader), torch.no_grad():
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


def make_dial_data(source: str, seed: int) -> _DialData:
    """The samples that the dials ask for.

    Args:
        source: ``dial`` or ``dial:angle=120,...``.
        seed: Of directions and noise, where the dials have no seed of their own.

    Raises:
        UsageError: As :func:`parse_dial`.
    """
    spec = parse_dial(source)
    seed = seed if spec.seed is None else spec.seed
    directions, train, val, test = (np.random.default_rng([seed, part]) for part in range(4))
    means = _task_means(spec, directions)
    held_out = CLIPS * FRAMES
    splits = {
        "train": _split(means + _exact_noise(spec, train), np.zeros((spec.size, 2)), _numbered("train", spec.size)),
        "val": _split(means + _noise(spec, held_out, val), _thresholds(held_out, val), _numbered("val", held_out)),
        "test": _split(
            means + _shared(lambda count: _noise(spec, count, test)),
            _shared(lambda count: _thresholds(count, test) - _THRESHOLD) + _THRESHOLD,
            tuple(f"clip{clip:02d}_frame{frame}" for clip in range(CLIPS) for frame in range(FRAMES)),
        ),
    }
    digest = hashlib.sha256(repr(spec.ratio).encode())
    for name, split in splits.items():
        digest.update(name.encode() + split.images.numpy().tobytes() + split.thresholds.numpy().tobytes())
    return _DialData(source, spec, seed, splits["train"], splits["val"], splits["test"], digest.hexdigest())


def _task_means(spec: DialSpec, stream: np.random.Generator) -> _Array:
    """The vectors u, (2, layers, dim): of length 1 over all layers, with the angle of the dial on each of them."""
    plane = np.stack([np.linalg.qr(stream.standard_normal((spec.dim, 2)))[0].T for _ in range(spec.layers)])
    angle = math.radians(spec.angle)
    a = plane[:, 0]
    b = math.cos(angle) * plane[:, 0] + math.sin(angle) * plane[:, 1]
    return np.stack([a, b]) / math.sqrt(spec.layers)


def _noise(spec: DialSpec, count: int, stream: np.random.Generator) -> _Array:
    """(count, 2, layers, dim), of the expected length and correlation of the dials."""
    drawn = stream.standard_normal((count, 2, spec.layers, spec.dim))
    own = math.sqrt(1 - spec.correlation**2)
    drawn[:, 1] = spec.correlation * drawn[:, 0] + own * drawn[:, 1]
    return drawn * (spec.noise / math.sqrt(spec.layers * spec.dim))


def _exact_noise(spec: DialSpec, stream: np.random.Generator) -> _Array:
    """The same, where mean, length and correlation over all samples are exact."""
    a, b = np.moveaxis(stream.standard_normal((spec.size, 2, spec.layers, spec.dim)), 1, 0)
    a = _unit(a - a.mean(0))
    b = b - b.mean(0)
    b = _unit(b - a * (a * b).sum() / (a * a).sum())
    b = spec.correlation * a + math.sqrt(1 - spec.correlation**2) * b
    return spec.noise * np.stack([a, b], axis=1)


def _unit(vectors: _Array) -> _Array:
    """Scaled to a root mean square length of 1."""
    scaled: _Array = vectors / math.sqrt(np.square(vectors).sum() / len(vectors))
    return scaled


def _thresholds(count: int, stream: np.random.Generator) -> _Array:
    return _THRESHOLD + _SPREAD * stream.standard_normal((count, 2))


def _shared(draw: Any) -> _Array:
    """What test samples have, half of the variance of which is that of their clip."""
    clips, own = draw(CLIPS), draw(CLIPS * FRAMES)
    shared: _Array = (np.repeat(clips, FRAMES, axis=0) + own) / math.sqrt(2)
    return shared


def _split(images: _Array, thresholds: _Array, names: tuple[str, ...]) -> _DialSplit:
    return _DialSplit(
        torch.from_numpy(images.astype(np.float32)), torch.from_numpy(thresholds.astype(np.float32)), names
    )


def _numbered(split: str, count: int) -> tuple[str, ...]:
    return tuple(f"{split}_{index:06d}" for index in range(count))
