"""What the doctor says of vectors of losses, and of code in a backward that is not torch's own."""

from __future__ import annotations

import pytest
import torch
from promises import Net, batch
from test_promise_grad import Reversible
from test_promise_once import Once, hooks_of
from torch import nn

import gradprobe


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 3)
        self.weights = nn.Parameter(torch.ones(2))

    def forward(self, x):
        z = self.trunk(x).mean((2, 3))
        return self.a(z).square().mean(), self.b(z).logsumexp(1).mean()


def vector(model, a, b, how):
    if how == "index":
        losses = torch.zeros(2)
        losses[0], losses[1] = a, b
        return {"a": losses[0], "b": losses[1]}
    if how == "cat":
        return dict(zip("ab", torch.cat([a.view(1), b.view(1)]).unbind(), strict=True))
    losses = torch.stack([a, b])
    if how == "weighted":
        losses = losses * model.weights
    return {"a": losses[0], "b": losses[1]}


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("how", ["index", "stack", "cat", "weighted"])
def test_a_vector_of_losses_is_no_batch(how, size):
    model = Normed()
    found = gradprobe.doctor(model, vector(model, *model(torch.randn(size, 3, 8, 8)), how))
    assert [f.check for f in found] == ["graph_alone", *(["loss_weights"] if how == "weighted" else [])]
    assert all("weights only weigh losses" in f.message for f in found[1:])
    assert "only one task has a gradient other than 0" in found[0].message


def the(model, losses):
    (finding,) = gradprobe.doctor(model, losses)
    return finding


def test_an_operation_that_is_not_torchs_own():
    model = Net(Reversible())
    finding = the(model, model(batch(0)))
    assert (finding.severity, finding.check) == ("note", "custom_operation")
    assert "test_promise_grad.Recompute" in finding.message


def test_hooks_on_saved_tensors_are_named_and_not_called():
    model = Net()
    with hooks_of(Once):
        losses = model(batch(0))
    finding = the(model, losses)
    assert (finding.severity, finding.check) == ("warning", "saved_tensor_hooks")
    assert "test_promise_once.Once.unpack" in finding.message
    sum(losses.values()).backward()  # nothing was handed out


def test_steps_within_the_backward():
    model = Net()
    model.second.weight.register_post_accumulate_grad_hook(lambda p: None)
    finding = the(model, model(batch(0)))
    assert (finding.severity, finding.check, finding.module) == ("note", "post_accumulate_hooks", "second")
