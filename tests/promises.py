"""A training loop with and without a probe, for models whose backward runs code of its own."""

from __future__ import annotations

import contextlib
import random
import warnings

import numpy as np
import torch
from torch import nn
from zoo import Collector

from gradprobe import ProbeLoader
from gradprobe.probes import GradientProbe

MODES = ("record", "backward", "micro", "loader", "features", "low", "sketch")


class Net(nn.Module):
    """Two tasks on a trunk, of which ``middle`` is what a test is about."""

    def __init__(self, middle=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.a, self.b = nn.Linear(8, 2), nn.Linear(8, 3)
        self.middle = middle if middle is not None else nn.Identity()

    def forward(self, x):
        z = torch.tanh(self.second(self.middle(torch.tanh(self.first(x)))))
        return {"a": self.a(z).square().mean(), "b": self.b(z).logsumexp(1).mean()}


def batch(step, size=16):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(step))


def sow():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def state(model):
    """All that a training may leave in a model, and in the global random streams."""
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "plain": {
            (name, key): value
            for name, m in model.named_modules()
            for key, value in vars(m).items()
            if type(value) in (int, float, str, list, dict, set) and key not in vars(nn.Module())
        },
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],
        "python": random.getstate(),
    }


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        one, other = (t.to_dense() if t is not None else t for t in (one, other))
        return other is not None and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


def options(mode, model):
    if mode == "loader":
        data = [batch(100 + i, 1)[0] for i in range(20)]
        return {"probe_loader": ProbeLoader(data, model, batch_size=4, batches=2, every=2)}
    return {
        "features": {"level": "features"},
        "low": {"memory": "low"},
        "sketch": {"sketch": 16},
    }.get(mode, {})


def train(
    make, mode=None, *, steps=5, around=contextlib.nullcontext, weights=None, every=1, losses_of=None, sgd=True, parts=2
):
    """Train, and give the final state, the gradients of each step, the rows, and what was warned of."""
    sow()
    model, sink = make(), Collector()
    weights = weights or {"a": 1.0, "b": 0.5}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if sgd else None
    losses_of = losses_of or (lambda model, step: model(batch(step)))
    grads = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        probe = (
            GradientProbe(model, ("a", "b"), [sink], every=every, optimizer=optimizer, **options(mode, model))
            if mode
            else None
        )
        for step in range(steps):
            micro = [losses_of(model, parts * step + i) for i in range(parts)]
            losses = {t: sum(one[t] for one in micro) / parts for t in micro[0]}
            with around():
                if mode in ("backward", "low", "sketch"):
                    probe.backward(losses, weights)
                elif mode:
                    probe.record(losses, weights, **({"micro": micro} if mode == "micro" else {}))
                if mode not in ("backward", "low", "sketch"):
                    sum(weights[t] * losses[t] for t in losses).backward()
            grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        if probe is not None:
            probe.close()
    words = [str(w.message) for w in said if "gradprobe" in str(w.message)]
    return {**state(model), "grads": grads}, sink, words
