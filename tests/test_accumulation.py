"""Gradient accumulation: the calls between two optimizer steps are micro-batches of one row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_probes import make
from zoo import Collector, naive_gramian

from gradprobe.probes import GradientProbe
from gradprobe.probes.shared_layers import by_module, find_shared
from gradprobe.rows import OVERFLOWED
from gradprobe.statistics import noise_part

CALLS, STEPS = 3, 3
WEIGHTS = {"t0": 1.0 / CALLS, "t1": 0.3 / CALLS}


def whole(case, calls):
    """The Gramian of the mean of some calls' losses, and its noise part, by naive passes."""
    losses = [case.losses(call) for call in calls]
    shared = find_shared(by_module(case.model), losses[0])
    mean = {task: sum(one[task] for one in losses) / len(losses) for task in losses[0]}
    gram = naive_gramian(shared.layers, mean)
    parts = sum(naive_gramian(shared.layers, one) for one in losses) / len(losses) ** 2
    return gram, noise_part(gram, parts, [1 / len(losses)] * len(losses))


def train(use, *, steps=STEPS, scaler=None, each=CALLS, calls_by="optimizer", **options):
    """Rows, and what each should be."""
    case, sink, expected = make("mlp"), Collector(), {}
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    counted = {"optimizer": optimizer} if calls_by == "optimizer" else {"accumulate": each}
    with GradientProbe(case.model, ("t0", "t1"), [sink], scaler=scaler, **counted, **options) as probe:
        for step in range(steps):
            calls = range(step * each, (step + 1) * each)
            expected[step] = whole(case, calls)
            for call in calls:
                losses = case.losses(call)
                if use == "backward":
                    probe.backward(losses, WEIGHTS, batch_size=4)
                    continue
                probe.record(losses, WEIGHTS, batch_size=4)
                total = sum(WEIGHTS[t] * losses[t] for t in losses)
                (total if scaler is None else scaler.scale(total)).backward()
            optimizer.step() if scaler is None else scaler.step(optimizer)
            if scaler is not None:
                scaler.update()
            optimizer.zero_grad()
    return sink.rows, expected


@pytest.mark.parametrize("use", ["backward", "record"])
@pytest.mark.parametrize("calls_by", ["optimizer", "accumulate"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_a_row_is_of_all_calls_of_its_step(use, calls_by, scaled, every):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    rows, expected = train(use, every=every, scaler=scaler, calls_by=calls_by)
    assert [row.step for row in rows] == list(range(0, STEPS, every))
    for row in rows:
        gram, noise = expected[row.step]
        np.testing.assert_allclose(row.gram, gram, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(row.gram_noise, noise, rtol=1e-7, atol=1e-12 * np.nanmax(gram))
        assert (row.micro_batches, row.batch_size, row.status) == (CALLS, 4 * CALLS, "measured")


def test_the_loss_of_a_row_is_the_mean_of_its_calls():
    rows, _ = train("record", every=1)
    case = make("mlp")
    values = np.mean([[float(v.detach()) for v in case.losses(call).values()] for call in range(CALLS)], axis=0)
    np.testing.assert_allclose(rows[0].loss, values, rtol=1e-12)


def test_a_single_call_is_a_row_of_its_own():
    rows, expected = train("backward", every=1, each=1)
    assert [row.micro_batches for row in rows] == [1] * STEPS
    assert [row.gram_noise for row in rows] == [None] * STEPS
    for row in rows:
        np.testing.assert_allclose(row.gram, expected[row.step][0], rtol=1e-9, atol=1e-15)


def test_micro_batches_of_micro_batches():
    case, sink = make("mlp"), Collector()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    gram, noise = whole(case, range(4))
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1, optimizer=optimizer) as probe:
        for first in (0, 2):
            probe.backward(micro=[case.losses(first), case.losses(first + 1)])
        optimizer.step()
    (row,) = sink.rows
    np.testing.assert_allclose(row.gram, gram, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(row.gram_noise, noise, rtol=1e-7, atol=1e-12 * np.nanmax(gram))
    assert row.micro_batches == 4


def test_a_step_that_the_scaler_left_out_is_no_part_of_the_next():
    """Its gradients are dropped; the call after it is no micro-batch of it, and is not measured in its place."""
    case, sink, left_out = make("mlp", torch.float32), Collector(), []
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1, optimizer=optimizer, scaler=scaler) as probe:
        for call in range(20):
            step = probe.step
            probe.backward({task: loss * 100 for task, loss in case.losses(call).items()})
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            left_out += [step] * (probe.step == step)
    assert left_out[:2] == [0, 0]  # more than once
    assert [row.step for row in sink.rows] == list(range(len(sink.rows)))
    assert {row.micro_batches for row in sink.rows} == {1}
    overflowed = [row.step for row in sink.rows if row.status == OVERFLOWED]
    assert overflowed
    assert set(overflowed) <= set(left_out)
    assert {row.status for row in sink.rows if row.step not in left_out} == {"measured"}


def test_what_fails_in_one_call_is_missing_in_the_row(monkeypatch):
    from gradprobe.probes import passes

    case, sink, real = make("mlp"), Collector(), passes.pass_to
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1, optimizer=optimizer) as probe:
        probe.backward(case.losses(0))
        monkeypatch.setattr(passes, "pass_to", lambda *_: 1 / 0)
        with pytest.warns(RuntimeWarning, match="division by zero"):
            probe.backward(case.losses(1))
        monkeypatch.setattr(passes, "pass_to", real)
        optimizer.step()
        optimizer.zero_grad()
        probe.backward(case.losses(2))
        optimizer.step()
    assert ["division" in row.status for row in sink.rows] == [True, False]
    assert np.isnan(sink.rows[0].gram).all()


@pytest.mark.parametrize("options", [{"memory": "low"}])
def test_where_gradients_are_not_kept_the_first_call_stands_for_the_step(options):
    case = make("mlp")
    expected = whole(case, [0])[0]
    rows, _ = train("backward", every=1, steps=1, **options)
    np.testing.assert_allclose(rows[0].gram, expected, rtol=1e-9, atol=1e-15)
    assert rows[0].micro_batches == 1
