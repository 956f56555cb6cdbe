"""The arithmetic of the loss ledger, in an ordinary loop without a probe, held against what a simulation can know."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from ledger_loop import OPTIMIZERS, TASKS, Net, Options, flat, gradients, population, train

from gradprobe.ledger import terms, windows
from gradprobe.ledger.windows import window


@functools.cache
def made(**options):
    return train(Options(**options))


def agreement(true, found):
    """Correlation, and the slope through the origin."""
    true, found = true.ravel(), found.ravel()
    return np.corrcoef(true, found)[0, 1], true @ found / (true @ true)


def in_blocks(rows, size=20):
    return rows.reshape(-1, size, *rows.shape[1:]).sum(axis=1)


# ---- the parts of an update


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_parts_sum_to_the_update_that_was_made(optimizer, dtype):
    found = made(optimizer=optimizer, steps=25, clip=0.5, begin_at=5, dtype=dtype)
    assert max(found.apart) < 1e-6


# ---- the noise part


def test_the_noise_part_is_the_formula_for_equal_shares():
    stream = torch.Generator().manual_seed(0)
    micro = list(torch.randn(4, 2, 10, generator=stream, dtype=torch.float64))
    mean, factor = sum(micro) / 4, torch.rand(10, generator=stream, dtype=torch.float64)
    found = terms.noise_products(mean, micro, [0.25] * 4, [6, 4], factor)
    for layer, place in enumerate((slice(0, 6), slice(6, 10))):
        for i in (0, 1):
            for j in (0, 1):
                inner = lambda a, b: float((a[i, place] * b[j, place] * factor[place]).sum())  # noqa: B023, E731
                together, apart = inner(mean, mean), np.mean([inner(g, g) for g in micro])
                np.testing.assert_allclose(found[layer, i, j], (apart - together) / 3, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (20, 6, 4, 2)])
def test_the_noise_part_is_unbiased_for_the_covariance_of_the_batch(sizes):
    stream = torch.Generator().manual_seed(1)
    count, shares = 4000, np.array(sizes) / sum(sizes)
    mixing = torch.randn(2, 2, generator=stream, dtype=torch.float64)
    truth = (mixing @ mixing.T).numpy() * 5 / sum(sizes)  # of the mean of so many samples, over five parameters
    found = np.zeros((count, 2, 2))
    for k in range(count):
        noise = [torch.randn(2, 5, generator=stream, dtype=torch.float64) / size**0.5 for size in sizes]
        micro = [0.7 + mixing @ n for n in noise]
        mean = sum(s * g for s, g in zip(shares, micro, strict=True))
        found[k] = terms.noise_products(mean, micro, list(shares), [5])[0]
    error = found.std(axis=0) / count**0.5
    assert (np.abs(found.mean(axis=0) - truth) < 4 * error).all()
    assert (error < 0.05 * np.abs(truth).max()).all()


def test_one_micro_batch_has_no_noise_part():
    mean = torch.ones(2, 3)
    assert np.isnan(terms.noise_products(mean, [mean], [1.0], [3])).all()


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (20, 6, 4, 2)])
def test_the_correction_takes_the_batch_s_own_noise_out_of_the_left_end(sizes):
    """At one point, over many batches, against the gradient of the whole population."""
    model, data = Net().double(), [v.double() if v.is_floating_point() else v for v in population()]
    shared, stream = list(model.trunk.parameters()), torch.Generator().manual_seed(3)
    of = lambda *which: torch.stack([flat(g) for g in gradients(model.losses(*which), shared)])  # noqa: E731
    truth, weights, lr = of(*data), np.array([1.0, 0.5]), 0.1
    expected = -lr * (truth @ truth.T).numpy() * weights
    shares, rows = np.array(sizes) / sum(sizes), []
    for _ in range(600):
        places = torch.randint(len(data[0]), (sum(sizes),), generator=stream).split(sizes)
        micro = [of(*(v[piece] for v in data)) for piece in places]
        mean = sum(s * g for s, g in zip(shares, micro, strict=True))
        left = terms.effects(mean, -lr * torch.from_numpy(weights)[:, None] * mean, [mean.shape[1]])
        noise = terms.noise_products(mean, micro, list(shares), [mean.shape[1]], lr)
        rows.append((left[0], terms.correction(noise, weights, 1.0, 2)[0]))
    left, correction = (np.array(side) for side in zip(*rows, strict=True))
    error = (left + correction).std(axis=0) / len(rows) ** 0.5
    assert (np.abs((left + correction).mean(axis=0) - expected) < 3.5 * error).all()
    own = np.eye(2, dtype=bool)
    assert (left.mean(axis=0)[own] < 1.5 * expected[own]).all()  # without it, progress is overstated


# ---- what the terms are worth


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_terms_of_the_batches_sum_to_the_change_of_the_loss(optimizer):
    found = window(made(optimizer=optimizer, steps=100, batch=1024, seed=1).ledger, TASKS)
    assert len(found.rows) >= 80
    for task in (0, 1):
        assert found.passed(task), found.gates[task]
    assert (found.change < 0).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_terms_at_the_probe_batch_s_own_gradients_leave_a_hundredth(optimizer):
    found = window(made(optimizer=optimizer, steps=60, ends="probe", shapley=True).ledger, TASKS)
    assert (np.abs(found.residual) < 0.01 * found.size).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_terms_are_shapley_values(optimizer):
    found = made(optimizer=optimizer, steps=60, ends="probe", shapley=True)
    correlation, slope = agreement(found.shapley, found.ledger["term"][:, 0])
    assert correlation >= 0.995
    assert abs(slope - 1) < 0.02


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_terms_of_noisy_batches_are_shapley_values_once_summed(optimizer):
    found = made(optimizer=optimizer, steps=80, batch=1024, shapley=True, seed=1)
    correlation, slope = agreement(in_blocks(found.shapley), in_blocks(found.ledger["term"][:, 0]))
    assert correlation >= 0.995
    assert abs(slope - 1) < 0.05


def test_first_order_alone_is_wrong():
    """The batch's own gradient at the left end overstates progress; the right end alone understates it."""
    found = made(optimizer="sgd", lr=0.1, steps=60, batch=64, ends="batch", shapley=True)
    true = np.array([found.shapley[:, t, t].sum() for t in (0, 1)])
    naive = np.array([found.left[:, t, t].sum() for t in (0, 1)])
    assert naive[0] / true[0] > 2
    exact = made(optimizer="sgd", lr=0.1, steps=60, ends="probe", shapley=True)
    assert agreement(exact.shapley, exact.left)[1] > 1.3
    assert agreement(exact.shapley, exact.right)[1] < 0.7
    assert abs(agreement(exact.shapley, exact.ledger["term"][:, 0])[1] - 1) < 0.02


