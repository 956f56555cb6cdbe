"""GradNorm as published, for any implementation: ``implementations.py`` says how to add one.

Chen, Badrinarayanan, Lee, Rabinovich, ICML 2018, arXiv:1711.02257. What an implementation is known to fail is an
expected failure with its reason, and strict: one that is mended shows.
"""

from __future__ import annotations

import json
import math
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from implementations import EXPECTED_FAILURES, IMPLEMENTATIONS
from problems import PaperToy, Regressions, algorithm_1
from warm import Process

HERE = Path(__file__).parent
EVEN = {"t0": 1.0, "t1": 1.0}


@pytest.fixture(params=IMPLEMENTATIONS)
def make(request):
    name, test = request.param, request.function.__name__
    if name == "gradnorm-pytorch":
        pytest.importorskip("gradnorm_pytorch")
    if reason := EXPECTED_FAILURES.get(name, {}).get(test):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    def made(*arguments, **options):
        return IMPLEMENTATIONS[name](*arguments, **options)

    made.name = name
    return made


def train(one, model, scales, steps, *, first=0, lr=0.01, decay=0.0):
    """Weights (steps, T) in force."""
    sgd, history = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay), []
    for step in range(first, first + steps):
        history.append([one.weights()[name] for name in sorted(one.weights())])
        sgd.zero_grad()
        one.step(model.losses(step, scales))
        sgd.step()
    return np.array(history)


@pytest.mark.parametrize("alpha", [0.12, 1.5])
@pytest.mark.parametrize("initial", [EVEN, {"t0": 1.0, "t1": 0.4}], ids=["even", "uneven"])
def test_the_weight_trajectory_is_the_papers(make, alpha, initial):
    options = {"alpha": alpha, "lr": 0.005}
    expected = np.array(algorithm_1(Regressions(), (1, 3), 120, initial=initial, **options))
    model = Regressions()
    assert np.abs(expected - expected[0]).max() > 0.1
    np.testing.assert_allclose(train(make(initial, model.shared, **options), model, (1, 3), 120), expected, rtol=1e-5)


def test_the_lagging_task_gains(make):
    """Both gradients are equally long; one loss has fallen to a fifth, the other not at all."""
    model = Regressions()
    one = make(EVEN, model.shared, alpha=1.5, lr=0.01)
    for ratio in (1.0, 0.2):
        summed = model.shared.sum()
        one.step({"t0": summed + 1 - summed.detach(), "t1": summed + ratio - summed.detach()})
    assert one.weights()["t0"] > one.weights()["t1"]


def test_weights_are_positive_and_sum_to_t_at_every_step(make):
    for lr in (0.02, 3.0):
        model = Regressions(3)
        one = make({"t0": 1.0, "t1": 0.01, "t2": 1.0}, model.shared, alpha=1.5, lr=lr)
        history = train(one, model, (1, 3, 100), 40, lr=1e-5)
        np.testing.assert_allclose(history.sum(1), 3, rtol=1e-5)
        assert (history > 0).all()


def joint_gradients(model, weights, losses):
    model.zero_grad()
    sum(weights[name] * loss for name, loss in losses.items()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_nothing_leaks_into_the_networks_gradients(make):
    model = Regressions()
    one = make({"t0": 1.3, "t1": 0.7}, model.shared, alpha=1.5, lr=0.02)
    weights = one.weights()
    one.step(model.losses(0, (1, 10)))
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, expected in joint_gradients(model, weights, model.losses(0, (1, 10))).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-12, msg=name)


def test_heads_are_weighted_like_the_trunk(make):
    model = Regressions()
    one = make({"t0": 1.3, "t1": 0.7}, model.shared, alpha=1.5, lr=0.02)
    weights = one.weights()
    one.step(model.losses(0, (1, 10)))
    found = {name: head.weight.grad.clone() for name, head in model.heads.items()}
    for name, head in model.heads.items():
        model.zero_grad()
        model.losses(0, (1, 10))[name].backward()
        torch.testing.assert_close(found[name], weights[name] * head.weight.grad, rtol=1e-6, atol=1e-12)


def after_second_step(make, first, *, initial_losses=None):
    """Weights after a step with losses ``first`` and two with other ones; all gradients equally long."""
    model = Regressions()
    one = make(EVEN, model.shared, alpha=1.0, lr=0.01, initial_losses=initial_losses)
    for values in (first, (0.5, 0.4), (0.5, 0.4)):
        summed = model.shared.sum()
        one.step({f"t{i}": (summed - summed.detach()) + value for i, value in enumerate(values)})
    return one.weights()


