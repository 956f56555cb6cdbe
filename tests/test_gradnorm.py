"""GradNorm held to the paper: against its algorithm run with autograd's double backward, and property by property."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conformance.problems import Regressions, algorithm_1
from hypothesis import given, settings
from hypothesis import strategies as st

from gradprobe.errors import UsageError
from gradprobe.trainers.gradnorm import GradNorm, project, weight_gradient


def ours(model, scales, steps, *, alpha, lr, beta1, initial, **options):
    names = [f"t{i}" for i in range(len(initial))]
    balancer = GradNorm(
        dict(zip(names, initial, strict=True)), [model.shared], alpha=alpha, lr=lr, momentum=beta1, **options
    )
    sgd, history = torch.optim.SGD(model.parameters(), lr=0.01), []
    for step in range(steps):
        losses, weights = model.losses(step, scales), balancer.weights()
        history.append([weights[n] for n in names])
        balancer.update(losses)
        sgd.zero_grad()
        sum(weights[n] * losses[n] for n in names).backward()
        sgd.step()
    return np.array(history)


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
@pytest.mark.parametrize(
    ("scales", "initial"), [((1, 3), (1.0, 1.0)), ((1, 3), (1.0, 0.4)), ((1, 2, 4), (1.0, 1.0, 1.0))]
)
def test_the_weights_are_the_papers_for_200_steps(alpha, scales, initial):
    common = {"alpha": alpha, "lr": 0.005, "beta1": 0.9}
    named = {f"t{i}": weight for i, weight in enumerate(initial)}
    expected = np.array(algorithm_1(Regressions(len(scales)), scales, 200, initial=named, **common))
    found = ours(Regressions(len(scales)), scales, 200, initial=initial, **common)
    assert np.abs(expected - expected[0]).max() > 0.1  # they did move
    assert (expected > 2e-3).all()  # and met no bound of ours
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_closed_form_is_the_derivative():
    w = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    norm, ratio = torch.tensor([3.0, 1.0, 0.2]).double(), torch.tensor([0.9, 0.5, 1.4]).double()
    target = ((w * norm).mean() * (ratio / ratio.mean()) ** 1.5).detach()
    (expected,) = torch.autograd.grad((w * norm - target).abs().sum(), w)
    torch.testing.assert_close(weight_gradient(w.detach(), norm, ratio, 1.5), expected)


def test_the_task_that_lags_behind_gains():
    norm = torch.ones(2, dtype=torch.float64)
    gradient = weight_gradient(torch.ones(2).double(), norm, torch.tensor([1.0, 0.2]).double(), 1.5)
    assert gradient[0] < 0 < gradient[1]  # descent raises the first weight, whose loss fell less


def test_the_larger_gradient_loses_when_both_learn_alike():
    gradient = weight_gradient(torch.ones(2).double(), torch.tensor([10.0, 1.0]).double(), torch.ones(2).double(), 1.5)
    assert gradient[0] > 0 > gradient[1]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.floats(-5, 50), min_size=2, max_size=6),
    st.floats(0.0, 0.9),
    st.floats(1.1, 20),
)
def test_projected_weights_have_the_sum_and_keep_the_bounds(weights, low, high):
    count = len(weights)
    result = project(torch.tensor(weights, dtype=torch.float64), float(count), low, high)
    assert float(result.sum()) == pytest.approx(count, rel=1e-9)
    assert (result >= low - 1e-12).all()
    assert (result <= high + 1e-9).all()
    assert (result > 0).all()
    for i, j in itertools.combinations(range(count), 2):  # order is kept
        if max(weights[i], 0) > max(weights[j], 0):
            assert result[i] >= result[j] - 1e-12


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6))
def test_without_a_bound_met_projecting_is_the_papers_renormalisation(weights):
    w = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(project(w, 2.0, 0.0, float("inf")), w * 2 / w.sum())


def test_the_ratio_of_the_free_weights_is_kept_when_one_meets_a_bound():
    result = project(torch.tensor([100.0, 2.0, 1.0]).double(), 6.0, 0.0, 3.0)
    torch.testing.assert_close(result, torch.tensor([3.0, 2.0, 1.0]).double())


def test_bounds_that_allow_no_such_sum_are_refused():
    with pytest.raises(UsageError, match=r"no 2 weights between --min-weight 0.0 and --max-weight 0.5 sum"):
        project(torch.ones(2).double(), 2.0, 0.0, 0.5)


def test_weights_stay_positive_and_sum_at_every_step_even_with_a_wild_learning_rate():
    common = {"alpha": 1.5, "lr": 3.0, "beta1": 0.9, "initial": (1.0, 0.01)}
    history = ours(Regressions(2), (1, 100), 60, **common, lowest=0.001, highest=10.0)
    np.testing.assert_allclose(history.sum(1), 2.0, rtol=1e-12)
    assert (history >= 0.001 - 1e-15).all()
    np.testing.assert_allclose(history[0], [2 / 1.01, 0.02 / 1.01])  # scaled to the sum, the ratio kept


def test_nothing_leaks_into_the_models_gradients():
    model, scales = Regressions(2), (1, 10)
    balancer = GradNorm({"t0": 1.0, "t1": 1.0}, [model.shared])
    losses = model.losses(0, scales)
    balancer.update(losses)
    assert all(p.grad is None for p in model.parameters())
    (1.3 * losses["t0"] + 0.7 * losses["t1"]).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = model.losses(0, scales)
    (1.3 * losses["t0"] + 0.7 * losses["t1"]).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters(), strict=True))


def test_the_first_losses_stay_the_reference():
    model = Regressions(2)
    balancer = GradNorm({"t0": 1.0, "t1": 1.0}, [model.shared])
    first = model.losses(0, (1, 2))
    balancer.update(first)
    balancer.update(model.losses(5, (1, 2)))
    kept = balancer.state_dict()["initial_losses"]
    torch.testing.assert_close(kept, torch.stack([v.detach() for v in first.values()]))


def test_a_step_that_is_not_finite_moves_nothing_and_is_no_reference():
    model = Regressions(2)
    balancer = GradNorm({"t0": 1.0, "t1": 1.0}, [model.shared])
    losses = model.losses(0, (1, 2))
    losses["t0"] = losses["t0"] * float("nan")
    balancer.update(losses)
    assert balancer.weights() == {"t0": 1.0, "t1": 1.0}
    assert balancer.state_dict()["initial_losses"] is None


def test_a_layer_that_a_task_does_not_reach_is_refused_at_the_first_step():
    toy = Regressions(2)
    balancer = GradNorm({"t0": 1.0, "t1": 1.0}, list(toy.heads["t0"].parameters()))
    with pytest.raises(UsageError, match="task 't1' does not reach it"):
        balancer.update(toy.losses(0, (1, 1)))