def test_the_gate_is_shut_at_the_edge_of_stability():
    steady = window(made(optimizer="sgd", lr=0.05, steps=60, batch=256, ends="probe").ledger, TASKS)
    assert all(map(steady.passed, (0, 1)))
    for lr in (0.4, 0.8):
        found = window(made(optimizer="sgd", lr=lr, steps=60, batch=256, ends="probe").ledger, TASKS)
        assert not found.passed(0)
        assert np.isnan(found.interference[0]).all()


# ---- the columns beside the tasks


def test_weight_decay_is_a_column_of_its_own():
    for optimizer in ("momentum", "adam", "adamw"):
        assert np.abs(made(optimizer=optimizer, steps=100, batch=1024, seed=1).left[:, :, 2]).min() > 0
    assert not made(optimizer="sgd", steps=100, batch=1024, seed=1).left[:, :, 2].any()


def test_momentum_from_before_the_burst_is_a_column_and_shuts_c_until_it_is_small():
    late = {"optimizer": "momentum", "batch": 1024, "begin_at": 20, "ends": "probe"}
    short = made(steps=35, **late).ledger
    earlier = np.abs(short["term"][:, 0, :, 3])
    assert earlier[0].max() > 0.5 * np.abs(short["term"][0, 0, :, :2]).max()
    found = window(short, TASKS)
    assert np.isnan(found.interference).all()
    assert found.left_out == {"momentum from before the burst is in it": len(short["step"])}
    long = made(steps=100, **late).ledger
    found = window(long, TASKS)
    assert 20 <= found.rows[0] <= 50  # 0.9^45 is a hundredth
    assert all(map(found.passed, (0, 1)))
    assert (np.abs(found.term[:, 3]) <= 0.01 * found.size).all()
    whole = made(steps=100, optimizer="momentum", batch=1024, ends="probe").ledger
    same = window(whole, TASKS, start=long["step"][found.rows[0]])
    np.testing.assert_allclose(found.interference, same.interference, atol=0.02)


