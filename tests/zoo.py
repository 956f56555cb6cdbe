"""Small multitask models that nobody would call simple, and a naive twin of the probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Collector:
    """A sink that keeps everything in memory."""

    tables = ("features",)

    def __init__(self):
        self.header, self.rows, self.epochs, self.end = None, [], {}, None
        self.feature_rows = []

    def start(self, header):
        self.header = header

    def grow(self, header):
        self.header = header

    def write(self, row):
        if row.table.name == "features":
            assert self.header.features is not None
            self.feature_rows.append(row)
        else:
            self.rows.append(row)

    def write_epoch(self, epoch, values):
        self.epochs.setdefault(epoch, {}).update(values)

    def annotate(self, values):
        pass

    def flush(self):
        return True

    def close(self, end):
        self.end = end


@dataclass
class Case:
    model: nn.Module
    losses: Callable[[int], dict[str, Tensor]]
    """Step -> losses with a fresh graph; the data of a step are a function of the step alone."""


def batch(step: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + step), dtype=torch.float64).to(dtype)


class Heads(nn.Module):
    """A trunk and T linear heads on its output."""

    def __init__(self, trunk: nn.Module, width: int, tasks: int = 2) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, 1 + t) for t in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x).flatten(1)
        return [head(z) for head in self.heads]


def _case(model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> Case:
    model = model.to(dtype)

    def losses(step: int) -> dict[str, Tensor]:
        outputs = model(batch(step, shape, dtype))
        return {
            f"t{i}": ((out - i) ** 2).mean() if i % 2 == 0 else out.sin().sum(1).mean() for i, out in enumerate(outputs)
        }

    return Case(model, losses)


def mlp(dtype, tasks=2):
    trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    return _case(Heads(trunk, 16, tasks), (8, 6), dtype)


def convolutional(dtype, tasks=2):
    trunk = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(inplace=True),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
    )
    return _case(Heads(trunk, 8, tasks), (4, 3, 12, 12), dtype)


def dropout(dtype, tasks=2):
    trunk = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 16), nn.Dropout(0.2))
    return _case(Heads(trunk, 16, tasks), (8, 6), dtype)


class Twice(nn.Module):
    """One parameter used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(6, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.again(torch.tanh(self.again(torch.tanh(self.first(x)))))


def used_twice(dtype, tasks=2):
    return _case(Heads(Twice(), 12, tasks), (8, 6), dtype)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 12))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def checkpointed(dtype, tasks=2):
    return _case(Heads(Checkpointed(), 12, tasks), (8, 6), dtype)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 10, batch_first=True)
        self.norm = nn.LayerNorm(10)

    def forward(self, x):
        return self.norm(self.lstm(x)[0][:, -1])


def recurrent(dtype, tasks=2):
    return _case(Heads(Recurrent(), 10, tasks), (5, 7, 4), dtype)


class Nested(nn.Module):
    """Features at three depths, as a detector's P3, P4, P5: one task uses all, the other the deepest."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(a, b) for a, b in ((6, 12), (12, 12), (12, 12)))
        self.heads = nn.ModuleList(nn.Linear(12, 2) for _ in range(3))
        self.classifier = nn.Linear(12, 3)

    def forward(self, x):
        levels = []
        for stage in self.stages:
            x = torch.tanh(stage(x))
            levels.append(x)
        return [torch.cat([head(level) for head, level in zip(self.heads, levels, strict=True)], 1), self.classifier(x)]


def nested(dtype, tasks=2):
    return _case(Nested(), (8, 6), dtype)


ZOO = {f.__name__: f for f in (mlp, convolutional, dropout, used_twice, checkpointed, recurrent, nested)}


def naive_gramian(layers, losses) -> np.ndarray:
    """The twin: one whole gradient per task, float64 products, no cleverness."""
    gradients = {
        task: torch.autograd.grad(
            loss, [p for la in layers for p in la.parameters], retain_graph=True, allow_unused=True
        )
        for task, loss in losses.items()
    }
    tasks, gram, start = list(losses), [], 0
    for layer in layers:
        stop = start + len(layer.parameters)
        vectors = [
            np.full(layer.size, np.nan)
            if all(g is None for g in gradients[t][start:stop])
            else np.concatenate(
                [
                    (np.zeros(p.numel()) if g is None else g.detach().double().numpy().ravel())
                    for g, p in zip(gradients[t][start:stop], layer.parameters, strict=True)
                ]
            )
            for t in tasks
        ]
        start = stop
        gram.append([[float((a * b).sum()) for b in vectors] for a in vectors])
    return np.array(gram)
