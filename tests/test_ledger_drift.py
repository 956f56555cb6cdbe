"""How the losses are had with what they detach held as it was: without the model's forward where that is the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ledger_loop import TASKS
from test_ledger_probe import ledger_of
from torch import nn

import gradprobe


class Chasing(nn.Module):
    """Its loss `a` is trained towards a target made of its own prediction, detached."""

    def __init__(self, kind="plain"):
        super().__init__()
        torch.manual_seed(2)
        self.kind, self.left_behind = kind, None
        self.count = lambda: None
        self.trunk, self.a, self.b = nn.Sequential(nn.Linear(6, 12), nn.Tanh()), nn.Linear(12, 2), nn.Linear(12, 1)

    def forward(self, x):
        self.count()
        if self.kind == "draws":
            x = x + 0.1 * torch.rand_like(x)
        h = self.trunk(x)
        out = {"a": self.a(h), "b": [self.b(h + h.detach() if self.kind == "detaches" else h)]}
        self.left_behind = out["a"][:, 0] * 1.0
        return (out, object()) if self.kind == "odd" else out

    def losses(self, seed=0, count=32):
        x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
        out = self(x)
        out = out[0] if self.kind == "odd" else out
        box, score = out["a"].T
        if self.kind == "looks behind":
            box = self.left_behind
        target = torch.exp(-(box - x[:, 0]).square()).detach()
        if self.kind == "writes":
            out["b"][0].data.mul_(1.0)
            out["b"][0].add_(0.0)
        if self.kind == "feeds back":
            score = self(x + target[:, None])["a"][:, 1]
        scored = nn.functional.binary_cross_entropy_with_logits(score, target)
        return {"a": (box - x[:, 0]).square().mean() + 3 * scored, "b": (out["b"][0] - x[:, 1:2]).square().mean()}


def recorded(path, kind, *, shortcut=True, steps=12):
    model, forwards = Chasing(kind), []
    model.count = lambda: forwards.append(1)  # an attribute that is a number would be put back
    opt = torch.optim.SGD(model.parameters(), 0.05)
    ledger = gradprobe.Ledger(lambda: (model.losses(seed) for seed in (100, 101)), ends="probe")
    if not shortcut:
        ledger._held._run_anyway = True
    with gradprobe.attach(model, TASKS, path, optimizer=opt, ledger=ledger) as probe:
        for step in range(steps):
            probe.backward(model.losses(seed=1 + step))
            opt.step()
            opt.zero_grad()
    return ledger_of(path)[0], len(forwards), ledger._held._run_anyway


KINDS = ("plain", "draws", "detaches", "looks behind", "writes", "feeds back", "odd")


@pytest.mark.parametrize("kind", KINDS)
def test_drift_is_to_the_bit_what_it_is_with_every_forward(tmp_path, kind):
    short, fewer, _ = recorded(tmp_path / "short.h5", kind)
    full, every, _ = recorded(tmp_path / "full.h5", kind, shortcut=False)
    assert full["drift"][:, 0].all()
    for name, values in full.items():
        if name not in ("time", "overhead"):
            np.testing.assert_array_equal(short[name], values, err_msg=name)
    # Two micro-batches at 12 steps; at the 1st, 2nd, 4th and 8th of them they run all the same, beside the shortcut.
    # What is left behind is found at the 1st.
    saved = {"plain": 2 * 8, "feeds back": 2 * 8 - 2 * 4}.get(kind, 0)
    assert every - fewer == saved


def test_what_a_forward_leaves_behind_for_the_loss_ends_the_shortcut_at_the_first_step(tmp_path):
    assert recorded(tmp_path / "run.h5", "looks behind")[2]
    assert not recorded(tmp_path / "plain.h5", "plain")[2]


def test_the_model_s_forward_is_its_own_afterwards(tmp_path):
    model = Chasing()
    assert "forward" not in vars(model)
    batch = lambda: (_ for _ in ()).throw(RuntimeError("no data"))  # noqa: E731
    opt = torch.optim.SGD(model.parameters(), 0.05)
    ledger = gradprobe.Ledger(model.losses, ends="probe")
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=opt, ledger=ledger) as probe:
        for step in range(4):
            probe.backward(model.losses(seed=step))
            if step == 3:
                ledger._probe = batch
                with pytest.warns(RuntimeWarning, match="no data"):
                    opt.step()
            else:
                opt.step()
            opt.zero_grad()
            assert "forward" not in vars(model)
