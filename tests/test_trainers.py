"""Every trainer on the phantom, and each balancer against what its paper says."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import training
from torch import nn

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.errors import TrainingError, UsageError
from gradprobe.trainers import registry
from gradprobe.trainers.balancer import Balancer, check_weights, find_balancer
from gradprobe.trainers.dwa import DWA
from gradprobe.trainers.joint import Joint
from gradprobe.trainers.rlw import RLW
from gradprobe.trainers.uncertainty import Uncertainty
from gradprobe.trainers.weightings import STATEFUL_METHODS

OPTIONS = {
    "single": {"task": "cls"},
    "gradnorm-static": {"from_run": "x.h5", "task_weights": (1.4, 0.6)},
    "split": {"from_run": "x.h5", "double": ("model.4.cv1.conv", "model.9.cv2.bn")},
}
TRAINERS = list(registry.TRAINERS)


@pytest.fixture(scope="module")
def joint():
    """What every arm is to have seen of the same seed: its batches in order, and the losses it begins with."""
    made = training.make("joint")
    order = [batch.names for batch in training.batches(made, 20)]
    return order, training.run(made, 1).watcher.losses[0]


@pytest.mark.parametrize("steps", [12, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("trainer", training.every_trainer())
def test_some_steps_on_the_phantom_lower_a_loss(trainer, steps, joint):
    run = training.run(training.make(trainer, every=5, **OPTIONS.get(trainer, {})), steps)
    order, first = joint
    assert len(set(order)) > 4  # epochs are shuffled
    assert run.order == order[:steps]
    assert run.watcher.losses[0] == first  # to the last bit: one model, one batch
    losses = {task: [step[task] for step in run.watcher.losses] for task in ("det", "cls")}
    falls = {task: np.mean(values[-4:]) / np.mean(values[:4]) for task, values in losses.items()}
    assert min(falls.values()) < 0.95, falls  # the first and the last epoch hold the same images
    if trainer == "single":
        assert falls["cls"] < 0.95
    assert [row.step for row in run.rows] == list(range(0, steps, 5))
    assert all(np.isfinite(row.weight).all() for row in run.rows)


@pytest.mark.parametrize(
    "trainer",
    [
        "gradnorm",  # the state of each alone: test_registries.py
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ["uncertainty", "dwa", "rlw", "pcgrad", *STATEFUL_METHODS]
        ),
    ],
)
def test_a_training_goes_on_from_its_state_as_if_it_had_not_stopped(trainer):
    options = OPTIONS.get(trainer, {})
    whole = training.make(trainer, **options)
    training.run(whole, 4)
    first = training.make(trainer, **options)
    steps = list(training.batches(first, 4))
    first.model.train()
    for batch in steps[:2]:
        training.loop.train_step(first, batch)
    state = training.loop.training_state(first)
    second = training.make(trainer, **options)
    training.loop.load_training_state(second, state)
    second.model.train()
    for batch in steps[2:]:
        training.loop.train_step(second, batch)
    assert [r.weight.tolist() for r in first.rows + second.rows] == [r.weight.tolist() for r in whole.rows]
    ends = [t.model.state_dict() for t in (whole, second)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_all_arms_of_a_seed_copy_one_reference_model():
    references = {training.provenance(t, **OPTIONS.get(t, {}))["reference"] for t in TRAINERS}
    assert len(references) == 1
    assert training.provenance("joint", seed=1)["reference"] not in references


def test_every_trainer_names_a_class_and_says_what_it_costs():
    for name, trainer in registry.TRAINERS.items():
        assert issubclass(find_balancer(name), Balancer)
        assert trainer.what
        assert trainer.cost


def test_list_trainers_says_what_each_does_what_it_costs_and_its_source(capsys):
    assert command(["record", "--list-trainers"]) == 0
    shown = capsys.readouterr().out
    assert {line.split()[0] for line in shown.splitlines() if line.strip()} >= set(TRAINERS)
    assert "arXiv:1711.02257" in shown
    assert "my_module:MyBalancer" in shown


@pytest.mark.parametrize("name", ["README.md", "docs/interventions.md"])
def test_the_docs_name_every_trainer(name):
    text = (Path(__file__).parents[1] / name).read_text(encoding="utf-8")
    assert {trainer for trainer in TRAINERS if f"`{trainer}`" not in text} == set()
    if name.startswith("docs"):
        assert all(trainer.what in text and trainer.source in text for trainer in registry.TRAINERS.values())


def test_the_table_of_all_trainers_has_a_row_for_every_one_and_is_made_by_the_committed_script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    script = importlib.import_module("interventions")
    arms = {arm.name: arm.trainer for arm in script.arms()}
    assert set(arms.values()) == set(TRAINERS)
    head, _, rows = script.DOCS.read_text(encoding="utf-8").partition(script.BEGIN)[2].partition("|---")
    assert head.strip().splitlines()[-1] == f"| {' | '.join(script.HEAD)} |"
    assert "3 seed(s)" in head
    found = [line.split("|") for line in rows.partition(script.END)[0].splitlines()[1:] if line]
    assert [cells[1].strip() for cells in found] == [*sorted(arms, key=lambda name: name in LAST)]
    assert all(float(cells[2]) > 0 for cells in found)  # what a step costs


LAST = ("gradnorm-static", "split, 5 layers")  # made from runs of the others


# ---- single and detach


def grads(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def test_single_trains_the_trunk_as_if_the_other_task_were_absent():
    """Bit for bit: the other's loss is never computed in the reference."""
    run = training.run(training.make("single", task="det", clip_norm=0.5), 3)
    alone = training.make("joint", clip_norm=0.5)
    alone.model.train()
    for batch in training.batches(alone, 3):
        loss = alone.model.losses(alone.model(batch.images), batch)["det"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(alone.model.parameters(), 0.5)
        alone.optimizer.step()
        alone.optimizer.zero_grad()
        alone.schedule.step()
    expected, found = alone.model.state_dict(), run.model.state_dict()
    assert all(torch.equal(expected[n], found[n]) for n in expected if not n.startswith("classifier"))
    assert any(not torch.equal(v, found[n]) for n, v in training.make("joint").model.state_dict().items())


def test_single_wants_to_know_which_task():
    with pytest.raises(UsageError, match=r"--task det or --task cls"):
        training.make("single")
    with pytest.raises(UsageError, match="--task det: goes with --trainer single, not with"):
        training.make("joint", task="det")


def test_detached_classification_reaches_no_layer_of_the_trunk_and_interference_is_not_applicable():
    run = training.run(training.make("detach"), 2)
    batch = next(iter(training.batches(run, 1)))
    losses = run.model.losses(run.model(batch.images), batch)
    touched = {n for n, g in grads(run.model, losses["cls"]).items() if g is not None}
    assert touched == {"classifier.weight", "classifier.bias"}
    assert run.collector.header.layers == ()
    norms, cosines = run.rows[-1].shared(run.collector.header.reach)
    assert np.isnan(norms).all()
    assert np.isnan(cosines).all()


# ---- the balancers


def losses(*values):
    return {name: torch.tensor(v, requires_grad=True) for name, v in zip("ab", values, strict=True)}


def test_uncertainty_descends_kendalls_loss_and_rests_at_half_the_inverse_loss():
    balancer = Uncertainty({"a": 1.0, "b": 1.0}, lr=0.01)
    s = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    adam = torch.optim.Adam([s], lr=0.01)
    for step in range(1500):
        values = losses(4.0, 0.25)
        if step < 50:  # against autograd
            assert balancer.weights() == pytest.approx(dict(zip("ab", (-s).exp().tolist(), strict=True)))
            adam.zero_grad()
            ((-s).exp() * torch.tensor([4.0, 0.25]) + s / 2).sum().backward()
            adam.step()
        balancer.update(values)
    assert balancer.weights() == pytest.approx({"a": 1 / 8, "b": 2.0}, rel=1e-2)


def test_uncertainty_starts_from_the_given_weights_and_refuses_zero():
    assert Uncertainty({"a": 2.0, "b": 0.5}).weights() == pytest.approx({"a": 2.0, "b": 0.5})
    with pytest.raises(UsageError, match="above 0"):
        Uncertainty({"a": 1.0, "b": 0.0})


def test_dwa_follows_the_ratio_of_the_last_two_epochs():
    balancer = DWA(("a", "b"), steps_per_epoch=2, temperature=2.0)
    for a, b in ((4.0, 1.0), (2.0, 1.0), (1.0, 0.9), (2.0, 0.9)):
        assert balancer.weights() == {"a": 1.0, "b": 1.0}
        balancer.update(losses(a, b))
    rates = [math.exp(1.5 / 3 / 2), math.exp(0.9 / 1.0 / 2)]
    assert balancer.weights() == pytest.approx({n: 2 * r / sum(rates) for n, r in zip("ab", rates, strict=True)})
    assert balancer.weights()["b"] > balancer.weights()["a"]  # b fell less


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_dwa_goes_on_from_its_state_in_any_epoch(stop):
    series = [losses(1 / (1 + step), 1 / (1 + step) ** 0.5) for step in range(12)]
    whole, first, second = (DWA(("a", "b"), steps_per_epoch=3) for _ in range(3))
    expected = [(whole.step(values), whole.weights())[1] for values in series]
    for values in series[:stop]:
        first.update(values)
    second.load_state_dict(first.state_dict())
    assert [(second.step(values), second.weights())[1] for values in series[stop:]] == expected[stop:]


def test_random_weights_draw_from_a_stream_of_their_own():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    balancer, again = RLW(("a", "b"), seed=5), RLW(("a", "b"), seed=5)
    drawn = []
    for _ in range(2000):
        drawn.append(list(balancer.weights().values()))
        assert balancer.weights() == again.weights()
        for one in (balancer, again):
            one.update({})
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(np.sum(drawn, 1), 2)
    assert np.mean(drawn, 0) == pytest.approx([1, 1], abs=0.05)
    assert np.std(drawn, 0).min() > 0.3
    assert RLW(("a", "b"), seed=6).weights() != RLW(("a", "b"), seed=5).weights()


@pytest.mark.parametrize("bad", [{"a": -1.0, "b": 1.0}, {"a": math.nan, "b": 1.0}, {"a": 0.0, "b": 0.0}])
def test_weights_that_mean_nothing_are_refused(bad):
    with pytest.raises(UsageError, match="finite, not negative, and not all 0"):
        Joint(bad)
    with pytest.raises(TrainingError, match="step 3"):
        check_weights(bad, ("a", "b"), step=3)


# ---- a trainer of one's own

MINE = """
from gradprobe.trainers.balancer import Balancer

class Half(Balancer):
    def weights(self):
        return {"det": 1.0, "cls": 0.5}
    def update(self, losses):
        pass

class Bad(Half):
    def weights(self):
        return {"det": -1.0, "cls": 0.5}

class Unfinished(Balancer):
    def weights(self):
        return {}

class Wants(Half):
    def __init__(self, argument):
        pass
"""
SMALL = ["--imgsz", "64", "--epochs", "1", "--bn-batches", "1"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_module.py").write_text(MINE)
    yield tmp_path
    sys.modules.pop("my_module", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    assert command(["data", "make", str(folder), "--n", "24", "--seed", "3"]) == 0
    return str(folder / "data.yaml")


def test_a_trainer_of_ones_own_is_recorded(own, data):
    assert command(["record", "--trainer", "my_module:Half", "--data", data, *SMALL, "--out", "run.h5"]) == 0
    with open_run("run.h5") as run:
        assert run.provenance["trainer"] == "my_module:Half"
        np.testing.assert_array_equal(run["weight"], [[1.0, 0.5]] * len(run))


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("my_modul:Half", 2, "there is no module 'my_modul'"),
        ("my_module:Halv", 2, "has no 'Halv' (near: Half)"),
        ("my_module:Unfinished", 2, "Unfinished lacks the methods update"),
        ("my_module:Wants", 2, "override the classmethod create(model, setup)"),
        ("my_module:Bad", 1, "gave task 'det' the weight -1.0 at step 0"),
        ("json:JSONDecoder", 2, "is not a subclass of gradprobe.trainers.balancer.Balancer"),
    ],
)
def test_what_is_wrong_with_it_is_said(own, data, name, code, message, capsys):
    assert command(["record", "--trainer", name, "--data", data, *SMALL, "--out", "run.h5"]) == code
    assert message in capsys.readouterr().err
