"""Forked trainings: branches on the same batches with a matched history, and what cannot have one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from forking import Training, adam, factory
from torch import nn

from gradprobe.audit import Experiment
from gradprobe.errors import TrainingError, UsageError
from gradprobe.forks import ForkOptions, fork, over_seeds
from gradprobe.forks.forked_training import _OtherSecondMoment
from gradprobe.forks.lost_progress import lost_part
from gradprobe.forks.shadow_moments import ShadowMoments
from gradprobe.trainers import audited
from gradprobe.trainers.problems import problem_of
from gradprobe.trainers.problems.dial import REACH
from gradprobe.trainers.settings import resolve

SHORT = ForkOptions(steps=40, checkpoints=2, horizon=6)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def plain(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def pair(found, task, by):
    return next(each for each in over_seeds(found) if (each.task, each.by) == (task, by))


# ---- what R is


def test_the_part_of_progress_that_is_lost():
    assert lost_part([1.0], [1.0]) == [1.0], "all of it"
    assert lost_part([0.0], [1.0]) == [0.0]
    assert lost_part([-0.5], [1.0]) == [-0.5], "the other task helps"
    assert np.isnan(lost_part([1.0], [0.0])).all(), "no progress of its own"
    assert np.isnan(lost_part([1.0, 1.0], [1.0, -2.0])).all()
    assert np.isnan(lost_part([np.nan, 1.0], [1.0, 1.0])).all()


def test_over_seeds_it_is_a_ratio_of_means_and_every_seed_adds_to_it():
    lost, own = np.array([0.5, 0.4, 0.6, 0.5]), np.array([1.0, 1.1, 1.2, 0.001])
    found = lost_part(lost, own)
    assert found.mean() == pytest.approx(lost.sum() / own.sum())
    assert found.max() < 2, "the last seed alone would say 500"


def test_a_task_without_a_gradient_takes_nothing_but_rounding():
    for optimizer in (adam, lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)):
        found = fork(factory({"a": 1.0, "b": 0.0}, optimizer, dtype=torch.float64), SHORT)
        assert pair([found], "a", "b").lost == pytest.approx(0, abs=1e-9)
        assert pair([found], "b", "a").undefined


def test_an_opposite_task_takes_all():
    class Opposed(Training):
        def losses(self, x):
            a = super().losses(x)["a"]
            return {"a": a, "b": -a}

    found = fork(lambda: Opposed({"a": 1.0, "b": 1.0}, momentum, norm=False).experiment(), SHORT)
    assert np.array_equal(found.joint, found.start)
    assert pair([found], "a", "b").lost == [1.0]


def test_the_same_task_twice_takes_nothing_under_adam():
    class Twice(Training):
        def losses(self, x):
            a = super().losses(x)["a"]
            return {"a": a, "b": a}

    make = lambda: Twice({"a": 1.0, "b": 1.0}, lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-12)).experiment()  # noqa: E731
    assert pair([fork(make, SHORT)], "a", "b").lost == pytest.approx(0, abs=1e-4)


OWN = 1 + REACH**2
"""A task's own squared gradient over that of the trunk: its head is not shared."""


def dial(data, **flags):
    settings = audited.audit_settings(resolve({"trainer": "joint", "data": data, **flags}))
    return audited.experiment_factory(settings, problem_of(settings).load(settings), evaluated=None)


@pytest.mark.parametrize("angle", [60, 90, 120])
def test_known_gradients_with_momentum_lose_what_their_angle_says(angle):
    """Losses are straight lines: on the trunk a task loses ``-cos * (length of b / length of a)``; its head is its own.

    Momentum that were kept would go on along b for some ten steps, and take the branch without b with it.
    """
    make = dial(f"dial:angle={angle},ratio=0.5,noise=0", optimizer="SGD", lr=2e-3, weight_decay=0.0, lrf=1.0)
    found = fork(make, SHORT)
    assert found.same_twice == 0
    assert pair([found], "a", "b").lost == pytest.approx(-2 * np.cos(np.radians(angle)) / OWN, abs=1e-3)
    assert pair([found], "b", "a").lost == pytest.approx(-0.5 * np.cos(np.radians(angle)) / OWN, abs=1e-3)


