"""Products of gradients that are never made."""

from __future__ import annotations

import pytest
import torch
from test_probes import TOLERANCE, WEIGHTS, assert_close, make
from test_probes_exact import detection_losses
from test_probes_exact import detector as _detector
from test_probes_harmless import Loop, assert_same
from torch import nn
from zoo import ZOO, Collector, Heads, naive_gramian

from gradprobe.errors import ProbeError
from gradprobe.probes import GradientProbe, ghost
from gradprobe.probes.binding import Selection
from gradprobe.probes.trace import trace

detector = _detector


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("name", [n for n in ZOO if n != "checkpointed"])
def test_they_are_those_of_the_naive_twin(name, use, dtype, monkeypatch):
    monkeypatch.setattr(ghost, "_cheaper", lambda *_: True)  # wherever it can be done, also where it does not pay
    tasks = 2 if name == "nested" else 3
    case, sink = make(name, dtype, tasks), Collector()
    names = [f"t{i}" for i in range(tasks)]
    with GradientProbe(case.model, names, [sink], every=1, products="ghost") as probe:
        for step in range(4):
            losses = case.losses(step)
            expected = None if probe.shared is None else naive_gramian(probe.shared.layers, losses)
            getattr(probe, use)(losses, {t: WEIGHTS[t] for t in names})
            if expected is not None:
                assert_close(sink.rows[-1].gram, expected, TOLERANCE[dtype])


def found(model, losses):
    shared = Selection(model, None, None).find(losses)
    names = {id(p): n for n, p in model.named_parameters()}
    return [names[id(shared.parameters[g.index])] for g in ghost.find_ghosts(trace(list(losses.values())), shared)]


class Varied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 64, 3)
        self.deep = nn.Conv2d(64, 64, 3, padding=1, stride=2, dilation=1)
        self.grouped = nn.Conv2d(64, 64, 3, groups=64)
        self.linear = nn.Linear(64, 32)
        self.without_bias = nn.Linear(32, 32, bias=False)
        self.narrow = nn.Linear(32, 2)

    def forward(self, x):
        z = self.grouped(self.deep(self.wide(x).tanh()).tanh()).tanh().mean((2, 3))
        return self.narrow(self.without_bias(self.linear(z).tanh()).tanh())


def varied():
    torch.manual_seed(0)
    model = Heads(Varied(), 2)
    a, b = model(torch.randn(4, 3, 7, 7))
    return model, {"t0": a.mean(), "t1": b.pow(2).mean()}


def test_they_are_used_where_they_pay():
    assert set(found(*varied())) == {"trunk.deep.weight", "trunk.linear.weight", "trunk.without_bias.weight"}


def test_a_weight_used_twice_or_hooked_is_left_to_its_gradient():
    case = make("used_twice", torch.float32)
    assert not any("again" in name for name in found(case.model, case.losses(0)))
    model, losses = varied()
    model.trunk.linear.weight.register_hook(lambda gradient: gradient * 2)
    assert "trunk.linear.weight" not in found(model, losses)


@pytest.mark.parametrize("use", ["record", "backward"])
def test_on_a_model_with_all_kinds(use):
    torch.manual_seed(0)
    model, sink = Heads(Varied(), 2).double(), Collector()
    with GradientProbe(model, ("t0", "t1"), [sink], every=1, products="ghost") as probe:
        for step in range(4):
            a, b = model(torch.randn(4, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
            losses = {"t0": a.mean(), "t1": b.pow(2).mean()}
            expected = None if probe.shared is None else naive_gramian(probe.shared.layers, losses)
            getattr(probe, use)(losses, {"t0": 1.0, "t1": 0.3})
            if expected is not None:
                assert_close(sink.rows[-1].gram, expected, 1e-10)


def test_on_a_detector(detector):
    sink = Collector()
    with GradientProbe(detector, ("det", "cls"), [sink], every=1, products="ghost") as probe:
        for step in range(3):
            losses = detection_losses(detector, step)
            expected = None if probe.shared is None else naive_gramian(probe.shared.layers, losses)
            probe.backward(losses, {"det": 1.0, "cls": 0.3})
            if expected is not None:
                assert_close(sink.rows[-1].gram, expected, 1e-5)


@pytest.mark.parametrize("recipe", ["plain", "scaler", "autocast"])
@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("name", list(ZOO))
def test_a_training_ends_in_every_bit_as_one_without(name, use, recipe):
    bare, _ = Loop(name, recipe).run()
    probed, _ = Loop(name, recipe, use).run(every=1, products="ghost")
    assert_same(bare, probed)


def test_where_they_are_wrong_they_are_not_used_again(monkeypatch):
    case, sink = make("mlp", torch.float32), Collector()
    monkeypatch.setattr(ghost, "_cheaper", lambda *_: True)
    real = ghost.Ghost.products
    monkeypatch.setattr(ghost.Ghost, "products", lambda *a: real(*a) * 2)
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1, products="ghost") as probe:
        with pytest.warns(RuntimeWarning, match="products without gradients differ"):
            probe.record(case.losses(0))
        probe.record(case.losses(1))
        for step in range(2):
            assert_close(sink.rows[step].gram, naive_gramian(probe.shared.layers, case.losses(step)), 1e-5)


def test_the_weights_gradients_are_not_made(monkeypatch):
    asked = []
    real = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda loss, targets, **o: asked.append(targets) or real(loss, targets, **o)
    )
    torch.manual_seed(0)
    model = Heads(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), 32)
    with GradientProbe(model, ("t0", "t1"), every=1, products="ghost") as probe:
        for _ in range(2):
            a, b = model(torch.randn(4, 32))
            probe.record({"t0": a.mean(), "t1": b.pow(2).mean()})
    kinds = [type(target.node).__name__ for target in asked[-1]]
    assert sorted(kinds) == ["AccumulateGrad"] * 2 + ["AddmmBackward0"] * 2  # the biases, and two outputs


def test_wrong_choices_are_refused():
    case = make("mlp")
    with pytest.raises(ProbeError, match="exclude each other"):
        GradientProbe(case.model, ("t0", "t1"), memory="low", products="ghost")
    with pytest.raises(ProbeError, match="products='none': there are 'direct' and 'ghost'"):
        GradientProbe(case.model, ("t0", "t1"), products="none")
