"""A backward pass that writes into .grad or parameters by itself is found by its effect, put back, and refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from promises import MODES, Net, batch, options, same, sow, train
from torch import nn
from zoo import Collector

from gradprobe.errors import ProbeError
from gradprobe.probes import GradientProbe


class Recompute(torch.autograd.Function):
    """As reversible layers and offloading checkpoints: a forward and a backward within the backward."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block, ctx.x = block, x.detach()
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.x.clone().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, gradient)
        return x.grad, None


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.on = nn.Linear(8, 8), True

    def forward(self, x):
        return Recompute.apply(x, self.block) if self.on else x


class Fused(torch.autograd.Function):
    """As fused accumulation: a weight's gradient goes into a tensor beside it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        weight.main_grad.add_(gradient.t() @ x)
        return gradient @ weight, None


class Accumulating(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))
        self.weight.main_grad = torch.zeros(8, 8)

    def forward(self, x):
        return Fused.apply(x, self.weight)


def gradients(mode, before=None, middle=Reversible):
    """Of a first step, with a probe that must refuse and is left behind."""
    sow()
    model = Net(middle())
    if before is not None:
        for p in model.parameters():
            p.grad = torch.full_like(p, before)
    micro = [model(batch(0)), model(batch(1))]
    losses = {t: micro[0][t] + micro[1][t] for t in micro[0]}
    held = [p.grad for p in model.parameters()]
    if mode:
        probe = GradientProbe(model, ("a", "b"), [Collector()], every=1, **options(mode, model))
        losses = {t: loss / 2 for t, loss in losses.items()} if mode == "micro" else losses
        call = probe.backward if mode in ("backward", "low", "sketch") else probe.record
        with pytest.raises(ProbeError, match=r"into \.grad of middle\..*put back.*test_promise_grad\.(Recomp|Fused)"):
            call(losses, **({"micro": micro} if mode == "micro" else {}))
        assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
        losses = {t: loss * 2 for t, loss in losses.items()} if mode == "micro" else losses
    sum(losses.values()).backward()
    return [p.grad for p in model.parameters()] + [getattr(p, "main_grad", None) for p in model.parameters()]


def equal(one, other):
    return all(a is b if a is None else torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("middle", [Reversible, Accumulating])
@pytest.mark.parametrize("before", [None, 0.5, float("nan")])
@pytest.mark.parametrize("mode", [m for m in MODES if m != "features"])
def test_a_backward_within_a_backward_is_refused_and_nothing_is_left_of_it(mode, before, middle):
    bare, probed = gradients(None, before, middle), gradients(mode, before, middle)
    if before != before:  # NaN is not equal to itself
        bare, probed = ([g if g is None else g.isnan() for g in found] for found in (bare, probed))
    assert equal(bare, probed)


@pytest.mark.parametrize("mode", ["record", "backward", "micro"])
def test_one_that_comes_later_ends_the_measuring_and_never_the_training(mode):
    def losses_of(model, step):
        model.middle.on = step >= 4
        return model(batch(step))

    def make():
        return Net(Reversible())

    bare, _, _ = train(make, steps=9, losses_of=losses_of)
    probed, sink, said = train(make, mode, steps=9, losses_of=losses_of)
    assert [row.status == "measured" for row in sink.rows[:2]] == [True] * 2
    status = "not measured: a backward pass writes into .grad or parameters by itself"
    # Between the 3rd row, where it begins, and the 4th, which is looked at, nobody knows.
    assert [row.status for row in sink.rows[3:]] == [status] * 6
    (words,) = [w for w in said if "writes into" in w]
    assert "middle.block.weight" in words
    assert "test_promise_grad.Recompute" in words
    assert same(bare["grads"][:2], probed["grads"][:2])


@pytest.mark.parametrize("mode", ["record", "backward"])
def test_at_a_later_row_that_is_looked_at_the_training_is_bitwise_as_without(mode):
    def losses_of(model, step):
        model.middle.on = step >= 6  # two micro-batches a step: from the 4th row
        return model(batch(step))

    bare, _, _ = train(lambda: Net(Reversible()), steps=8, losses_of=losses_of)
    probed, sink, _ = train(lambda: Net(Reversible()), mode, steps=8, losses_of=losses_of)
    assert [k for k in bare if not same(bare[k], probed[k])] == []
    assert [row.status.startswith("not measured") for row in sink.rows] == [False] * 3 + [True] * 5


@pytest.mark.parametrize("mode", ["record", "backward"])
def test_the_hugging_face_reformer(mode):
    transformers = pytest.importorskip("transformers")

    def step(mode):
        sow()
        config = transformers.ReformerConfig(
            vocab_size=32,
            hidden_size=16,
            attention_head_size=8,
            num_attention_heads=2,
            feed_forward_size=32,
            attn_layers=["local", "local"],
            local_attn_chunk_length=4,
            axial_pos_shape=(4, 4),
            axial_pos_embds_dim=(8, 8),
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            local_attention_probs_dropout_prob=0.0,
        )
        model = transformers.ReformerModel(config).train()
        out = model(torch.arange(32).reshape(2, 16)).last_hidden_state
        losses = {"a": out[..., :8].square().mean(), "b": out[..., 8:].logsumexp(-1).mean()}
        if mode:
            probe = GradientProbe(model, ("a", "b"), every=1)
            with pytest.raises(ProbeError, match=r"encoder\.layers\.0.*modeling_reformer\._ReversibleFunction"):
                getattr(probe, mode)(losses)
            assert all(p.grad is None for p in model.parameters())
        sum(losses.values()).backward()
        return [p.grad for p in model.parameters()]

    assert equal(step(None), step(mode))


@pytest.mark.parametrize("mode", ["record", "backward", "micro"])
@pytest.mark.parametrize("how", ["data", "step", "in place"])
def test_hooks_on_tensors_that_move_parameters_are_held_off(mode, how):
    """An update within a tensor hook would be made in every pass."""

    def make():
        model = Net()
        for p in model.parameters():
            own = torch.optim.SGD([p], lr=0.1)

            def hook(gradient, p=p, own=own):
                if how == "data":
                    p.data.add_(gradient, alpha=-0.1)
                elif how == "in place":
                    with torch.no_grad():
                        torch._foreach_add_([p.data], [gradient], alpha=-0.1)
                else:
                    p.grad = gradient
                    own.step()
                    p.grad = None

            p.register_hook(hook)
        return model

    bare, _, _ = train(make, sgd=False, steps=3)
    probed, sink, said = train(make, mode, sgd=False, steps=3)
    assert same(bare["tensors"], probed["tensors"])
    assert [row.status for row in sink.rows] == ["measured"] * 3
    assert any("held off" in words and "register_post_accumulate_grad_hook" in words for words in said)


def test_passes_through_heads_alone_are_looked_at_too():
    sow()
    model = Net()
    model.a = nn.Sequential(Reversible(), nn.Linear(8, 2))
    losses = model(batch(0))
    probe = GradientProbe(model, ("a", "b"), [Collector()], level="features")
    with pytest.raises(ProbeError, match=r"into \.grad of a\.0\.block\.weight.*test_promise_grad\.Recompute"):
        probe.record(losses)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("when", ["before", "later"])
def test_hooks_of_the_users_are_named_once(when):
    model, seen = Net(), []

    def hook():
        model.second.weight.register_hook(seen.append)
        model.a.register_full_backward_hook(lambda *_: seen.append(1))

    words = r"backward hooks of your own on parameter second\.weight, module a run in every pass"
    if when == "before":
        hook()
        with pytest.warns(RuntimeWarning, match=words):
            probe = GradientProbe(model, ("a", "b"), [Collector()], every=1)
    else:
        probe = GradientProbe(model, ("a", "b"), [Collector()], every=1)
        probe.record(model(batch(0)))
        hook()
        with pytest.warns(RuntimeWarning, match=words):
            probe.record(model(batch(1)))
    probe.record(model(batch(2)))  # and not again
    assert seen


def test_parameters_without_numbers_yet_are_no_obstacle():
    model, sink = Net(), Collector()
    model.unused = nn.LazyLinear(3)
    with GradientProbe(model, ("a", "b"), [sink], every=1) as probe, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*backward hooks of your own")
        model.a.weight.register_hook(lambda _: None)
        for step in range(4):
            probe.record(model(batch(step)))
    assert [row.status for row in sink.rows] == ["measured"] * 4