def test_an_arm_gives_back_what_its_weights_take_away():
    make = dial("dial:angle=120,ratio=1,noise=0", optimizer="SGD", lr=1e-3, weight_decay=0.0, lrf=1.0)
    options = ForkOptions(
        steps=40, checkpoints=2, horizon=6, arms={"less": {"a": 1, "b": 0.2}, "same": {"a": 1, "b": 1}}
    )
    found = pair([fork(make, options)], "a", "b")
    assert found.lost == pytest.approx(0.5 / OWN, abs=1e-3)
    assert found.given_back["less"] == pytest.approx(0.4 / OWN, abs=1e-3)
    assert found.given_back["same"] == pytest.approx(0.0, abs=1e-4)


def test_three_tasks_and_chosen_ones():
    options = ForkOptions(steps=40, checkpoints=2, horizon=6, without=("c",))
    found = fork(factory({"a": 1.0, "b": 1.0, "c": 2.0}), options)
    assert [(each.task, each.by) for each in over_seeds([found])] == [("a", "c"), ("b", "c")]
    assert found.start.shape == found.branches["without c"].shape == (2, 3)


def test_progress_that_is_not_above_its_noise_leaves_r_undefined():
    found = fork(factory({"a": 1.0, "b": 1.0}), SHORT)
    place = found.tasks.index("a")
    others = [copy.deepcopy(found) for _ in range(2)]
    for other, own in zip(others, (1e-3, 0.3), strict=True):
        other.branches["without b"][:, place] = other.start[:, place] - own
    lost = pair([found, *others], "a", "b")
    assert "not well above its noise" in lost.undefined
    assert np.isnan(lost.lost).all()
    assert np.isfinite(lost.cost).all(), "in units of loss it is known"


# ---- the training is left as it is


def test_the_training_is_the_one_that_runs_without_forks():
    """BatchNorm, a drawn batch order, a schedule: its losses are those of a plain loop, bit for bit."""
    made = []

    def make():
        training = Training({"a": 1.0, "b": 1.0}, adam)
        schedule = torch.optim.lr_scheduler.StepLR(training.optimizer, 10, 0.5)
        plain_step = training.step

        def step(trace, batch, weights):
            plain_step(trace, batch, weights)
            schedule.step()

        def evaluate(tasks):
            torch.rand(5, generator=training.draw)  # from the stream that the batches come from
            return training.losses(training.x)

        training.step = step
        made.append(training)
        found = training.experiment(schedule=schedule)
        found.evaluate = evaluate
        return found

    found = fork(make, SHORT)
    assert found.same_twice == 0
    make()
    training, steps, losses = made[-1], 0, {}

    class Trace:
        def losses(self, losses):
            return losses

    while steps < SHORT.steps:
        for batch in training.batches():
            if steps in {*found.places, *(place + 6 for place in found.places)}:
                kept = copy.deepcopy(training.net.state_dict())
                with torch.no_grad():
                    losses[steps] = [float(v) for v in training.losses(training.x).values()]
                training.net.load_state_dict(kept)
            training.step(Trace(), batch, {"a": 1.0, "b": 1.0})
            steps += 1
            if steps == SHORT.steps:
                break
    assert found.start.tolist() == [losses[place] for place in found.places]
    assert found.joint.tolist() == [losses[place + 6] for place in found.places]


