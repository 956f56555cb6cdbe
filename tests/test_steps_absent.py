"""Tasks that come by parts, each with a call of its own on one forward, or are absent from some of a step's calls."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from steps import BATCH, TASKS, Net, naive
from zoo import Collector

from gradprobe.probes import GradientProbe, accumulation
from gradprobe.probes.accumulation import Accumulation, same_forward, uses_of
from gradprobe.probes.calls import Call, latest_losses, latest_weights, mean_values
from gradprobe.probes.clock import Stopwatch
from gradprobe.probes.passes import multiplied
from gradprobe.probes.shared_layers import by_module, find_shared
from gradprobe.rows import JOINED_WITHIN, MEASURED


class Step:
    """Calls of one step, each with the tasks that it hands in, and what is handed on."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Net().double()
        self.shared = find_shared(by_module(self.model), self.model.losses(0))
        self.meter = SimpleNamespace(kept=None, keeps=True, shared=self.shared)
        self.handed_on = []
        self.calls = Accumulation(
            TASKS, self.meter, True, True, lambda flag: flag, lambda *given: self.handed_on.append(given)
        )
        self.begun = False

    def call(self, losses, tasks, weights=(1.0, 1.0), missing=None):
        """Whether it was measured."""
        given = {t: losses[t] for t in tasks} | {t: missing for t in TASKS if t not in tasks and missing == "None"}
        given = {t: None if loss == "None" else loss for t, loss in given.items()}
        due = self.calls.due(not self.begun, not self.begun, given)
        self.begun = True
        parameters = self.shared.parameters
        if due:
            gradients = [
                list(torch.autograd.grad(losses[t], parameters, retain_graph=True))
                if t in tasks
                else [None] * len(parameters)
                for t in TASKS
            ]
            self.meter.kept[:] = gradients
            values = np.array([float(losses[t].detach()) if t in tasks else np.nan for t in TASKS])
            gram = multiplied(self.shared, gradients)
            watch, present = Stopwatch(torch.device("cpu")), np.array([t in tasks for t in TASKS])
            call = Call(0, given, values, np.array(weights), gram, MEASURED, watch, BATCH, None, [1.0], present)
            assert self.calls.takes(call, 1.0)
        for t in tasks:
            losses[t].backward(retain_graph=True)
        return due

    def row(self):
        self.calls.finish()
        ((calls, gram, noise),) = self.handed_on
        return calls, gram, noise


@pytest.mark.parametrize("missing", ["left out", "None"])
@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("order", ["by batch", "by task"])
def test_tasks_that_come_one_by_one_are_joined(batches, order, missing):
    step = Step()
    losses = [step.model.losses(batch) for batch in range(batches)]
    every = [(one, task) for one in losses for task in TASKS]
    every = every if order == "by batch" else [(one, task) for task in TASKS for one in losses]
    expected, noise_expected, _ = naive(step.model, range(batches))
    assert all(step.call(one, [task], missing=missing) for one, task in every)
    calls, gram, noise = step.row()
    assert [call.batch_size for call in calls] == [BATCH] * batches
    assert all(call.present.all() and set(latest_losses([call])) == set(TASKS) for call in calls)
    np.testing.assert_allclose(gram, expected, rtol=1e-9)
    values = [[float(one[t].detach()) for t in TASKS] for one in losses]
    np.testing.assert_allclose(mean_values(calls), np.mean(values, axis=0), rtol=1e-12)
    if batches == 1:
        assert noise is None
    elif order == "by batch":
        np.testing.assert_allclose(noise.part, noise_expected, rtol=1e-7, atol=1e-12)
    else:  # the products of two tasks on one micro-batch are made where both come one after the other
        diagonal = np.diagonal(noise.part, axis1=1, axis2=2)
        np.testing.assert_allclose(diagonal, np.diagonal(noise_expected, axis1=1, axis2=2), rtol=1e-7, atol=1e-12)
        known = ~np.isnan(noise.part[:, 0, 1])
        np.testing.assert_allclose(noise.part[known, 0, 1], noise_expected[known, 0, 1], rtol=1e-7, atol=1e-12)


def test_what_was_measured_is_not_measured_again():
    step = Step()
    losses = step.model.losses(0)
    assert step.call(losses, ["a"])
    assert not step.call(losses, ["a"])
    assert step.call(losses, ["a", "b"])
    assert not step.call(losses, ["a", "b"])
    calls, gram, noise = step.row()
    np.testing.assert_allclose(gram, naive(step.model, [0])[0], rtol=1e-9)
    assert (len(calls), noise) == (1, None)


def test_a_task_that_is_absent_from_some_calls_has_the_mean_of_the_others():
    step = Step()
    losses = [step.model.losses(batch) for batch in range(3)]
    step.call(losses[0], ["a"], (2.0, np.nan))
    step.call(losses[1], ["a", "b"], (2.0, 3.0))
    step.call(losses[2], ["a"], (4.0, np.nan))
    calls, gram, noise = step.row()
    parameters = step.shared.parameters
    a = torch.autograd.grad(sum(one["a"] for one in losses) / 3, parameters, retain_graph=True)
    b = torch.autograd.grad(losses[1]["b"], parameters)
    np.testing.assert_allclose(gram, multiplied(step.shared, [list(a), list(b)]), rtol=1e-9)
    assert mean_values(calls) == pytest.approx(
        [np.mean([float(x["a"].detach()) for x in losses]), losses[1]["b"].item()]
    )
    assert latest_weights(calls).tolist() == [4.0, 3.0]
    assert np.isnan(noise.part[:, 1]).all()
    assert np.isnan(noise.part[:, :, 1]).all()
    np.testing.assert_allclose(noise.part[:, 0, 0], naive(step.model, range(3))[1][:, 0, 0], rtol=1e-7, atol=1e-12)


