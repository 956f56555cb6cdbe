"""Loops run twice, with a probe and without, and what each of their rows should hold by naive float64 passes."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn
from zoo import Collector, naive_gramian

from gradprobe.probes import GradientProbe
from gradprobe.probes.shared_layers import by_module, find_shared
from gradprobe.statistics import noise_part

TASKS = ("a", "b")
BATCH = 5


class Net(nn.Module):
    """Two heads on two layers; no randomness but in its weights."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 3)

    def losses(self, batch):
        draw = torch.Generator().manual_seed(batch)
        z = torch.tanh(self.trunk(torch.randn(BATCH, 4, generator=draw, dtype=torch.float64)))
        return {"a": self.a(z).square().mean(), "b": self.b(z).logsumexp(1).mean()}


class Bare:
    """What a loop is given in a probe's place."""

    is_due, step = True, 0

    def record(self, losses, weights=None, **_):
        pass

    def backward(self, losses, weights=None, **_):
        total(losses).backward()

    def close(self):
        pass


def total(losses):
    return sum(losses.values())


def naive(model, batches):
    """The Gramians of the mean of some batches' losses, and their noise part."""
    calls = [model.losses(batch) for batch in batches]
    layers = find_shared(by_module(model), calls[0]).layers
    gram = naive_gramian(layers, {t: sum(one[t] for one in calls) / len(calls) for t in TASKS})
    parts = sum(naive_gramian(layers, one) for one in calls) / len(calls) ** 2
    return gram, noise_part(gram, parts, [1 / len(calls)] * len(calls)), len(batches)


def both(loop, **options):
    """Rows and what they should be, of ``loop(model, attach, expect)``; it leaves the same weights in every bit.

    ``attach(optimizer)`` gives a probe; ``expect(step, batches)`` says that a row is of these batches at the weights of
    this moment.
    """
    left, sink, expected = [], Collector(), {}
    for probed in (False, True):
        torch.manual_seed(3)
        model, made, expected = Net().double(), [], {}

        def attach(optimizer=None, model=model, made=made, probed=probed, **more):
            given = {"every": 1, **options, **more}
            made.append(GradientProbe(model, TASKS, [sink], optimizer=optimizer, **given) if probed else Bare())
            return made[-1]

        def expect(step, batches, model=model, expected=expected):
            expected[step] = naive(model, batches)

        loop(model, attach, expect)
        for probe in made:
            probe.close()
        left.append(copy.deepcopy(model.state_dict()))
    for name, bare in left[0].items():
        assert torch.equal(bare, left[1][name]), name
    return sink.rows, expected


def check(rows, expected, *, batch_size=None):
    """Each row holds what it should, and there are no others."""
    assert [row.step for row in rows] == list(expected)
    for row in rows:
        gram, noise, batches = expected[row.step]
        assert row.status == "measured"
        np.testing.assert_allclose(row.gram, gram, rtol=1e-9, atol=1e-14)
        assert row.micro_batches == batches
        if batches > 1:
            np.testing.assert_allclose(row.gram_noise, noise, rtol=1e-7, atol=1e-12 * np.nanmax(gram))
        else:
            assert row.gram_noise is None
        if batch_size is not None:
            assert row.batch_size == batch_size
