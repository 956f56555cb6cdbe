"""Gradient surgery against TorchJD itself, and what our adapter adds: scale, heads, randomness, errors."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import training
from torch import nn
from zoo import naive_gramian

from gradprobe import measures
from gradprobe.cli.app import run as command
from gradprobe.errors import MissingExtraError, TrainingError
from gradprobe.probes.shared_layers import by_module, find_shared
from gradprobe.trainers.surgery import Surgery
from gradprobe.trainers.weightings import METHODS, Weighting

torchjd = pytest.importorskip("torchjd.aggregation")

THEIRS = {
    "pcgrad": lambda g: torchjd.PCGradWeighting()(g),
    "gradvac": lambda g: torchjd.GradVacWeighting()(g),
    "cagrad": lambda g: torchjd.CAGradWeighting(c=0.4)(g),
    "mgda": lambda g: torchjd.MGDAWeighting()(g),
    "upgrad": lambda g: torchjd.UPGradWeighting()(g),
    "imtl": lambda g: torchjd.IMTLGWeighting()(g),
    "aligned": lambda g: torchjd.AlignedMTLWeighting()(g),
    "fairgrad": lambda g: torchjd.FairGradWeighting(alpha=1.0)(g),
    "nash": lambda g: torchjd.NashMTL(n_tasks=len(g), max_norm=0.0).weighting(torch.linalg.cholesky(g)),
}


class Conflicting(nn.Module):
    """Three tasks that pull a trunk in different directions, with heads of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.double()

    def losses(self, step=0):
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        z = self.trunk(x)
        wanted = (x[:, :1], -2 * x[:, :1] + x[:, 1:2], 3 * x[:, 1:2])
        return {f"t{i}": (h(z) - y).square().mean() for i, (h, y) in enumerate(zip(self.heads, wanted, strict=True))}


EQUAL = {"t0": 1.0, "t1": 1.0, "t2": 1.0}


def gramian(model, losses):
    shared = find_shared(by_module(model), losses)
    return naive_gramian(shared.layers, losses).sum(0)


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_torchjds_own_on_the_same_gramian(method):
    model = Conflicting()
    gram = gramian(model, model.losses())
    assert measures.pair_cosine(gram).min() < -0.1  # there is something to operate on
    possible = []
    for seed in range(40):
        torch.manual_seed(seed)
        possible.append(THEIRS[method](torch.from_numpy(gram)).numpy())
    found = Surgery(method, model, EQUAL, match_norm=False).step(model.losses())
    difference = np.abs(np.array(possible) - list(found.values())).max(1)
    assert difference.min() < (1e-5 if method in ("nash", "fairgrad", "cagrad") else 1e-9)
    scaled = Surgery(method, model, EQUAL).step(model.losses())
    ratio = np.array(list(scaled.values())) / possible[int(difference.argmin())]
    np.testing.assert_allclose(ratio, ratio[0], rtol=2e-3)  # the same direction; solvers stop at a tolerance


@pytest.mark.parametrize("method", METHODS)
def test_the_combined_gradient_is_as_long_as_the_joint_one(method):
    model, static = Conflicting(), {"t0": 1.0, "t1": 0.3, "t2": 2.0}
    weights = Surgery(method, model, static).step(model.losses())
    lengths = []
    for chosen in (weights, static):
        model.zero_grad()
        losses = model.losses()
        sum(chosen[t] * losses[t] for t in losses).backward()
        lengths.append(torch.cat([p.grad.ravel() for p in model.trunk.parameters()]).norm().item())
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-9)


def test_small_gradients_are_treated_as_large_ones_are():
    """TorchJD's solvers take a Gramian below a threshold for zero."""
    gram = np.array([[1.0, -0.6], [-0.6, 2.0]])
    from gradprobe.trainers.surgery import choose

    for method in METHODS:
        large, small = (choose(Weighting(method, 2), gram * scale, 0, np.ones(2), match=True) for scale in (1.0, 1e-12))
        np.testing.assert_allclose(small, large, rtol=1e-9, err_msg=method)


