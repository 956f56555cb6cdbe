"""Small trainings of several tasks that share a trunk, of which branches are taken."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gradprobe.audit import Experiment


class Net(nn.Module):
    """A trunk with BatchNorm, and a head per task."""

    def __init__(self, tasks, seed=0, norm=True, width=8):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(5, width), *([nn.BatchNorm1d(width)] if norm else []), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in tasks})

    def forward(self, x):
        features = self.trunk(x)
        return {task: head(features)[:, 0] for task, head in self.heads.items()}


class Training:
    """Regression of several targets, of tasks that may be opposed, without a gradient, or of another scale.

    Args:
        scales: Task -> what its loss is multiplied by; 0: no gradient.
        optimizer: A function of parameters.
        spoil: Is called with the training between backward and optimizer.
    """

    def __init__(self, scales, optimizer, *, seed=0, spoil=None, norm=True, dtype=torch.float32, samples=16, clip=0.0):
        self.scales, self.spoil, self.samples, self.clip = scales, spoil, samples, clip
        self.net = Net(scales, seed, norm=norm).to(dtype)
        self.optimizer = optimizer(self.net.parameters())
        draw = torch.Generator().manual_seed(seed + 100)
        self.truth = {task: torch.randn(5, generator=draw, dtype=dtype) for task in scales}
        self.draw, self.dtype = draw, dtype
        self.x = torch.randn(64, 5, generator=draw, dtype=dtype)

    def losses(self, x):
        outputs = self.net(x)
        return {t: s * F.mse_loss(outputs[t], torch.sin(x @ self.truth[t])) for t, s in self.scales.items()}

    def batches(self):
        for _ in range(7):
            yield torch.randn(self.samples, 5, generator=self.draw, dtype=self.dtype)

    def step(self, trace, batch, weights):
        losses = trace.losses(self.losses(batch))
        self.optimizer.zero_grad()
        sum(weights[t] * losses[t] for t in losses).backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        if self.spoil is not None:
            self.spoil(self)
        self.optimizer.step()

    def experiment(self, **more):
        return Experiment(
            model=self.net,
            optimizer=self.optimizer,
            batches=lambda tasks: self.batches(),
            step=self.step,
            weights=dict.fromkeys(self.scales, 1.0),
            evaluate=lambda tasks: self.losses(self.x),
            state={"draw": self.draw},
            **more,
        )


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def factory(scales, optimizer=adam, **options):
    return lambda: Training(scales, optimizer, **options).experiment()
