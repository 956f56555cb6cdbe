"""The tasks' gradients are held against the joint one: what adds to gradients is found, rounding is no warning."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from promises import MODES, Net, batch, same, train
from test_probes import make
from torch import nn
from zoo import ZOO, Collector

from gradprobe.probes import GradientProbe
from gradprobe.probes.guard import joint_difference, joint_weights

MARK = "the tasks' gradients do not add up to the joint one"
ROWS = [mode for mode in MODES if mode != "features"]


class AddAuxiliary(torch.autograd.Function):
    """As in models with experts: the value is that of ``x``, the gradient also that of ``auxiliary``."""

    @staticmethod
    def forward(ctx, x, auxiliary):
        ctx.save_for_backward(auxiliary)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones_like(ctx.saved_tensors[0])


class Gate(nn.Module):
    def __init__(self, size=0.1):
        super().__init__()
        self.gate, self.size = nn.Linear(8, 8), size

    def forward(self, x):
        shares = self.gate(x).softmax(1)
        if self.size:
            x = AddAuxiliary.apply(x, self.size * shares.mean(0).square().sum())
        return x * shares


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 0.5}, {"a": 0.5, "b": 0.5}, {"a": 1e-3, "b": 2.0}])
@pytest.mark.parametrize("mode", ROWS)
def test_an_operation_that_adds_gradients_is_named_and_its_rows_are_marked(mode, weights):
    bare, _, _ = train(lambda: Net(Gate()), weights=weights)
    probed, sink, said = train(lambda: Net(Gate()), mode, weights=weights)
    assert [k for k in bare if not same(bare[k], probed[k])] == []
    assert [row.status for row in sink.rows] == [MARK] * 5
    assert all(np.isfinite(row.gram).any() for row in sink.rows)
    (words,) = [words for words in said if "do not add up" in words]  # the self-check has seen it, too
    assert "middle.gate" in words
    assert "test_promise_joint.AddAuxiliary" in words


@pytest.mark.parametrize("mode", ["record", "backward", "micro"])
def test_rows_are_marked_from_the_one_that_found_it_until_a_check_passes(mode):
    def losses_of(model, step):
        model.middle.size = 0.1 if 6 <= step < 14 else 0.0
        return model(batch(step))

    _, sink, said = train(lambda: Net(Gate()), mode, steps=12, losses_of=losses_of)
    # Two forwards a step. Looked at are the 4th, where it is on, and the 8th, where it is off.
    assert [row.status == MARK for row in sink.rows] == [False] * 3 + [True] * 4 + [False] * 5
    assert len(said) == 1


@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("name", list(ZOO))
@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
def test_rounding_is_no_warning(name, kind, use):
    case, sink = make(name, torch.float32, 3), Collector()
    tasks = list(case.losses(0))
    if kind == "autocast" and name == "recurrent":
        pytest.skip("torch has no such kernel here")
    with GradientProbe(case.model, tasks, [sink], every=1) as probe:
        for step in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
                losses = case.losses(step)
            getattr(probe, use)(losses, dict(zip(tasks, (1.0, 1e-3, 30.0), strict=False)))
    assert [row.status for row in sink.rows] == ["measured"] * 4


def test_a_layer_whose_gradient_is_rounding_alone_is_no_warning():
    """A bias in front of a norm has a gradient of 0."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"trunk": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), "a": nn.Linear(8, 2)}
    )
    sink = Collector()
    layers = {"bias": [model["trunk"][0].bias], "weight": [model["trunk"][0].weight]}
    with GradientProbe(model, ("a", "b"), [sink], layers=layers, every=1) as probe:
        for _ in range(8):
            z = model["trunk"](torch.randn(8, 3, 9, 9)).mean((2, 3))
            a, b = model["a"](z).square().mean(0)
            probe.record({"a": a, "b": b})
    assert [row.status for row in sink.rows] == ["measured"] * 8