@pytest.mark.parametrize("method", ["pcgrad", "mgda"])
def test_heads_learn_with_the_static_weights(method):
    model, static = Conflicting(), {"t0": 1.0, "t1": 0.5, "t2": 2.0}
    balancer = Surgery(method, model, static)
    losses = model.losses()
    weights = balancer.step(losses)
    assert max(abs(weights[t] - static[t]) for t in static) > 0.1
    sum(weights[t] * losses[t] for t in losses).backward()
    balancer.after_backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    losses = model.losses()
    for chosen, part in ((static, "heads"), (weights, "trunk")):
        model.zero_grad()
        sum(chosen[t] * losses[t] for t in losses).backward(retain_graph=True)
        for name, parameter in model.named_parameters():
            if name.startswith(part):
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_else_is_touched(method):
    model = Conflicting()
    torch.manual_seed(11)
    before, state = torch.get_rng_state(), {n: v.clone() for n, v in model.state_dict().items()}
    Surgery(method, model, EQUAL).step(model.losses())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


def test_what_is_drawn_depends_on_the_seed_and_the_step_alone():
    model = Conflicting()
    gram = gramian(model, model.losses())
    one, other = Weighting("pcgrad", 3, seed=4), Weighting("pcgrad", 3, seed=4)
    series = [one(gram, step) for step in range(8)]
    assert len({tuple(w) for w in series}) > 1
    np.testing.assert_array_equal(other(gram, 5), series[5])
    torch.manual_seed(123)
    np.testing.assert_array_equal(other(gram, 6), series[6])


def test_a_gradient_that_is_not_finite_gives_the_static_weights_and_a_warning():
    model, static = Conflicting(), {"t0": 1.0, "t1": 0.5, "t2": 2.0}
    balancer, losses = Surgery("mgda", model, static), model.losses()
    losses["t1"] = (losses["t1"] - losses["t1"].detach()).sqrt()  # finite, its gradient is not
    with pytest.warns(RuntimeWarning, match="mgda had no answer at step 0"):
        assert balancer.step(losses) == static


def test_tasks_that_share_nothing_cannot_be_combined():
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    x = torch.ones(3, 2)
    with pytest.raises(TrainingError, match="pcgrad: the tasks share no layer"):
        Surgery("pcgrad", model, {"a": 1.0, "b": 1.0}).step({"a": model[0](x).mean(), "b": model[1](x).mean()})


def test_nash_without_its_solver_says_so_before_training_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ecos", None)
    monkeypatch.chdir(tmp_path)
    assert command(["record", "--trainer", "nash", "--imgsz", "64"]) == 2
    error = capsys.readouterr().err
    assert "'ecos'" in error
    assert "pip install 'gradprobe[nash]'" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "missing"), [("pcgrad", "torchjd.aggregation"), ("cagrad", "cvxpy"), ("upgrad", "quadprog")]
)
def test_a_missing_package_names_the_pip_line(method, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gradprobe\[surgery\]'"):
        Weighting(method, 2)


def test_the_recorded_weights_are_those_in_force_at_their_own_step():
    """From the recorded Gramian of a row follow the recorded weights of the same row."""
    run = training.run(training.make("mgda"), 4)
    for row in run.rows:
        gram = torch.from_numpy(row.gram.sum(0))
        expected = measures.match_norm(gram.numpy(), torchjd.MGDAWeighting()(gram / gram.trace() * 2).numpy(), [1, 1])
        np.testing.assert_allclose(row.weight, expected, rtol=1e-4)
    assert len({tuple(row.weight) for row in run.rows}) == 4


def test_the_flags_of_record_reach_the_method():
    """--no-match-norm: the method's own weights; --cagrad-c: another step."""
    first = {}
    for c in (0.1, 0.9):
        (row,) = training.run(training.make("cagrad", match_norm=False, cagrad_c=c), 1).rows
        gram = torch.from_numpy(measures.over_all(row.gram[None], np.ones((len(row.gram), 2), bool))[0])
        theirs = torchjd.CAGradWeighting(c=c)(gram / gram.trace() * 2).numpy()
        np.testing.assert_allclose(row.weight, theirs, rtol=1e-4)
        first[c] = row.weight
    assert np.abs(first[0.1] - first[0.9]).max() > 0.01
