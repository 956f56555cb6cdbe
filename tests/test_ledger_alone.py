"""What a task loses as others shorten its steps: its part of an update against the one it would have made alone."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from ledger_loop import TASKS, Net, Options, flat, gradients, population
from test_ledger import a_ledger
from test_ledger_probe import ledger_of, record
from torch import nn

import gradprobe
from gradprobe.cli.app import run as command
from gradprobe.ledger.windows import window
from gradprobe.runfile import files
from gradprobe.trainers.problems.dial import DialModel, make_dial_data

BETAS, LR, DECAY, WEIGHTS, CLIP = (0.9, 0.99), 2e-3, 0.3, (1.0, 0.5), 0.7


# ---- each row, against optimizers that are each given one task's gradients


class Lone:
    """Two of torch's own Adams of one task: one sees coupled weight decay, as the second moment does, one does not."""

    def __init__(self, parameters, decay):
        self.decay = decay
        self.seen, self.bare = ([nn.Parameter(p.detach().clone()) for p in parameters] for _ in (0, 1))
        self.adams = [torch.optim.Adam(copies, LR, betas=BETAS) for copies in (self.seen, self.bare)]

    def update(self, shares, parameters):
        """What it would add to the parameters where they are, and by how much the shares themselves entered that."""
        for copies, adam, decay in zip((self.seen, self.bare), self.adams, (self.decay, 0.0), strict=True):
            for copy, share, p in zip(copies, shares, parameters, strict=True):
                copy.grad = share + decay * p.detach()
            adam.step()
        squares = flat(self.adams[0].state[p]["exp_avg_sq"] for p in self.seen)
        first = flat(self.adams[1].state[p]["exp_avg"] for p in self.bare)
        count = float(self.adams[1].state[self.bare[0]]["step"])
        per_moment = LR / (1 - BETAS[0] ** count) / ((squares / (1 - BETAS[1] ** count)).sqrt() + 1e-8)
        return -first * per_moment, per_moment * (1 - BETAS[0])


@pytest.mark.parametrize("ends", ["batch", "probe"])
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_a_row_says_what_an_adam_of_the_task_s_own_gradients_would_do(tmp_path, kind, ends):
    model, data = Net().double(), [v.double() if v.is_floating_point() else v for v in population()]
    optimizer = getattr(torch.optim, kind)(model.parameters(), LR, betas=BETAS, weight_decay=DECAY)
    shared, everything = list(model.trunk.parameters()), list(model.parameters())
    lone = [Lone(shared, DECAY if kind == "Adam" else 0.0) for _ in TASKS]
    named = lambda which: dict(zip(TASKS, model.losses(*which), strict=True))  # noqa: E731
    fixed = lambda: named([v[:200] for v in data])  # noqa: E731
    of = lambda losses: [flat(g) for g in gradients(list(losses.values()), shared)]  # noqa: E731
    lefts, rights, moves, corrections = [], [], [], []
    ledger = gradprobe.Ledger(fixed, ends=ends)
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=optimizer, ledger=ledger) as probe:
        for step in range(25):
            halves = [[v[20 * step + 10 * k :][:10] for v in data] for k in (0, 1)]
            one, other = (of(named(half)) for half in halves)
            own = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
            lefts.append(own if ends == "batch" else of(fixed()))
            probe.backward(weights=dict(zip(TASKS, WEIGHTS, strict=True)), micro=[named(half) for half in halves])
            scale = min(1.0, CLIP / (float(nn.utils.clip_grad_norm_(everything, CLIP)) + 1e-6))
            sizes = [p.numel() for p in shared]
            shares = [
                [scale * w * g.view_as(p) for g, p in zip(task.split(sizes), shared, strict=True)]
                for w, task in zip(WEIGHTS, own, strict=True)
            ]
            moved, entered = zip(
                *(one.update(task, shared) for one, task in zip(lone, shares, strict=True)), strict=True
            )
            noise = [((a - b) / 2).square() for a, b in zip(one, other, strict=True)]  # of a mean of two halves
            moves.append(moved)
            corrections.append([scale * w * float(n @ e) for w, n, e in zip(WEIGHTS, noise, entered, strict=True)])
            optimizer.step()
            optimizer.zero_grad()
            rights.append(of(fixed()))
    if ends == "batch":
        rights = lefts[1:]
    else:
        corrections = np.zeros_like(corrections)
    inner = lambda gradients, step: [float(g @ u) for g, u in zip(gradients, moves[step], strict=True)]  # noqa: E731
    rows = range(len(rights))
    expected = [
        (np.array(inner(lefts[k], k)) + np.array(inner(rights[k], k)) + np.array(corrections[k])) / 2 for k in rows
    ]
    found, _ = ledger_of(tmp_path / "run.h5")
    np.testing.assert_allclose(found["alone"].sum(axis=1)[: len(rights)], expected, rtol=2e-5)
    own = np.diagonal(found["term"][..., :2].sum(axis=1), axis1=1, axis2=2)
    assert np.abs(own / expected[0] - 1)[: len(rights)].max() > 0.05  # it is another number than the task's own part


