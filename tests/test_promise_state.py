"""What a recomputed part of the forward moves besides gradients is put back after every pass."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest
import torch
from promises import MODES, Net, batch, same, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradprobe.probes import GradientProbe
from gradprobe.probes.state import memory, overlaps, state_kept


class Recomputed(nn.Module):
    """A block in a non-reentrant checkpoint."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)

    def block(self, x):
        return self.layer(x)


class Reassigns(Recomputed):
    def block(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.layer(x) - self.mean


class Draws(Recomputed):
    def block(self, x):
        return self.layer(x) * (1 + random.random() / 10) + np.random.standard_normal() / 10


class DrawsItsOwn(Recomputed):
    def __init__(self):
        super().__init__()
        self.python, self.numpy = random.Random(3), np.random.default_rng(3)
        self.torch, self.legacy = torch.Generator().manual_seed(3), np.random.RandomState(3)

    def block(self, x):
        noise = self.python.random() + self.numpy.random() + self.legacy.rand()
        return self.layer(x) * (1 + noise / 10) + torch.rand(8, generator=self.torch) / 10


class Counts(Recomputed):
    def __init__(self):
        super().__init__()
        self.calls, self.seen, self.stats = 0, [], {"sums": {"n": 0}}
        self.last, self.total = deque(maxlen=3), torch.zeros(8)

    def block(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        self.stats["sums"]["n"] += 1
        self.last.append(self.calls)
        self.total += x.detach().mean(0)
        self.newest = self.calls
        return self.layer(x) / self.calls**0.1 - self.total / 10


class Expanded(Recomputed):
    def __init__(self):
        super().__init__()
        self.register_buffer("wide", torch.ones(1).expand(4, 8))
        self.register_buffer("windows", torch.arange(10.0).as_strided((8, 3), (1, 1)))
        self.register_buffer("indices", torch.eye(3).to_sparse())

    def block(self, x):
        return self.layer(x) * self.wide[0] + self.windows[:, 0]


KINDS = (Reassigns, Draws, DrawsItsOwn, Counts, Expanded)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_ends_in_every_bit_as_without_a_probe(kind, mode):
    bare, _, _ = train(lambda: Net(kind()))
    probed, sink, said = train(lambda: Net(kind()), mode)
    assert [k for k in bare if not same(bare[k], probed[k])] == []
    assert [row.status for row in sink.rows] == ["measured"] * len(sink.rows)
    assert not said


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_sees_what_the_training_will(kind):
    """Two equal tasks have one gradient, which none has where the second pass finds another state than the first."""

    def losses_of(model, step):
        loss = model(batch(step))["a"]
        return {"a": loss, "b": loss * 1.0}

    _, sink, _ = train(lambda: Net(kind()), "record", losses_of=losses_of)
    for row in sink.rows:
        gram = row.gram[:, :2, :2]
        assert np.allclose(gram[:, 0, 1], gram[:, 0, 0], rtol=1e-6)


def test_generators_of_a_module_are_put_back():
    model = DrawsItsOwn()
    with state_kept(model):
        x = model.block(torch.ones(2, 8))
    assert torch.equal(model.block(torch.ones(2, 8)), x)


def test_a_large_tensor_that_is_no_buffer_is_named():
    class Collects(Recomputed):
        def __init__(self):
            super().__init__()
            self.table = torch.zeros(300, 300)

        def block(self, x):
            self.table.add_(1.0)
            return self.layer(x)

    model = Net(Collects())
    probe = GradientProbe(model, ("a", "b"), every=1)
    with pytest.raises(Exception, match=r"the numbers of middle\.table.*could not be put back"):
        probe.record(model(batch(0)))


@pytest.mark.parametrize(
    ("shape", "stride", "shared"),
    [
        ((3, 4), (0, 1), True),
        ((8, 3), (1, 1), True),
        ((3, 4), (4, 1), False),
        ((3, 4), (1, 3), False),
        ((1, 4), (0, 1), False),
    ],
)
def test_tensors_of_which_two_places_are_one_number(shape, stride, shared):
    assert overlaps(shape, stride) == shared
    tensor = torch.arange(20.0).as_strided(shape, stride)
    flat = memory(tensor)
    flat.copy_(flat.clone() + 1)
    assert torch.equal(tensor, torch.arange(1.0, 21.0).as_strided(shape, stride))
