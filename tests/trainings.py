"""Small multitask trainings for the real trainers of others, with and without a callback."""

from __future__ import annotations

import torch
from torch import nn

WEIGHTS = {"a": 1.0, "b": 0.3}


class TwoHeads(nn.Module):
    """Dropout and BatchNorm: a probe that disturbs random numbers or buffers would show."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3))
        self.a, self.b = nn.Linear(12, 1), nn.Linear(12, 3)

    def losses(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.trunk(x)
        return {"a": nn.functional.mse_loss(self.a(z)[:, 0], a), "b": nn.functional.cross_entropy(self.b(z), b)}


def samples(n: int = 32) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=draw)
    return [{"x": x[i], "a": x[i].sum(), "b": (x[i].argmax() % 3)} for i in range(n)]


def left_behind(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """All that a training leaves: parameters, buffers, optimizer state, random numbers."""
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "torch": torch.get_rng_state()}


class Fails:
    """Raises in mid-training; put into a trainer's own events."""

    def __init__(self, error: BaseException, at: int = 3) -> None:
        self.error, self.at = error, at

    def __call__(self, step: int) -> None:
        if step == self.at:
            raise self.error