@pytest.mark.parametrize("ends", ["batch", "probe"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov"])
def test_without_a_second_moment_it_is_the_task_s_own_part_to_the_bit(tmp_path, optimizer, ends):
    record(tmp_path / "run.h5", Options(optimizer=optimizer, steps=10, ends=ends, clip=0.7, weights=WEIGHTS))
    found, _ = ledger_of(tmp_path / "run.h5")
    np.testing.assert_array_equal(found["alone"], np.diagonal(found["term"][..., :2], axis1=2, axis2=3))
    made = window(found, TASKS)
    assert not np.nan_to_num([made.shrunk, made.shrunk_error]).any()  # NaN where a gate is shut
    assert ends == "batch" or np.isfinite(made.shrunk).all()


@pytest.mark.parametrize("ends", ["batch", "probe"])
def test_a_task_that_the_other_has_no_weight_beside_is_alone(tmp_path, ends):
    record(tmp_path / "run.h5", Options(optimizer="adamw", steps=30, ends=ends, weights=(1.0, 0.0)))
    found, _ = ledger_of(tmp_path / "run.h5")
    own = found["term"][..., 0, 0]
    np.testing.assert_allclose(found["alone"][..., 0], own, rtol=1e-4, atol=1e-5 * np.nanmax(np.abs(own)))
    assert not np.nan_to_num(found["alone"][..., 1]).any()


def test_without_micro_batches_it_has_no_correction_either(tmp_path):
    record(tmp_path / "run.h5", Options(optimizer="adam", steps=5), measured_in_micro=False)
    assert np.isnan(ledger_of(tmp_path / "run.h5")[0]["alone"]).all()


# ---- how much of the history has to be known


def test_a_second_moment_that_is_mostly_of_unknown_steps_tells_nothing(tmp_path):
    record(tmp_path / "run.h5", Options(optimizer="adamw", ends="probe"), steps=50, burst=10, every=40)
    found, _ = ledger_of(tmp_path / "run.h5")
    assert np.isfinite(found["alone"][:10]).all()
    assert np.isnan(found["alone"][10:]).all()
    assert np.isfinite(found["term"]).all()


def test_one_unknown_step_of_many_is_no_matter(tmp_path):
    model, data = Net(), population()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.9))
    fixed = lambda: dict(zip(TASKS, model.losses(*(v[:50] for v in data)), strict=True))  # noqa: E731
    ledger = gradprobe.Ledger(fixed, ends="probe")
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=optimizer, ledger=ledger) as probe:
        for step in range(75):
            probe.backward(dict(zip(TASKS, model.losses(*(v[20 * (step % 50) :][:20] for v in data)), strict=True)))
            if step == 20:
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)  # by number: nobody's share
            optimizer.step()
            optimizer.zero_grad()
    told = np.isfinite(ledger_of(tmp_path / "run.h5")[0]["alone"]).all(axis=(1, 2))
    assert told[:20].all()
    assert not told[20:42].any()  # a tenth of 0.9^22 is a hundredth
    assert told[42:].all()