def test_objects_that_a_factory_returns_again_end_as_they_began():
    training = Training({"a": 1.0, "b": 1.0}, adam)
    before = copy.deepcopy(training.net.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = fork(training.experiment, SHORT)
    assert torch.rand(1) == expected
    assert all(torch.equal(v, before[k]) for k, v in training.net.state_dict().items())
    assert np.array_equal(fork(training.experiment, SHORT).joint, first.joint)


# ---- optimizers


def test_several_optimizers():
    def make():
        training = Training({"a": 1.0, "b": 1.0}, adam)
        both = [adam(training.net.trunk.parameters()), momentum(training.net.heads.parameters())]

        def step(trace, batch, weights):
            losses = trace.losses(training.losses(batch))
            training.net.zero_grad()
            sum(weights[t] * losses[t] for t in losses).backward()
            for one in both:
                one.step()

        return Experiment(
            training.net,
            both,
            lambda tasks: training.batches(),
            step,
            {"a": 1.0, "b": 1.0},
            evaluate=lambda tasks: training.losses(training.x),
            state={"draw": training.draw},
        )

    found = fork(make, ForkOptions(steps=40, checkpoints=2, horizon=6, controls=True))
    assert found.same_twice == 0
    assert np.isfinite(found.branches["without b"]).all()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, betas=(0.7, 0.9)),
    ],
)
def test_a_second_moment_of_the_same_weights_makes_the_optimizers_own_step(optimizer):
    torch.manual_seed(0)
    start = torch.randn(20)
    ends = []
    for exchanged in (False, True):
        p = nn.Parameter(start.clone())
        one = optimizer([p])
        shadow, draw = ShadowMoments(one, 2), torch.Generator().manual_seed(1)
        other = None
        for step in range(12):
            tasks = [{p: torch.randn(20, generator=draw)} for _ in range(2)]
            p.grad = tasks[0][p] + 2 * tasks[1][p]
            if step == 6 and exchanged:
                other = _OtherSecondMoment([shadow], [1.0, 2.0])
            shadow.add(tasks)
            if other:
                other.before(0, tasks)
            one.step()
            if other:
                other.after(0)
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


def test_controls_part_the_direction_from_the_length_of_the_step():
    """Orthogonal straight lines under Adam: b takes little by its direction, and much by what it does to the steps."""
    data = "dial:angle=90,ratio=0.2,noise=4,dim=256"
    options = ForkOptions(steps=60, checkpoints=2, horizon=20, without=("b",), controls=True)
    lost = pair([fork(dial(data), options)], "a", "b")
    assert lost.lost > 0.6
    assert lost.by_direction == pytest.approx(0, abs=0.15)
    assert lost.by_direction_alone == pytest.approx(0, abs=0.15)


# ---- what has no matched history


def shorten_if_long(training):
    nn.utils.clip_grad_norm_(training.net.parameters(), 0.3)


def project(training):
    for p in training.net.trunk.parameters():
        p.grad.clamp_(min=0)


def add_penalty(training):
    for p in training.net.trunk.parameters():
        p.grad.add_(p.detach(), alpha=0.1)


def grow(training):
    training.weight = getattr(training, "weight", 0.98) * 1.02
    for p in training.net.parameters():
        p.grad.mul_(training.weight)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shorten_if_long, "times the weighted sum"),
        (grow, "times the weighted sum"),
        (project, "is not the weighted sum"),
        (add_penalty, "is not the weighted sum"),
    ],
)
@pytest.mark.parametrize("optimizer", [adam, momentum])
def test_a_gradient_that_is_no_static_sum_is_refused(spoil, words, optimizer):
    with pytest.raises(TrainingError, match=words):
        fork(factory({"a": 1.0, "b": 1.0}, optimizer, spoil=spoil), SHORT)


def test_a_constant_factor_is_none():
    """As the mean over micro-batches or tasks makes it."""

    def halve(training):
        for p in training.net.parameters():
            p.grad.div_(2)

    whole = fork(factory({"a": 1.0, "b": 1.0}, lambda p: torch.optim.SGD(p, lr=0.05)), SHORT)
    half = fork(factory({"a": 1.0, "b": 1.0}, lambda p: torch.optim.SGD(p, lr=0.1), spoil=halve), SHORT)
    np.testing.assert_allclose(half.branches["without b"], whole.branches["without b"], rtol=1e-5)


def test_clipping_that_shows_at_a_branchs_weights_alone_is_refused():
    """Constant gradients: clipping has one factor all along the training, and another without a task."""
    make = dial("dial:angle=60,noise=0", optimizer="SGD", lr=1e-3, clip_norm=0.9)
    with pytest.raises(TrainingError, match=r"at the weights a=0, b=1 .* times the weighted sum"):
        fork(make, SHORT)


