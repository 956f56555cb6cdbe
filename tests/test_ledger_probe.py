"""The loss ledger beside a probe: against the ordinary loop that keeps one itself, and that it changes nothing."""

from __future__ import annotations

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from ledger_loop import OPTIMIZERS, SOURCES, TASKS, Net, Options, population, train
from torch import nn

import gradprobe
from gradprobe.errors import ProbeError
from gradprobe.ledger.windows import window
from gradprobe.rows import absent
from gradprobe.updates import loss_ledger as module
from gradprobe.updates.optimizer_watch import FOREIGN_GRADIENT, NO_GRADIENT
from gradprobe.verdict import evidence


def record(path, options, *, steps=None, measured_in_micro=True, **how):
    """The training of :func:`ledger_loop.train`, with a probe in the place of its arithmetic."""
    o = options
    model = Net(o.seed).to(o.dtype)
    data = [v.to(o.dtype) if v.is_floating_point() else v for v in population(noise=o.noise)]
    optimizer = OPTIMIZERS[o.optimizer](model.parameters(), *(() if o.lr is None else (o.lr,)))
    stream = torch.Generator().manual_seed(100 + o.seed)
    sizes = list(o.shares or [o.batch // o.micro] * o.micro)
    named = lambda which: dict(zip(TASKS, model.losses(*which), strict=True))  # noqa: E731
    fixed = lambda: named([v[: o.probe] for v in data])  # noqa: E731
    ledger = gradprobe.Ledger(fixed, ends=o.ends, **how)
    weights = dict(zip(TASKS, o.weights, strict=True))
    with gradprobe.attach(model, TASKS, path, optimizer=optimizer, every=1000, ledger=ledger) as probe:
        for _ in range(o.steps + 1 if steps is None else steps):
            pieces = torch.randint(len(data[0]), (sum(sizes),), generator=stream).split(sizes)
            micro = [named([v[piece] for v in data]) for piece in pieces]
            if measured_in_micro:
                probe.backward(weights=weights, micro=micro, batch_size=sizes)
            else:
                shares = [size / sum(sizes) for size in sizes]
                probe.backward(
                    {t: sum(s * one[t] for s, one in zip(shares, micro, strict=True)) for t in TASKS}, weights
                )
            if o.clip:
                nn.utils.clip_grad_norm_(model.parameters(), o.clip)
            optimizer.step()
            optimizer.zero_grad()
    return model


def ledger_of(path):
    with gradprobe.open_run(path) as run:
        return run.ledger, run.status_names


def statuses(path):
    found, names = ledger_of(path)
    return [names[code] for code in found["status"]]


# ---- against the ordinary loop


@pytest.mark.parametrize("ends", ["batch", "probe"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_are_those_of_the_ordinary_loop(tmp_path, optimizer, ends):
    young = 20 if optimizer.startswith("adam") else 0
    steps = young + 5
    options = Options(
        optimizer=optimizer, steps=steps, ends=ends, shares=(20, 8, 6, 6), weights=(1.0, 0.5), clip=0.7, probe=100
    )
    record(tmp_path / "run.h5", options)
    found, _ = ledger_of(tmp_path / "run.h5")
    twin = train(options)
    rows = slice(0, steps)
    assert found["term"].shape == (steps + 1, 2, 2, 4)
    assert tuple(found["source"]) == SOURCES
    scale = np.abs(twin.ledger["term"]).max()
    np.testing.assert_allclose(found["term"][rows].sum(axis=1), twin.ledger["term"][:, 0], atol=1e-5 * scale)
    for name in ("left", "correction", "right"):
        expected = getattr(twin, name)
        np.testing.assert_allclose(found[name][rows], expected, atol=1e-5 * max(np.abs(expected).max(), scale))
    for name in ("head", "loss_change"):
        np.testing.assert_allclose(found[name][rows], twin.ledger[name], rtol=1e-5, atol=1e-9)
    told = statuses(tmp_path / "run.h5")
    assert told[:steps] == [module.YOUNG_ADAM] * young + ["measured"] * 5
    assert told[steps] == (module._NO_RIGHT_END if ends == "batch" else "measured")


def test_bursts_have_their_rows_and_the_momentum_from_before(tmp_path):
    options = Options(optimizer="momentum", steps=39, batch=64)
    record(tmp_path / "run.h5", options, steps=40, burst=6, every=15)
    found, _ = ledger_of(tmp_path / "run.h5")
    assert found["step"].tolist() == [*range(6), *range(15, 21), *range(30, 36)]
    assert found["burst"].tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert np.isfinite(found["term"]).all()  # the step after each burst gave its last row the right end
    assert np.abs(found["term"][:6, :, :, 3]).max() < 1e-12  # of rounding
    assert (np.abs(found["left"][6:, :, 3]).max(axis=1) > 0).all()
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run["step"].tolist() == [*range(7), *range(15, 22), *range(30, 37)]
    twin = train(Options(optimizer="momentum", steps=21, batch=64)).ledger["term"][:, 0]
    mine = found["term"].sum(axis=1)
    np.testing.assert_allclose(mine[:6], twin[:6], rtol=1e-4, atol=1e-9)
    # Whatever is known of where the momentum is from: all sources together are the update.
    np.testing.assert_allclose(mine[6:12].sum(axis=2), twin[15:21].sum(axis=2), rtol=1e-3, atol=1e-6)


def test_bursts_at_the_probe_batch_need_no_step_after(tmp_path):
    record(tmp_path / "run.h5", Options(optimizer="sgd", ends="probe"), steps=20, burst=4, every=10)
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run["step"].tolist() == run.ledger["step"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
        assert run.provenance["probe.ledger.ends"] == "probe"
        assert run.provenance["probe.ledger.burst"] == 4
    assert evidence.read(tmp_path / "run.h5").ledger_on_probe_batch
    record(tmp_path / "batch.h5", Options(optimizer="sgd"), steps=8)
    assert not evidence.read(tmp_path / "batch.h5").ledger_on_probe_batch


def test_its_window_is_the_one_of_the_ordinary_loop(tmp_path):
    options = Options(optimizer="momentum", steps=60, batch=1024, ends="probe")
    record(tmp_path / "run.h5", options, measured_in_micro=False)
    found, _ = ledger_of(tmp_path / "run.h5")
    mine, twin = window(found, TASKS, stop=60), window(train(options).ledger, TASKS)
    assert all(map(mine.passed, (0, 1)))
    np.testing.assert_allclose(mine.interference, twin.interference, atol=1e-3)


# ---- harmless


class Odd(nn.Module):
    """BatchNorm and dropout: what a forward too many would move."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 8))
        self.a, self.b = nn.Linear(8, 1), nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 3))

    def losses(self, seed, count=16):
        stream = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 6, generator=stream)
        h = self.trunk(x)
        return {
            "a": nn.functional.mse_loss(self.a(h), x[:, :1] * 2),
            "b": nn.functional.cross_entropy(self.b(h), (x[:, 1] > 0).long()),
        }


def odd(path, *, ledger, how="backward", optimizer="adamw", micro=2, steps=8, updates=False):
    model = Odd()
    opt = OPTIMIZERS[optimizer](model.parameters())
    torch.manual_seed(5)
    random.seed(5)

    def fixed():
        model.eval()  # a user's, which forgets where it was
        model.train()
        random.random()
        torch.rand(3)
        for seed in (1000, 1001):
            yield model.losses(seed)

    given = gradprobe.Ledger(fixed, ends=ledger, samples=32) if ledger else False
    trace = []
    with gradprobe.attach(model, TASKS, path, optimizer=opt, ledger=given, every=1, updates=updates) as probe:
        for step in range(steps):
            pieces = [model.losses(10 * step + k, 16 // micro) for k in range(micro)]
            if how == "backward":
                probe.backward(micro=pieces, batch_size=16)
            else:
                probe.record(micro=pieces, batch_size=16)
                sum(sum(piece[t] / micro for piece in pieces) for t in TASKS).backward()
            opt.step()
            opt.zero_grad()
            trace.append(torch.cat([v.reshape(-1).double() for v in model.state_dict().values()]))
            assert model.training
            assert all(m.training for m in model.modules())
    return torch.stack(trace), torch.get_rng_state(), random.random()


@pytest.mark.parametrize("how", ["backward", "record"])
@pytest.mark.parametrize("ends", ["batch", "probe"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_training_with_a_ledger_is_bit_for_bit_the_one_without(tmp_path, ends, how, optimizer):
    plain = odd(None, ledger="", how=how, optimizer=optimizer)
    seen = odd(tmp_path / "run.h5", ledger=ends, how=how, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], seen[:2], strict=True))
    assert plain[2] == seen[2]
    assert np.isfinite(ledger_of(tmp_path / "run.h5")[0]["term"][:7]).all()


def test_a_ledger_and_the_updates_share_their_work_and_their_numbers(tmp_path):
    odd(tmp_path / "both.h5", ledger="batch", updates=True)
    odd(tmp_path / "updates.h5", ledger="", updates=True)
    odd(tmp_path / "ledger.h5", ledger="batch")
    with gradprobe.open_run(tmp_path / "both.h5") as both:
        with gradprobe.open_run(tmp_path / "updates.h5") as other:
            for name, values in other.updates.items():
                if name not in ("time", "overhead"):
                    np.testing.assert_array_equal(both.updates[name], values)
        with gradprobe.open_run(tmp_path / "ledger.h5") as other:
            for name, values in other.ledger.items():
                if name not in ("time", "overhead", "status"):
                    np.testing.assert_array_equal(both.ledger[name], values)
        effect = both.updates["effect"].sum(axis=1)
        np.testing.assert_allclose(both.ledger["left"], effect, rtol=1e-4, atol=1e-7)


def test_the_probe_batch_is_measured_as_it_is_in_training(tmp_path):
    """Its change is that of its losses in train mode, with the same dropout on both sides."""
    model = Odd()
    opt = torch.optim.SGD(model.parameters(), 0.0)
    ledger = gradprobe.Ledger(lambda: model.losses(7), ends="probe")
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=opt, ledger=ledger) as probe:
        for step in range(3):
            probe.backward(model.losses(step))
            opt.step()
            opt.zero_grad()
    found, _ = ledger_of(tmp_path / "run.h5")
    assert (found["loss_change"] == 0).all()
    assert (found["term"] == 0).all()


# ---- what cannot be known says so


def test_without_micro_batches_there_is_no_correction(tmp_path):
    record(tmp_path / "run.h5", Options(optimizer="sgd", steps=5), measured_in_micro=False)
    found, _ = ledger_of(tmp_path / "run.h5")
    assert statuses(tmp_path / "run.h5")[:5] == [module.NO_MICRO] * 5
    for name in ("term", "correction"):
        assert np.isnan(found[name][..., :2]).all()  # decay and momentum share no batch with the gradient
    assert np.isnan(found["head"]).all()
    assert np.isfinite(found["left"]).all()
    assert np.isfinite(found["right"][:5]).all()
    assert np.isfinite(found["loss_change"]).all()


def test_without_a_probe_batch_there_is_no_change_and_no_gate_opens(tmp_path):
    model = Net()
    opt = torch.optim.SGD(model.parameters(), 0.05)
    data = population()
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=opt, ledger=True) as probe:
        for step in range(12):
            pieces = [
                [
                    v[40 * step + 20 * k :][:20].float() if v.is_floating_point() else v[40 * step + 20 * k :][:20]
                    for v in data
                ]
                for k in (0, 1)
            ]
            probe.backward(micro=[dict(zip(TASKS, model.losses(*piece), strict=True)) for piece in pieces])
            opt.step()
            opt.zero_grad()
    found, _ = ledger_of(tmp_path / "run.h5")
    assert np.isnan(found["loss_change"]).all()
    assert np.isfinite(found["term"][:-1]).all()
    assert not any(map(window(found, TASKS).passed, (0, 1)))


def test_a_foreign_gradient_and_a_skipped_step_leave_their_rows_empty(tmp_path):
    model, data = Net(), population()
    opt = torch.optim.SGD(model.parameters(), 0.05)
    ledger = gradprobe.Ledger(
        lambda: dict(zip(TASKS, model.losses(*(v[:50] for v in data)), strict=True)), ends="probe"
    )
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=opt, ledger=ledger) as probe:
        for step in range(5):
            probe.backward(dict(zip(TASKS, model.losses(*(v[:20] for v in data)), strict=True)))
            if step == 1:
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            if step == 3:
                opt.zero_grad()
            opt.step()
            opt.zero_grad()
    found, _ = ledger_of(tmp_path / "run.h5")
    told = statuses(tmp_path / "run.h5")
    assert told == ["measured", FOREIGN_GRADIENT, "measured", NO_GRADIENT, "measured"]
    assert np.isnan(found["term"][[1, 3]]).all()
    assert np.isfinite(found["term"][[0, 2, 4]]).all()


def test_what_momentum_keeps_fades_once_for_every_step_that_is_nobody_s(tmp_path):
    """Three clipped by number in a row: of what the tasks brought before, 0.9^4 is left one step later."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    model = nn.ModuleDict({"trunk": nn.Linear(4, 4, bias=False), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
    opt = torch.optim.SGD(model.trunk.parameters(), 1e-6, momentum=0.9)
    losses = lambda on: {t: on * model[t](model.trunk(x)).sum() for t in TASKS}  # noqa: E731
    ledger = gradprobe.Ledger(lambda: losses(1.0), ends="probe")
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=opt, ledger=ledger) as probe:
        for step in range(6):
            probe.backward(losses(1e-6 if step == 5 else 1.0))
            if step in (2, 3, 4):
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            opt.step()
            opt.zero_grad()
    term = ledger_of(tmp_path / "run.h5")[0]["term"][:, 0, 0, 0]
    np.testing.assert_allclose(term[[1, 5]] / term[0], [1.9, 1.9 * 0.9**4], rtol=1e-3)


def test_a_probe_batch_that_fails_ends_no_training(tmp_path):
    model, data, calls = Net(), population(), []

    def fixed():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the disk is gone")
        return dict(zip(TASKS, model.losses(*(v[:50] for v in data)), strict=True))

    opt = torch.optim.SGD(model.parameters(), 0.05)
    ledger = gradprobe.Ledger(fixed, ends="probe")
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=opt, ledger=ledger) as probe:
        for step in range(5):
            probe.backward(dict(zip(TASKS, model.losses(*(v[:20] for v in data)), strict=True)))
            if step == 1:
                with pytest.warns(RuntimeWarning, match="the disk is gone"):
                    opt.step()
            else:
                opt.step()
            opt.zero_grad()
    told = statuses(tmp_path / "run.h5")
    assert ["failed" in status for status in told] == [False, True, False, False, False]


def test_tasks_that_share_nothing_have_heads_alone(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({t: nn.Linear(4, 1) for t in TASKS})
    x = torch.randn(40, 4)
    losses = lambda: {t: (model[t](x) - x[:, :1]).square().mean() for t in TASKS}  # noqa: E731
    opt = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    ledger = gradprobe.Ledger(losses, ends="probe")
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=opt, ledger=ledger) as probe:
        for step in range(20):
            with pytest.warns(RuntimeWarning, match="nothing to measure") if step == 0 else nullcontext():
                probe.backward(losses())
            opt.step()
            opt.zero_grad()
    found, _ = ledger_of(tmp_path / "run.h5")
    assert statuses(tmp_path / "run.h5") == ["measured"] * 20
    assert found["term"].shape == (20, 0, 2, 4)
    np.testing.assert_allclose(found["head"], found["loss_change"], rtol=1e-4, atol=1e-7)
    made = window(found, TASKS)
    assert (np.abs(made.residual) < 1e-4 * made.size).all()
    assert np.isnan(made.interference).all()


def test_an_absent_task_has_no_own_progress(tmp_path):
    record(tmp_path / "run.h5", Options(optimizer="sgd", steps=40, weights=(1.0, 0.0), ends="probe"))
    found, _ = ledger_of(tmp_path / "run.h5")
    made = window(found, TASKS)
    assert made.passed(0)
    assert np.isnan(made.interference[1]).all()
    assert not found["term"][..., 1].any()  # nothing came from it
    assert made.residual[1] < 0.1 * made.size[1]  # but what the other did to it is known


def test_what_cannot_be_meant_is_refused():
    for wrong, words in (
        ({"ends": "middle"}, "there are 'batch' and 'probe'"),
        ({"ends": "probe"}, "give what makes its losses"),
        ({"burst": 5}, "go together"),
        ({"burst": 10, "every": 5}, "longer than"),
    ):
        with pytest.raises(ProbeError, match=words):
            gradprobe.Ledger(**wrong)
    model = Net()
    with pytest.raises(ProbeError, match=r"ledger= .*pass optimizer="):
        gradprobe.attach(model, TASKS, ledger=True)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ProbeError, match="memory='low'"):
        gradprobe.attach(model, TASKS, ledger=True, optimizer=opt, memory="low")
    ledger = gradprobe.Ledger(lambda: {"a": torch.zeros(())})
    with gradprobe.attach(model, TASKS, optimizer=opt, ledger=ledger) as probe:
        x = population()
        probe.backward(dict(zip(TASKS, model.losses(*(v[:9] for v in x)), strict=True)))
        with pytest.raises(ProbeError, match=r"no loss of \['b'\]"):
            opt.step()
    with pytest.raises(ProbeError, match="belongs to another probe"):
        gradprobe.attach(Net(), TASKS, optimizer=opt, ledger=ledger)


# ---- going on


def test_a_run_that_is_gone_on_with_has_every_row_but_the_one_before(tmp_path):
    whole = odd(tmp_path / "whole.h5", ledger="batch", steps=8)

    def half(resume_from=None, steps=range(8)):
        model = Odd()
        opt = OPTIMIZERS["adamw"](model.parameters())
        torch.manual_seed(5)
        ledger = gradprobe.Ledger(lambda: [model.losses(1000), model.losses(1001)], samples=32)
        probe = gradprobe.attach(
            model, TASKS, tmp_path / "run.h5", optimizer=opt, ledger=ledger, every=1, resume=resume_from is not None
        )
        if resume_from is not None:
            model.load_state_dict(resume_from["model"])
            opt.load_state_dict(resume_from["optimizer"])
            torch.set_rng_state(resume_from["rng"])
            probe.load_state_dict(resume_from["probe"])
        with probe:
            for step in steps:
                pieces = [model.losses(10 * step + k, 8) for k in (0, 1)]
                probe.backward(micro=pieces, batch_size=16)
                opt.step()
                opt.zero_grad()
            return {
                "model": {k: v.clone() for k, v in model.state_dict().items()},
                "optimizer": opt.state_dict(),
                "rng": torch.get_rng_state(),
                "probe": probe.state_dict(),
            }

    half(half(steps=range(5)), range(5, 8))
    found, _ = ledger_of(tmp_path / "run.h5")
    expected, _ = ledger_of(tmp_path / "whole.h5")
    assert found["step"].tolist() == expected["step"].tolist() == list(range(8))
    assert statuses(tmp_path / "run.h5")[4] == module._NO_RIGHT_END  # closed before the next step was measured
    rows = [0, 1, 2, 3, 5, 6]
    for name in ("term", "alone"):
        assert np.isfinite(expected[name][rows]).all()
        np.testing.assert_allclose(found[name][rows], expected[name][rows], rtol=1e-5, atol=1e-9, err_msg=name)
    assert whole is not None


# ---- what a loss detaches


class Chasing(nn.Module):
    """Its loss `a` is trained towards a target made of its own prediction, detached, as YOLOv5's objectness is."""

    def __init__(self, detach=True):
        super().__init__()
        torch.manual_seed(2)
        self.detach = detach
        self.trunk, self.a, self.b = nn.Sequential(nn.Linear(6, 12), nn.Tanh()), nn.Linear(12, 2), nn.Linear(12, 1)

    def losses(self, seed=0, count=64):
        x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
        h = self.trunk(x)
        box, score = self.a(h).T
        target = torch.exp(-(box - x[:, 0]).square())
        target = target.detach() if self.detach else target
        far = (box - x[:, 0]).square().mean()
        return {
            "a": far + 3 * nn.functional.binary_cross_entropy_with_logits(score, target),
            "b": (self.b(h) - x[:, 1:2]).square().mean(),
        }


def chasing(path, **how):
    model = Chasing(**how)
    opt = torch.optim.SGD(model.parameters(), 0.05)
    with gradprobe.attach(
        model, TASKS, path, optimizer=opt, ledger=gradprobe.Ledger(model.losses, ends="probe")
    ) as probe:
        for step in range(60):
            probe.backward(model.losses(seed=1 + step))
            opt.step()
            opt.zero_grad()
    return ledger_of(path)[0]


def test_a_target_that_is_detached_moves_the_loss_by_no_part_of_a_gradient(tmp_path):
    found = chasing(tmp_path / "run.h5")
    made = window(found, TASKS)
    assert abs(made.drift[0]) > 0.2 * made.size[0]  # as large as the gate lets through, twice
    assert not found["drift"][:, 1].any()
    assert all(map(made.passed, (0, 1))), made.gates
    blind = window({**found, "drift": np.zeros_like(found["drift"])}, TASKS)
    assert not blind.passed(0)


def test_a_loss_that_detaches_nothing_has_no_drift(tmp_path):
    found = chasing(tmp_path / "run.h5", detach=False)
    assert not found["drift"].any()
    assert all(map(window(found, TASKS).passed, (0, 1)))


def test_what_is_detached_elsewhere_than_before_is_not_known(tmp_path):
    model, calls = Chasing(), []

    def fixed():
        calls.append(1)
        return model.losses(count=64 + (len(calls) > 3))

    opt = torch.optim.SGD(model.parameters(), 0.05)
    with gradprobe.attach(
        model, TASKS, tmp_path / "run.h5", optimizer=opt, ledger=gradprobe.Ledger(fixed, ends="probe")
    ) as probe:
        for step in range(3):
            probe.backward(model.losses(seed=step))
            opt.step()
            opt.zero_grad()
    found, _ = ledger_of(tmp_path / "run.h5")
    assert np.isfinite(found["drift"][0]).all()
    assert np.isnan(found["drift"][1]).all()


def test_a_step_from_which_a_task_is_absent_is_a_row_that_says_so(tmp_path):
    model = Net(0).double()
    data = [v.double() if v.is_floating_point() else v for v in population()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=optimizer, every=1, ledger=True) as probe:
        for step in range(5):
            losses = dict(zip(TASKS, model.losses(*[v[8 * step : 8 * step + 8] for v in data]), strict=True))
            if step == 2:
                losses[TASKS[1]] = None
            probe.backward(losses)
            optimizer.step()
            optimizer.zero_grad()
    found = statuses(tmp_path / "run.h5")
    assert found[2] == absent([TASKS[1]])
    assert found[1] == found[4] == module._NO_RIGHT_END  # what was to be the right end lacks a task
    assert not any("failed" in status for status in found)
