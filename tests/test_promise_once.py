"""Models that allow one backward per forward: measured where what was used up can be put back, else refused."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from promises import Net, batch, same, sow, train
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from zoo import Collector

from gradprobe.errors import ProbeError
from gradprobe.probes import GradientProbe


class Once:
    """Hands each saved tensor out once, as offloading does."""

    def __init__(self):
        self.kept = {}

    def pack(self, tensor):
        self.kept[len(self.kept), id(tensor)] = tensor.detach()
        return next(reversed(self.kept))

    def unpack(self, key):
        return self.kept.pop(key)


class Often(Once):
    def unpack(self, key):
        return self.kept[key]


def hooks_of(kind):
    hooks = kind()
    return saved_tensors_hooks(hooks.pack, hooks.unpack)


@pytest.mark.parametrize("mode", ["record", "backward"])
@pytest.mark.parametrize("options", [{}, {"memory": "low"}, {"sketch": 16}, {"micro": 2}])
def test_hooks_that_hand_out_once_are_refused_with_their_name(mode, options):
    model = Net()
    count = options.get("micro", 1)
    with hooks_of(Once):
        micro = [model(batch(i)) for i in range(count)]
    losses = {t: sum(one[t] for one in micro) / count for t in micro[0]}
    probe = GradientProbe(model, ("a", "b"), every=1, **{k: v for k, v in options.items() if k != "micro"})
    given = {"micro": micro} if count > 1 else {}
    with pytest.raises(ProbeError, match=r"each out once \(test_promise_once\.Once\.unpack\).*the forward anew"):
        getattr(probe, mode)(losses, **given)


@pytest.mark.parametrize("mode", ["record", "backward"])
def test_hooks_that_come_later_are_left_alone(mode):
    def losses_of(model, step):
        with hooks_of(Once) if step >= 4 else contextlib.nullcontext():
            return model(batch(step))

    bare, _, _ = train(Net, losses_of=losses_of)
    probed, sink, said = train(Net, mode, losses_of=losses_of)
    assert [k for k in bare if not same(bare[k], probed[k])] == []
    untried = "not measured: hooks on saved tensors that no measured row had tried"
    assert [row.status for row in sink.rows] == ["measured"] * 2 + [untried] * 3
    assert len([words for words in said if "test_promise_once.Once.unpack" in words]) == 1


@pytest.mark.parametrize("how", ["often", "cpu", "checkpoint"])
@pytest.mark.parametrize("mode", ["record", "backward"])
def test_hooks_that_allow_several_are_measured(mode, how):
    def losses_of(model, step):
        if how == "checkpoint" and step >= 2:
            return checkpoint(model, batch(step), use_reentrant=False)
        contexts = {"often": lambda: hooks_of(Often), "cpu": save_on_cpu, "checkpoint": contextlib.nullcontext}
        with contexts[how]():
            return model(batch(step))

    bare, _, _ = train(Net, losses_of=losses_of)
    probed, sink, said = train(Net, mode, losses_of=losses_of)
    assert [k for k in bare if not same(bare[k], probed[k])] == []
    assert [row.status for row in sink.rows] == ["measured"] * 5
    assert not said


class Given(torch.autograd.Function):
    """Gives away what it saved, in its backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.held = [x.detach()]
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - ctx.held.pop().tanh() ** 2)


def test_an_operation_that_gives_away_what_it_saved_is_refused():
    class Giving(torch.nn.Module):
        def forward(self, x):
            return Given.apply(x)

    model = Net(Giving())
    probe = GradientProbe(model, ("a", "b"), every=1)
    with pytest.raises(ProbeError, match=r"gives away what it saved.*IndexError"):
        probe.record(model(batch(0)))


def test_a_failure_that_uses_nothing_up_is_a_status_and_the_training_goes_on():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if failing:
                raise ValueError("not now")
            return gradient

    failing = True
    model = Net()
    losses = model(batch(0))
    losses["b"] = Fails.apply(losses["b"])
    probe = GradientProbe(model, ("a", "b"), every=1)
    with pytest.warns(RuntimeWarning, match="measuring failed: ValueError: not now"):
        probe.record(losses)
    failing = False
    sum(losses.values()).backward()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("mode", ["record", "backward"])
def test_opacus_is_measured_and_its_samples_gradients_are_as_without(mode):
    opacus = pytest.importorskip("opacus")

    def run(mode):
        sow()
        model = opacus.GradSampleModule(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found, sink = [], Collector()
        probe = GradientProbe(model, ("a", "b"), [sink], every=1) if mode else None
        for step in range(5):
            losses = model(batch(step))
            if mode == "backward":
                probe.backward(losses)
            else:
                if mode:
                    probe.record(losses)
                sum(losses.values()).backward()
            found += [p.grad_sample.clone() for p in model.parameters()] + [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            for p in model.parameters():
                p.grad_sample = p.grad = None
        return found, sink.rows

    with pytest.warns(RuntimeWarning, match="backward hooks of your own on module _module.first"):
        probed, rows = run(mode)
    assert [row.status for row in rows] == ["measured"] * 5
    assert same(run(None)[0], probed)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.filterwarnings("ignore:.*backward hooks of your own")
@pytest.mark.parametrize("mode", ["record", "backward"])
@pytest.mark.parametrize("extended", [False, True])
def test_backpack_is_measured_and_its_extensions_are_as_without(mode, extended):
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchGrad

    def make():
        model = Net(torch.nn.Tanh())
        for part in (model.first, model.middle, model.second, model.a, model.b):
            backpack.extend(part)
        return model

    def around():
        return backpack.backpack(BatchGrad()) if extended else contextlib.nullcontext()

    bare, _, _ = train(make, around=around, parts=1)
    probed, sink, said = train(make, mode, around=around, parts=1)
    assert [k for k in bare if not same(bare[k], probed[k])] == []
    assert [row.status for row in sink.rows] == ["measured"] * 5
    assert any(re.search("backward hooks of your own on module first", words) for words in said)