def test_the_first_steps_of_adam_do_not_count():
    found = window(made(optimizer="adam", steps=60, ends="probe", shapley=True).ledger, TASKS)
    assert found.rows[0] == 20
    assert found.left_out == {"not measured, or not to be counted": 20}


# ---- windows


def a_ledger(rows=40, layers=3, cancelled=0.25, seed=0):
    """Task a loses a quarter of its progress to b; b nothing; two layers alike and one that b does not reach."""
    stream = np.random.default_rng(seed)
    term = np.zeros((rows, layers, 2, 4))
    pace = (1 + 0.3 * stream.standard_normal(rows))[:, None]
    term[:, :, 0, 0], term[:, :, 1, 1] = -1.0 * pace, -2.0 * pace
    term[:, :, 0, 1] = cancelled * pace
    term[:, -1, 1] = np.nan
    head = np.full((rows, 2), -0.5)
    change = np.nansum(term, axis=(1, 3)) + head
    return {
        "step": np.arange(rows),
        "burst": np.zeros(rows, dtype=int),
        "term": term,
        "head": head,
        "loss_change": change,
        "drift": np.zeros_like(change),
        "status": np.zeros(rows, dtype=int),
    }


def test_c_is_the_part_of_its_own_progress_that_the_other_cancelled():
    found = window(a_ledger(), TASKS)
    np.testing.assert_allclose(found.interference, [[-1, 0.25], [0, -1]], atol=1e-12)
    np.testing.assert_allclose(found.residual, 0, atol=1e-9)
    np.testing.assert_allclose(window(a_ledger(), TASKS, layers=[0]).interference, found.interference)
    assert len(window(a_ledger(), TASKS, start=10, stop=30).rows) == 20


def test_a_change_that_the_terms_do_not_explain_shuts_that_task_s_gate_alone():
    ledger = a_ledger()
    ledger["loss_change"] = ledger["loss_change"] + np.array([0.0, 0.6])
    found = window(ledger, TASKS)
    assert [found.passed(t) for t in (0, 1)] == [True, False]
    assert np.isnan(found.interference[1]).all()
    assert np.isfinite(found.interference[0]).all()
    shut = [gate for gate in found.gates[1] if not gate.passed]
    assert [gate.name for gate in shut] == ["residual"]
    assert "b's loss" in str(shut[0].sentence)


def test_a_task_without_weight_has_no_own_progress_to_lose():
    ledger = a_ledger()
    ledger["term"][..., 1] = np.where(np.isnan(ledger["term"][..., 1]), np.nan, 0.0)
    ledger["loss_change"] = np.nansum(ledger["term"], axis=(1, 3)) + ledger["head"]
    found = window(ledger, TASKS)
    assert np.isnan(found.interference[1]).all()
    assert "own progress" in [gate.name for gate in found.gates[1] if not gate.passed]


def test_rows_that_are_not_known_are_left_out_and_counted():
    ledger = a_ledger()
    ledger["term"][3, :, :, 0] = np.nan
    ledger["loss_change"][5] = np.nan
    ledger["status"][7] = 2
    found = window(ledger, TASKS)
    assert len(found.rows) == 37
    assert sum(found.left_out.values()) == 3


def test_a_short_window_says_nothing():
    found = window(a_ledger(rows=5), TASKS)
    assert np.isnan(found.interference).all()
    empty = window(a_ledger(), TASKS, start=100)
    assert np.isnan(empty.interference).all()
    assert not empty.passed(0)
    assert [str(gate.sentence) for gate in empty.gates[0]] == ["0 rows of the ledger count"]


def test_the_standard_error_of_a_sum_of_correlated_rows():
    stream = np.random.default_rng(4)
    sums, errors = [], []
    for _ in range(400):
        noise = stream.standard_normal(210)
        rows = np.convolve(noise, np.ones(10) / 10, "valid")  # as momentum spreads a batch over ten steps
        sums.append(rows.sum())
        errors.append(windows.standard_error(rows))
    assert 0.8 < np.mean(errors) / np.std(sums) < 1.1
    independent = stream.standard_normal((400, 200))
    found = [float(windows.standard_error(rows)) for rows in independent]
    assert 0.85 < np.mean(found) / 200**0.5 < 1.1