def test_a_file_of_an_earlier_version_opens_and_does_not_know_it(tmp_path, capsys):
    record(tmp_path / "run.h5", Options(optimizer="adamw", ends="probe"), steps=40)
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        now = window(run.ledger, TASKS)
    with h5py.File(tmp_path / "run.h5", "a") as file:
        del file["ledger/alone"]
    with (tmp_path / "run.h5").open("r+b") as file:
        files.seal(file)
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert "alone" not in run.ledger
        before = window(run.ledger, TASKS)
    np.testing.assert_array_equal(before.interference, now.interference)
    assert np.isnan(before.shrunk).all()
    assert command(["summary", str(tmp_path / "run.h5")]) == 0
    assert "shorter" not in capsys.readouterr().out


# ---- what a window makes of it


def test_what_is_lost_is_what_shorter_steps_and_the_other_take():
    ledger = a_ledger()
    own = np.diagonal(ledger["term"][..., :2], axis1=2, axis2=3)
    found = window({**ledger, "alone": own * np.array([5.0, 1.0])}, TASKS)
    np.testing.assert_allclose(found.shrunk, [0.8, 0.0], atol=1e-12)
    np.testing.assert_allclose(found.lost, [1 - 0.2 * 0.75, 0.0], atol=1e-12)
    assert [found.dominated(t) for t in (0, 1)] == [True, False]
    alike = window({**ledger, "alone": own}, TASKS)
    assert not alike.dominated(0)  # it loses a quarter, all of it cancelled
    np.testing.assert_allclose(alike.lost[0], 0.25)


def test_rows_that_do_not_tell_are_left_out_of_both_sides():
    ledger = a_ledger(rows=40)
    alone = 4 * np.diagonal(ledger["term"][..., :2], axis1=2, axis2=3)
    alone[10:] = np.nan
    ledger["term"][10:, :, 0, 0] *= 2
    ledger["loss_change"] = np.nansum(ledger["term"], axis=(1, 3)) + ledger["head"]
    np.testing.assert_allclose(window({**ledger, "alone": alone}, TASKS).shrunk, 0.75)
    alone[7:] = np.nan
    assert np.isnan(window({**ledger, "alone": alone}, TASKS).shrunk).all()


def test_steps_that_were_shortened_to_nothing_are_told_where_c_is_not():
    ledger = a_ledger()
    noise = np.random.default_rng(1).standard_normal(ledger["term"].shape[:2])
    alone = np.diagonal(ledger["term"][..., :2], axis1=2, axis2=3).copy()
    ledger["term"][..., 0, 0] = 1e-3 * noise
    ledger["loss_change"] = np.nansum(ledger["term"], axis=(1, 3)) + ledger["head"]
    found = window({**ledger, "alone": alone}, TASKS)
    assert np.isnan(found.interference[0]).all()
    assert found.shrunk[0] == pytest.approx(1, abs=0.01)
    assert found.dominated(0)


# ---- against what really happens

STEPS, BATCH = 96, 16


def dial(path, spec, optimizer, tasks=("a", "b"), seed=0):
    """Training on a dial problem; the loss of a before and after, of all samples."""
    data = make_dial_data(spec, seed=seed)
    parts = data.spec
    model = DialModel(parts.layers, parts.dim, (parts.ratio, 1.0), seed)
    opt = optimizer(model.parameters())
    images = data.train.images
    losses = lambda x: model.losses(model(x), None)  # noqa: E731
    ledger = gradprobe.Ledger(lambda: losses(images), ends="probe")
    stream = torch.Generator().manual_seed(3 + seed)
    before = losses(images)["a"].item()
    with gradprobe.attach(model, ("a", "b"), path, optimizer=opt, ledger=ledger if path else False) as probe:
        for _ in range(STEPS):
            found = losses(images[torch.randint(len(images), (BATCH,), generator=stream)])
            if path:
                probe.backward(found)
            else:
                sum(found[task] for task in tasks).backward()
            opt.step()
            opt.zero_grad()
    return before, losses(images)["a"].item(), images.double().numpy()