def test_a_branch_that_diverges_leaves_the_others():
    def explosive(p):
        return torch.optim.SGD(p, lr=0.01)

    options = ForkOptions(steps=40, checkpoints=2, horizon=6, arms={"wild": {"a": 1e20, "b": 1.0}})
    found = fork(factory({"a": 1.0, "b": 1.0}, explosive), options)
    assert np.isnan(found.branches["wild"]).all()
    lost = pair([found], "a", "b")
    assert np.isfinite(lost.lost).all()
    assert np.isnan(lost.given_back["wild"]).all()


def test_a_training_that_diverges_is_refused():
    with pytest.raises(TrainingError, match="not finite"):
        fork(factory({"a": 1.0, "b": 1.0}, lambda p: torch.optim.SGD(p, lr=1e30), norm=False), SHORT)


def test_trainers_that_move_weights_or_cut_gradients_are_refused():
    with pytest.raises(TrainingError, match="gradients"):
        fork(dial("dial", trainer="gradnorm"), SHORT)


def test_a_step_that_is_not_taken_is_refused():
    class Accumulating(Training):
        made = 0

        def step(self, trace, batch, weights):
            losses = trace.losses(self.losses(batch))
            sum(losses.values()).backward()
            self.made += 1
            if self.made % 2 == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()

    with pytest.raises(TrainingError, match="stepped 0 times in one step"):
        fork(lambda: Accumulating({"a": 1.0, "b": 1.0}, adam).experiment(), SHORT)


def test_a_scaler_that_skips_is_refused():
    def make():
        training = Training({"a": 1.0, "b": 1.0}, adam)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

        def step(trace, batch, weights):
            losses = trace.losses(training.losses(batch))
            training.optimizer.zero_grad()
            scaler.scale(sum(losses.values())).backward()
            if training.optimizer.state and float(next(iter(training.optimizer.state.values()))["step"]) == 3:
                next(training.net.parameters()).grad.fill_(float("inf"))
            scaler.step(training.optimizer)
            scaler.update()

        training.step = step
        return training.experiment(scaler=scaler)

    with pytest.raises(TrainingError, match="stepped 0 times in one step"):
        fork(make, SHORT)


def test_losses_that_are_not_handed_over_are_asked_for():
    class Silent(Training):
        def step(self, trace, batch, weights):
            sum(self.losses(batch).values()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    with pytest.raises(UsageError, match=r"did not call trace\.losses"):
        fork(lambda: Silent({"a": 1.0, "b": 1.0}, adam).experiment(), SHORT)


def test_a_state_that_is_not_named_is_found_out():
    class Forgetful(Training):
        made = 0

        def losses(self, x):
            self.made += 1
            return {t: loss * (1 + self.made % 50) for t, loss in super().losses(x).items()}

    with pytest.raises(TrainingError, match=r"Experiment\.state"):
        fork(lambda: Forgetful({"a": 1.0, "b": 1.0}, plain).experiment(), SHORT)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 30, "checkpoints": 4, "horizon": 10}, "at least 50"),
        ({"horizon": 0}, "each is at least 1"),
        ({"without": ["nobody"]}, "no such task"),
        ({"arms": {"low": {"a": 1.0}}}, "a weight of 0 or more for every task"),
        ({"arms": {"low": {"a": 1.0, "b": -1.0}}}, "a weight of 0 or more for every task"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        fork(factory({"a": 1.0, "b": 1.0}), ForkOptions(**options))


def test_an_experiment_that_cannot_be_forked_is_refused():
    with pytest.raises(UsageError, match="one task"):
        fork(factory({"a": 1.0}), SHORT)

    def unevaluated():
        experiment = factory({"a": 1.0, "b": 1.0})()
        experiment.evaluate = None
        return experiment

    with pytest.raises(UsageError, match="no evaluate"):
        fork(unevaluated, SHORT)