def test_the_first_losses_are_the_reference_and_stay_it(make):
    """A third step sees the same ratios as the second, whatever came between; other first losses give others."""
    one = after_second_step(make, (1.0, 1.0))
    assert one != pytest.approx(EVEN, abs=1e-6)  # L(0) overwritten by each batch would make all ratios 1
    other = after_second_step(make, (2.0, 0.5))
    assert (one["t0"] > one["t1"]) != (other["t0"] > other["t1"])


def test_log_c_can_be_the_reference(make):
    given = after_second_step(make, (1.0, 1.0), initial_losses={"t0": math.log(3), "t1": math.log(10)})
    assert given != pytest.approx(after_second_step(make, (1.0, 1.0)), abs=1e-6)


def test_the_weights_have_an_optimizer_of_their_own_without_decay(make):
    """The network's learning rate and decay act on the weights through the network alone: not in the first step."""
    results = []
    for lr, decay in ((0.01, 0.0), (10.0, 0.5)):
        model = Regressions()
        one = make({"t0": 1.5, "t1": 0.5}, model.shared, alpha=1.5, lr=0.02)
        results.append(train(one, model, (1, 3), 2, lr=lr, decay=decay))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-12)
    model = Regressions()  # on target: equal norms, equal ratios; decay alone would move them
    one = make(EVEN, model.shared, alpha=1.5, lr=0.02)
    for _ in range(5):
        summed = model.shared.sum()
        one.step({name: summed - summed.detach() + 1 for name in EVEN})
    assert one.weights() == pytest.approx(EVEN, rel=1e-6)


def test_the_order_of_the_tasks_does_not_matter(make):
    model = Regressions()
    one = train(make({"t0": 1.0, "t1": 0.5}, model.shared, alpha=1.5, lr=0.01), model, (1, 4), 40)
    model = Regressions()
    other = train(make({"t1": 0.5, "t0": 1.0}, model.shared, alpha=1.5, lr=0.01), model, (1, 4), 40)
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_it_goes_on_from_its_state(make):
    model = Regressions()
    expected = train(make(EVEN, model.shared, alpha=1.5, lr=0.01), model, (1, 3), 20)
    model = Regressions()
    first = make(EVEN, model.shared, alpha=1.5, lr=0.01)
    train(first, model, (1, 3), 10)
    second = make(EVEN, model.shared, alpha=1.5, lr=0.01)
    second.load_state_dict(first.state_dict())
    np.testing.assert_allclose(train(second, model, (1, 3), 10, first=10), expected[10:], rtol=1e-9)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The weights of each of two ranks, by implementation."""
    folder = tmp_path_factory.mktemp("ranks")
    names = [name for name in IMPLEMENTATIONS if name == "ours" or find_spec("gradnorm_pytorch")]
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    running = [
        Process([rank, folder, *names], program=HERE / "ranks.py", env={**os.environ, "PYTHONPATH": path})
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"the ranks did not end: {errors}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_keep_the_same_weights(make, ranks):
    weights = [rank[make.name] for rank in ranks]
    assert weights[0] == weights[1]
    assert weights[0] != EVEN


def toy_ratios(one_for, steps=800):
    """L_i / L_i(0) of both tasks on a batch that is not trained on."""
    model = PaperToy()
    adam, one = torch.optim.Adam(model.parameters(), lr=1e-3), one_for(model)
    first = {name: float(loss.detach()) for name, loss in model.losses(10**6).items()}
    for step in range(steps):
        adam.zero_grad()
        losses = model.losses(step)
        if one is None:
            sum(losses.values()).backward()
        else:
            one.step(losses)
        adam.step()
    with torch.no_grad():
        return np.array([float(loss) / first[name] for name, loss in model.losses(10**6).items()])


@pytest.fixture(scope="module")
def equal_weights():
    return toy_ratios(lambda model: None)


def test_the_papers_toy_problem_reaches_a_lower_sum_of_loss_ratios_than_equal_weights(make, equal_weights):
    """Equal weights leave the task of scale 1 to the other's mercy: its loss more than doubles meanwhile."""
    found = toy_ratios(lambda model: make(EVEN, model.shared, alpha=0.12, lr=0.025))
    assert equal_weights[0] > 2
    assert found.sum() < 0.8 * equal_weights.sum()
    assert found[1] < 0.8  # and the other learns all the same
