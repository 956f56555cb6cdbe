"""How far BatchNorm's running statistics moved: a door by which tasks change each other beside all gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_UNKNOWN_DRIFT = (math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class _Statistics:
    """Running statistics of all layers that have some, side by side.

    Attributes:
        mean, variance: (C,) of all channels.
        eps: (C,) what their layers add to a variance.
        batches: (K,) that each layer has averaged.
    """

    mean: Tensor
    variance: Tensor
    eps: Tensor
    batches: Tensor


def _running_statistics(model: nn.Module) -> _Statistics | None:
    """As they are now, in float64 on the CPU; None: no layer has any."""
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    found = [m for m in layers if m.running_var is not None and m.num_batches_tracked is not None]
    if not found:
        return None
    mean = torch.cat([m.running_mean.detach().reshape(-1) for m in found if m.running_mean is not None])
    variance = torch.cat([m.running_var.detach().reshape(-1) for m in found if m.running_var is not None])
    batches = torch.stack([m.num_batches_tracked for m in found if m.num_batches_tracked is not None])
    eps = torch.cat([torch.full((m.num_features,), m.eps, dtype=torch.float64) for m in found])
    wide = torch.float64
    return _Statistics(mean.cpu().to(wide), variance.cpu().to(wide), eps, batches.cpu().to(wide))


def _drift_between(before: _Statistics, now: _Statistics, steps: int) -> tuple[float, float, float]:
    """How far they moved in so many steps.

    Returns:
        Root mean square over channels of the change of the running mean, in running standard deviations from before;
        the same of the logarithm of the running variance; the most batches per step that one layer averaged. NaN where
        that cannot be: other layers, no step, or statistics that were begun anew.
    """
    if before.mean.shape != now.mean.shape or before.batches.shape != now.batches.shape:
        return _UNKNOWN_DRIFT
    old, new = before.variance + before.eps, now.variance + now.eps
    mean = ((now.mean - before.mean).square() / old).mean().sqrt()
    variance = (new.log() - old.log()).square().mean().sqrt()
    batches = now.batches - before.batches
    known = steps > 0 and bool((batches >= 0).all())
    return float(mean), float(variance), float(batches.max()) / steps if known else math.nan


class Drift:
    """Looks at a model's running statistics from time to time.

    Args:
        model: Whose they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last: tuple[int, _Statistics] | None = None

    def look(self, step: int) -> tuple[float, float, float]:
        """What :func:`_drift_between` says of the time since the last look; NaN at the first."""
        now, last = _running_statistics(self._model), self._last
        self._last = None if now is None else (step, now)
        return _UNKNOWN_DRIFT if now is None or last is None else _drift_between(last[1], now, step - last[0])

    def state_dict(self) -> dict[str, Any]:
        if self._last is None:
            return {}
        step, last = self._last
        return {"step": step, "mean": last.mean, "variance": last.variance, "eps": last.eps, "batches": last.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = None
        if state:
            tensors = (state[name].cpu() for name in ("mean", "variance", "eps", "batches"))
            self._last = int(state["step"]), _Statistics(*tensors)