def test_a_task_that_is_absent_from_all_calls_has_no_gradient():
    step = Step()
    for batch in range(2):
        step.call(step.model.losses(batch), ["a"])
    calls, gram, noise = step.row()
    assert np.isnan(gram[:, 1]).all()
    assert not np.isnan(gram[:, 0, 0]).any()
    assert np.isnan(mean_values(calls)[1])
    assert np.isnan(noise.part[:, 1]).all()


@pytest.mark.parametrize("lacks", ["a task", "an expert"])
def test_layers_that_join_within_a_step_mark_a_row_that_lacks_what_was_before(lacks):
    """The gradient of an earlier call on what was no layer then was not kept."""
    torch.manual_seed(0)
    model = Net().double()
    model.expert = torch.nn.Linear(4, 4).double()
    sink, optimizer = Collector(), torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientProbe(model, TASKS, [sink], every=1, optimizer=optimizer) as probe:
        for step in range(3):
            for call in range(2):
                losses = model.losses(2 * step + call)
                if call == 0 and lacks == "a task":
                    losses["b"] = None
                for task in TASKS if lacks == "an expert" else ():
                    if step == 1 and (call == 1 or task == "a"):
                        z = model.expert(torch.ones(4, dtype=torch.float64)).tanh()
                        losses[task] = losses[task] + model.trunk(z).square().mean()
                probe.record(losses)
                sum(loss for loss in losses.values() if loss is not None).backward()
            optimizer.step()
            optimizer.zero_grad()
    late = 0 if lacks == "a task" else 1
    assert [row.status for row in sink.rows] == [JOINED_WITHIN if step == late else MEASURED for step in range(3)]


@pytest.mark.parametrize("fails", ["_mean", "multiplied", "uses_of"])
def test_a_failure_while_calls_are_put_together_is_a_status(monkeypatch, fails):
    """Out of memory, say, within the optimizer's step."""
    torch.manual_seed(0)
    model, sink = Net().double(), Collector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientProbe(model, TASKS, [sink], every=1, optimizer=optimizer) as probe:

        def step(number):
            for batch in (2 * number, 2 * number + 1):
                losses = model.losses(batch)
                probe.record(losses)
                sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        step(0)
        with monkeypatch.context() as broken:
            broken.setattr(accumulation, fails, lambda *_: 1 / 0)
            with pytest.warns(RuntimeWarning, match="division by zero"):
                step(1)
        step(2)
    assert [row.step for row in sink.rows] == [0, 1, 2]
    assert [row.status == "measured" for row in sink.rows] == [True, fails == "uses_of", True]


# ---- one forward or two


def used(model, losses):
    return uses_of(losses, list(model.trunk.parameters()))


@pytest.mark.parametrize("autocast", [False, True])
def test_one_forward_is_told_from_two(autocast):
    """Within one autocast, the short copies of the weights are kept from forward to forward."""
    model = Net()
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z, other = model.trunk(x), model.trunk(x)
        a, b = model.a(z).mean(), model.b(torch.tanh(torch.tanh(z))).mean()
        again = model.a(other).mean()
    assert same_forward(used(model, [b]), used(model, [a]))
    assert same_forward(used(model, [a, b]), used(model, [a]))
    assert not same_forward(used(model, [again]), used(model, [a]))
    assert not same_forward(used(model, [again]), used(model, [a, b]))


def test_a_head_that_leaves_early_is_of_the_same_forward():
    model = Net()
    x = torch.randn(3, 6)
    early = torch.tanh(model.trunk[2](x))
    late = model.trunk[2](torch.cat([early, early[:, :1]], 1))
    assert same_forward(used(model, [early.sum()]), used(model, [late.sum()]))
    assert same_forward(used(model, [late.sum()]), used(model, [early.sum()]))


def test_a_loss_of_another_forward_beside_one_that_is_kept_is_a_new_forward():
    model = Net()
    penalty = sum(p.square().sum() for p in model.trunk.parameters())
    one, two = ([model.trunk(torch.randn(3, 4)).mean(), penalty] for _ in range(2))
    assert not same_forward(used(model, two), used(model, one))
    assert same_forward(used(model, [penalty]), used(model, one))


def test_forwards_behind_a_reentrant_checkpoint_are_told_apart():
    from torch.utils.checkpoint import checkpoint

    model = Net()
    x = torch.randn(3, 4, requires_grad=True)
    z, other = (checkpoint(model.trunk, x, use_reentrant=True) for _ in range(2))
    assert same_forward(used(model, [model.b(z).mean()]), used(model, [model.a(z).mean()]))
    assert not same_forward(used(model, [model.b(other).mean()]), used(model, [model.a(z).mean()]))