def test_a_difference_of_rounding_size_is_recorded_and_no_more_is_derived():
    class Notes(Collector):
        def __init__(self):
            super().__init__()
            self.notes = {}

        def annotate(self, values):
            self.notes |= values

    torch.manual_seed(1)
    layers = [layer for i in range(10) for layer in (nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.SiLU())]
    model = nn.ModuleDict({"trunk": nn.Sequential(*layers), "a": nn.Linear(8, 2), "b": nn.Linear(8, 3)})
    sink = Notes()
    with warnings.catch_warnings(), GradientProbe(model, ("a", "b"), [sink], every=1) as probe:
        warnings.simplefilter("error")
        for _ in range(12):
            z = model["trunk"](torch.randn(16, 3, 32, 32)).mean((2, 3))
            probe.backward({"a": model["a"](z).square().mean(), "b": model["b"](z).logsumexp(1).mean()})
        trusted = probe._recorder.gradients._trusted
    assert [row.status for row in sink.rows] == ["measured"] * 12
    if not trusted:
        assert 1e-5 < sink.notes["probe.joint_difference.value"] < 1e-3
        assert sink.notes["probe.joint_difference.step"] in range(12)
    assert trusted == ("probe.joint_difference.value" not in sink.notes)


def test_the_difference_is_that_of_the_gradients():
    """Against the gradients themselves, in float64."""
    generator = np.random.default_rng(0)
    weights, added = np.array([1.0, 0.5, 3.0]), generator.normal(size=(2, 50)) * np.array([[0.0], [0.01]])
    tasks = generator.normal(size=(3, 2, 50)) + added
    joint = np.einsum("t,tlp->lp", weights, tasks - added) + added
    every = np.concatenate([tasks, joint[None]])
    gram = np.einsum("ilp,jlp->lij", every, every)
    expected = np.linalg.norm(joint - np.einsum("t,tlp->lp", weights, tasks), axis=1) / np.sqrt(
        np.square(weights[:, None] * np.linalg.norm(tasks, axis=2)).sum(0)
    )
    found = joint_difference(gram, weights)
    np.testing.assert_allclose(found.share, expected, atol=1e-7)
    assert found.worst(["first", "second"]).startswith("second (")
    gram[0, 1, 1] = np.inf
    assert np.isnan(joint_difference(gram, weights).share[0])
    assert found.largest == pytest.approx(joint_difference(gram, weights).largest)


def test_a_task_without_a_gradient_adds_nothing():
    gram = np.full((1, 3, 3), np.nan)
    gram[0][np.ix_([0, 2], [0, 2])] = [[4.0, 8.0], [8.0, 16.0]]
    assert joint_difference(gram, np.array([2.0, 7.0])).share == pytest.approx(0.0, abs=1e-7)
    assert np.isnan(joint_difference(np.full((0, 3, 3), np.nan), np.ones(2)).largest)


def test_weights_that_sum_up_to_one_would_hide_what_is_added():
    assert abs(joint_weights(np.array([0.3, 0.7])).sum() - 1) > 0.5
    np.testing.assert_array_equal(joint_weights(np.array([2.0, 0.7])), [2.0, 0.7])
    np.testing.assert_array_equal(joint_weights(np.zeros(2)), [1.0, 1.0])


def test_the_summary_says_by_how_much_a_derived_gradient_differed(tmp_path):
    import gradprobe
    from gradprobe.summary.numbers import summarise
    from gradprobe.summary.wording import _messages

    path = tmp_path / "run.h5"
    model = Net()
    with gradprobe.attach(model, ("a", "b"), path, every=1) as probe:
        for step in range(3):
            probe.backward(model(batch(step)))
        probe._recorder.gradients._differs(1.4e-5)
    with gradprobe.open_run(path) as run:
        assert run.provenance["probe.level"] == "parameters"  # the rest of the provenance is still there
        summary = summarise(run)
        assert summary["joint_difference"] == {"step": 3.0, "value": 1.4e-5}
        assert "differed by 1.4e-05 of the norms" in " ".join(map(str, _messages(summary)))