def adam(parameters):
    return torch.optim.AdamW(parameters, 2e-3, betas=(0.9, 0.999), weight_decay=0)


def shrunk_in(path):
    with gradprobe.open_run(path) as run:
        return window(run.ledger, run.tasks, start=20)


def expected(images, ratio):
    """1 - own / alone of a, where gradients are constant and second moments have settled.

    ``sum u_a^2 / sqrt(E g^2) / sum u_a^2 / sqrt(E g_a^2)`` over the numbers of the parameters; of a batch's mean,
    ``E g^2`` is the square of the true gradient and the variance of a sample over the samples in the batch.
    """
    a, b = images[:, 0].reshape(len(images), -1) * ratio, images[:, 1].reshape(len(images), -1)
    joint, alone = (np.sqrt(g.mean(axis=0) ** 2 + g.var(axis=0) / BATCH) for g in (a + b, a))
    square = a.mean(axis=0) ** 2
    return 1 - (square / joint).sum() / (square / alone).sum()


def test_a_loss_by_dominance_is_told_where_c_is_blind_and_is_as_large_as_the_outcome_s(tmp_path):
    """The other task's gradient is 20 times as long and at a right angle."""
    spec = "dial:angle=90,ratio=.05,noise=4"
    before, together, images = dial(tmp_path / "run.h5", spec, adam)
    _, alone, _ = dial(None, spec, adam, tasks=("a",))
    outcome = 1 - (before - together) / (before - alone)
    assert outcome > 0.8
    found = shrunk_in(tmp_path / "run.h5")
    assert all(map(found.passed, (0, 1)))
    assert found.interference[0, 1] < 0.7
    assert found.dominated(0)
    assert found.lost[0] == pytest.approx(outcome, abs=0.1)
    assert found.shrunk[0] == pytest.approx(expected(images, 0.05), abs=0.02)
    assert abs(found.lost[1]) < 0.02
    assert not found.dominated(1)


def test_under_sgd_the_same_problem_shortens_nothing(tmp_path):
    dial(tmp_path / "run.h5", "dial:angle=90,ratio=.05,noise=4", lambda p: torch.optim.SGD(p, 0.02))
    assert shrunk_in(tmp_path / "run.h5").shrunk.tolist() == [0, 0]


def test_equal_tasks_shorten_each_other_s_steps_by_the_root_of_what_the_second_moment_grows_by(tmp_path):
    _, _, images = dial(tmp_path / "run.h5", "dial:angle=90,noise=4", adam)
    found = shrunk_in(tmp_path / "run.h5")
    np.testing.assert_allclose(found.shrunk, expected(images, 1.0), atol=0.02)
    _, _, images = dial(tmp_path / "loud.h5", "dial:angle=90,noise=12", adam)
    loud = shrunk_in(tmp_path / "loud.h5").shrunk[0]
    assert loud == pytest.approx(expected(images, 1.0), abs=0.03)
    assert loud == pytest.approx(1 - 1 / np.sqrt(2), abs=0.06)  # of gradients that are all noise


def test_a_task_beside_its_own_copy_makes_half_and_loses_nothing(tmp_path):
    dial(tmp_path / "run.h5", "dial:angle=0,correlation=1,noise=4", adam)
    found = shrunk_in(tmp_path / "run.h5")
    np.testing.assert_allclose(found.shrunk, 0.5, atol=1e-4)
    np.testing.assert_allclose(found.lost, 0, atol=1e-4)
    assert not found.dominated(0)
