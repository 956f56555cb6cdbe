"""The optimizer's step within the backward: every row is that of the parameters before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from promises import Net, batch, same, sow, train
from zoo import Collector, naive_gramian

from gradprobe.probes import GradientProbe

HOOKS = ("step", "data", "node step", "node data")
OPTIONS = ({}, {"memory": "low"}, {"sketch": 4096})


def follow(model, how):
    """Let parameters be updated while the backward runs."""
    nodes = []
    for p in model.parameters():
        own = torch.optim.SGD([p], lr=0.1)

        def hook(*_, p=p, own=own):
            if how.endswith("step"):
                own.step()
            else:
                p.data.add_(p.grad, alpha=-0.1)
            p.grad = None

        if how.startswith("node"):
            node = p.expand_as(p).grad_fn.next_functions[0][0]
            node.register_hook(hook)
            nodes.append(node)
        else:
            p.register_post_accumulate_grad_hook(hook)
    return nodes


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("first", [0, 2, 4])
@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("how", HOOKS)
def test_every_row_is_right(how, use, first, options):
    sow()
    model, sink, nodes = Net(), Collector(), []
    with GradientProbe(model, ("a", "b"), [sink], every=1, **options) as probe:
        for step in range(7):
            if step == first:
                nodes = follow(model, how)
            losses = model(batch(step))
            before = [p.detach().clone() for p in model.parameters()]
            if use == "record":
                probe.record(losses)
            expected = naive_gramian(probe.shared.layers, losses) if probe.shared else None
            if use == "record":
                sum(losses.values()).backward()
            else:
                probe.backward(losses)
            for p in model.parameters():
                p.grad = None
            if expected is not None:
                norms = np.sqrt(np.diagonal(expected, axis1=1, axis2=2))
                scale = norms[:, :, None] * norms[:, None, :]
                assert np.abs((sink.rows[-1].gram - expected) / scale).max() < 1e-6
            moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            assert moved == (step >= first)
    assert [row.status for row in sink.rows] == ["measured"] * 7
    assert len(nodes) in (0, 8)


@pytest.mark.parametrize("mode", ["record", "backward", "micro", "low", "sketch", "features"])
@pytest.mark.parametrize("how", HOOKS)
def test_a_training_ends_in_every_bit_as_without_a_probe(how, mode):
    def make():
        model = Net()
        model.held = follow(model, how)
        return model

    bare, _, _ = train(make, sgd=False)
    probed, sink, said = train(make, mode, sgd=False)
    assert same(bare["tensors"], probed["tensors"])
    assert [row.status for row in sink.rows] == ["measured"] * len(sink.rows)
    assert not said


def test_where_the_derived_gradient_is_lost_and_parameters_have_moved_the_row_says_so():
    sow()
    model, sink = Net(), Collector()
    with GradientProbe(model, ("a", "b"), [sink], every=1) as probe:
        for step in range(6):
            if step == 5:
                follow(model, "step")
                meter = probe._recorder.gradients
                meter.last_gram = meter.last_gram * np.diag([1.0, 1e20])  # makes it derive b
            probe.backward(model(batch(step)), {"a": 1e6, "b": 1e-2} if step == 5 else None)
            model.zero_grad()
    assert sink.rows[-1].status == (
        "not measured: the optimizer stepped within the backward, before the derived gradient was known"
    )
    assert np.isnan(sink.rows[-1].gram).all()
