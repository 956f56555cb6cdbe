from __future__ import annotations

import copy
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from zoo import ZOO, Collector, mlp, naive_gramian

import gradprobe
from gradprobe.errors import ProbeError
from gradprobe.probes import GradientProbe, passes
from gradprobe.probes.gramian import GramianSum, products
from gradprobe.probes.shared_layers import Layer
from gradprobe.rows import MEASURED, NONFINITE_GRADIENT, NONFINITE_LOSS

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
WEIGHTS = {"t0": 1.0, "t1": 0.3, "t2": 2.0, "t3": 0.7, "t4": 1.5}


def make(name, dtype=torch.float64, tasks=2, seed=0):
    torch.manual_seed(seed)
    return ZOO[name](dtype, tasks)


def train(case, steps, use, *, optimizer=torch.optim.Adam, **options):
    """``steps`` steps with a probe used by ``use(probe, losses, weights)``, or without one."""
    tasks = list(case.losses(0))
    torch.manual_seed(7)
    opt = optimizer(case.model.parameters(), lr=1e-2)
    sink = Collector()
    probe = GradientProbe(case.model, tasks, [sink], optimizer=opt, **options) if use else None
    for step in range(steps):
        losses = case.losses(step)
        weights = {t: WEIGHTS[t] for t in losses}
        if use is None or use == "record":
            if probe is not None:
                probe.record(losses, weights)
            sum(weights[t] * losses[t] for t in losses).backward()
        else:
            probe.backward(losses, weights)
        opt.step()
        opt.zero_grad()
    state = copy.deepcopy((case.model.state_dict(), opt.state_dict()["state"], torch.get_rng_state()))
    if probe is not None:
        probe.close()
    return state, sink


def assert_close(gram, expected, tolerance):
    scale = np.sqrt(np.einsum("lii->li", expected)[:, :, None] * np.einsum("lii->li", expected)[:, None, :])
    assert (np.isnan(gram) == np.isnan(expected)).all()
    known = ~np.isnan(expected)
    assert (np.abs(gram - expected)[known] <= tolerance * scale[known]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [n for n in ZOO if n != "checkpointed"])  # a twin would move its statistics
def test_the_gramian_is_that_of_the_naive_twin(name, dtype):
    case = make(name, dtype)
    sink = Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1) as probe:
        for step in range(4):
            losses = case.losses(step)
            probe.record(losses)
            assert_close(sink.rows[-1].gram, naive_gramian(probe.shared.layers, losses), TOLERANCE[dtype])
            losses = case.losses(step)  # anew: a backward frees the graph, and a mask of dropout is not drawn twice
            expected = naive_gramian(probe.shared.layers, losses)
            probe.backward(losses, {"t0": 1.0, "t1": 0.3})  # one task derived from the joint gradient
            assert_close(sink.rows[-1].gram, expected, TOLERANCE[dtype])
    assert all(row.status == MEASURED for row in sink.rows)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_many_tasks(tasks):
    case = make("mlp", tasks=tasks)
    names = [f"t{i}" for i in range(tasks)]
    sink = Collector()
    with GradientProbe(case.model, names, [sink], every=1) as probe:
        for step in range(3):
            losses = case.losses(step)
            expected = None if probe.shared is None else naive_gramian(probe.shared.layers, losses)
            probe.backward(losses, {t: WEIGHTS[t] for t in names})
            if expected is not None:
                assert_close(sink.rows[-1].gram, expected, 1e-10)
    assert len(sink.rows) == 3


@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("name", list(ZOO))
def test_a_training_with_a_probe_ends_as_one_without(name, use):
    bare, _ = train(make(name, torch.float32), 6, None)
    probed, sink = train(make(name, torch.float32), 6, use, every=2)
    assert [row.step for row in sink.rows] == [0, 2, 4]
    for (key, expected), found in zip(bare[0].items(), probed[0].values(), strict=True):
        assert torch.equal(expected, found), key
    for index, moments in bare[1].items():
        for key, expected in moments.items():
            assert torch.equal(torch.as_tensor(expected), torch.as_tensor(probed[1][index][key])), (index, key)
    assert torch.equal(bare[2], probed[2])


def test_grad_is_that_of_the_weighted_sum_also_on_top_of_what_is_there():
    case = make("convolutional", torch.float32)
    weights = {"t0": 1.0, "t1": 0.3}
    with GradientProbe(case.model, ("t0", "t1"), every=1, accumulate=1) as probe:
        for _ in range(3):
            losses = case.losses(0)
            sum(weights[t] * losses[t] for t in losses).backward()
        expected = [p.grad.clone() for p in case.model.parameters()]
        case.model.zero_grad()
        for _ in range(3):
            probe.backward(case.losses(0), weights)
    assert all(torch.equal(p.grad, e) for p, e in zip(case.model.parameters(), expected, strict=True))


@pytest.mark.parametrize("ratio", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_what_is_derived_is_as_good_as_explicit_whatever_the_weights(ratio):
    case = make("convolutional", torch.float32)
    sink = Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1) as probe:
        for step in range(4):
            losses = case.losses(step)
            if probe.shared is not None:
                expected = naive_gramian(probe.shared.layers, losses)
            probe.backward(losses, {"t0": 1.0, "t1": ratio})
            if step:
                assert_close(sink.rows[-1].gram, expected, 1e-5)


def test_products_that_overflow_are_infinite_and_no_failure():
    layer = Layer("w", (torch.nn.Parameter(torch.zeros(2)),))
    total = GramianSum([layer], 2)
    total.add(0, [torch.full((2,), 1e200, dtype=torch.float64), torch.full((2,), -1e200, dtype=torch.float64)])
    assert np.isinf(total.result()).all()


def test_the_derived_task_is_the_one_that_cancels_least():
    gram = np.array([np.diag([1.0, 1e-4]), np.diag([1.0, 4.0])])
    assert passes.task_to_derive(gram, np.array([1.0, 1.0]), 10) == 0
    assert passes.task_to_derive(gram, np.array([1e-3, 1.0]), 10) == 1
    assert passes.task_to_derive(gram, np.array([0.0, 1.0]), 10) == 1  # weight 0 leaves no trace
    absent = gram.copy()
    absent[:, 0, :] = absent[:, :, 0] = np.nan  # nor does it where the task reached nothing at the last row
    assert passes.task_to_derive(absent, np.array([0.0, 1.0]), 10) == 1
    opposed = np.array([np.diag([1.0, 1e-12]), np.diag([1e-12, 1.0])])  # each drowns somewhere
    assert passes.task_to_derive(opposed, np.array([1.0, 1.0]), 10) is None


def test_one_explicit_pass_is_saved(monkeypatch):
    case, passes_made = make("mlp"), []
    real = passes.pass_to
    monkeypatch.setattr(passes, "pass_to", lambda *a: passes_made.append(1) or real(*a))
    with GradientProbe(case.model, ("t0", "t1"), every=1) as probe:
        counts = []
        for step in range(4):
            probe.backward(case.losses(step))
            counts.append(len(passes_made))
    # The 1st, 2nd, 4th, ... that is derived and the 2nd, 4th, ... row are compared with passes, which are held against
    # the joint gradient, as the first row is.
    assert counts == [3, 7, 11, 15]


def test_a_remainder_that_lost_its_digits_is_measured_again():
    """The weights change so much between two rows that the task chosen to be derived drowns."""
    case = make("mlp", torch.float32)
    sink = Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1) as probe:
        probe.backward(case.losses(0), {"t0": 1.0, "t1": 1.0})
        losses = case.losses(1)
        meter = probe._recorder.gradients
        meter.last_gram = meter.last_gram * np.diag([1.0, 1e20])  # makes it derive t1
        expected = naive_gramian(probe.shared.layers, losses)
        probe.backward(losses, {"t0": 1e6, "t1": 1e-2})
    assert_close(sink.rows[-1].gram, expected, 1e-6)


class Split(nn.Module):
    """Three tasks; the third uses the first layer only, and a private one is reached by nobody else."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.a, self.b, self.c = nn.Linear(6, 1), nn.Linear(6, 1), nn.Linear(6, 1)

    def losses(self, x):
        one = self.first(x).tanh()
        two = self.second(one).tanh()
        return {"a": self.a(two).mean(), "b": self.b(two).pow(2).mean(), "c": self.c(one).mean()}


def split_probe(**options):
    torch.manual_seed(0)
    model, sink = Split().double(), Collector()
    return model, sink, GradientProbe(model, ("a", "b", "c"), [sink], every=1, **options)


def test_layers_shared_by_some_tasks_only_are_missing_elsewhere():
    model, sink, probe = split_probe()
    x = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(3):
        probe.backward(model.losses(x))
    assert sink.header.layers == ("first", "second")
    assert sink.header.reach.tolist() == [[True] * 3, [True, True, False]]
    for row in sink.rows:
        assert np.isnan(row.gram[1, 2]).all()
        assert np.isnan(row.gram[1, :, 2]).all()
        assert np.isfinite(row.gram[0]).all()
        assert row.status == MEASURED


def test_a_task_that_does_not_reach_the_trunk_this_step_is_missing_in_that_row():
    model, sink, probe = split_probe()
    x = torch.randn(5, 4, dtype=torch.float64)
    probe.backward(model.losses(x))
    losses = model.losses(x)
    losses["c"] = model.c.weight.sum() * 1.0  # touches its head alone
    for step in range(2):
        probe.backward(losses if step == 0 else model.losses(x))
    assert np.isnan(sink.rows[1].gram[:, 2, 2]).all()
    assert np.isfinite(sink.rows[1].gram[:, 0, 1]).all()
    assert [row.status for row in sink.rows] == [MEASURED] * 3
    norms, cosines = sink.rows[1].shared(sink.header.reach)
    assert np.isnan(norms[2])
    assert np.isfinite(norms[:2]).all()
    assert np.isfinite(cosines[0])
    assert np.isnan(cosines[1:]).all()
    assert np.isfinite(sink.rows[2].gram[0]).all()


def test_frozen_parameters_are_left_out():
    case = make("mlp")
    case.model.trunk[0].weight.requires_grad_(False)
    sink = Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1) as probe:
        probe.record(case.losses(0))
        assert [p.shape for p in probe.shared.layers[0].parameters] == [(16,)]
    assert sink.header.layer_size.tolist() == [16, 16 * 16 + 16]


def test_an_exactly_zero_gradient_is_zero_and_has_no_angle():
    case = make("mlp")
    sink = Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1) as probe:
        for _ in range(3):
            losses = case.losses(0)
            losses["t1"] = losses["t1"] * 0.0
            probe.backward(losses)
    for row in sink.rows:
        assert (row.gram[:, 1, 1] == 0).all()
        norms, cosines = row.shared(sink.header.reach)
        assert norms[1] == 0
        assert np.isnan(cosines).all()
        assert row.status == MEASURED


@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_task_that_is_not_finite_is_missing_flagged_and_alone(use, value):
    case = make("mlp", torch.float32)
    sink = Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1) as probe:
        probe.backward(case.losses(0))
        for _ in range(2):
            losses = case.losses(1)
            losses["t0"] = losses["t0"] * value
            getattr(probe, use)(losses)
    for row in sink.rows[1:]:
        assert row.status == NONFINITE_LOSS
        assert np.isnan(row.gram[:, 0]).all()
        assert np.isfinite(row.gram[:, 1, 1]).all()  # the healthy task is measured all the same


def test_a_gradient_that_is_not_finite_where_the_loss_is():
    parameter = nn.Linear(2, 2)
    sink = Collector()
    with GradientProbe(parameter, ("a", "b"), [sink], every=1) as probe:
        out = parameter(torch.zeros(1, 2))
        probe.record({"a": (out - out.detach()).pow(2).sum().sqrt(), "b": out.sum()})
    assert sink.rows[0].status == NONFINITE_GRADIENT
    assert np.isnan(sink.rows[0].gram[0, 0, 0])


def test_layers_come_in_the_order_in_which_the_forward_runs_them():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.first(x).tanh())

    model, sink = Backwards(), Collector()
    with GradientProbe(model, ("a", "b"), [sink], every=1) as probe:
        out = model(torch.randn(2, 3))
        probe.record({"a": out.mean(), "b": out.pow(2).mean()})
    assert sink.header.layers == ("first", "last")


@pytest.mark.parametrize(
    ("shared", "layers"),
    [
        ("trunk.0", ("trunk.0",)),
        (["trunk.2"], ("trunk.2",)),
        (lambda name, p: p.ndim > 1 and name.startswith("trunk"), ("trunk.0", "trunk.2")),
    ],
)
def test_what_is_shared_can_be_said(shared, layers):
    case, sink = make("mlp"), Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1, shared=shared) as probe:
        probe.record(case.losses(0))
    assert sink.header.layers == layers


def test_layers_can_be_grouped():
    case, sink = make("mlp"), Collector()
    groups = {"whole trunk": list(case.model.trunk.parameters())}
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1, layers=groups) as probe:
        probe.record(case.losses(0))
        assert_close(sink.rows[0].gram, naive_gramian(probe.shared.layers, case.losses(0)), 1e-10)
    assert sink.header.layers == ("whole trunk",)


def test_tasks_that_share_nothing_give_a_run_without_layers():
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    sink = Collector()
    with GradientProbe(model, ("a", "b"), [sink], every=1) as probe:
        x = torch.randn(3, 2)
        with pytest.warns(RuntimeWarning, match="step 0: no two tasks reach a parameter in common"):
            probe.backward({"a": model["a"](x).mean(), "b": model["b"](x).mean()})
        probe.backward({"a": model["a"](x).mean(), "b": model["b"](x).mean()})
    assert sink.header.layers == ()
    assert sink.rows[0].gram.shape == (0, 2, 2)


def test_steps_are_the_optimizers_also_under_accumulation():
    case, sink = make("mlp"), Collector()
    opt = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=2, optimizer=opt) as probe:
        for call in range(12):
            probe.backward(case.losses(call))
            if call % 3 == 2:
                opt.step()
                opt.zero_grad()
        assert probe.step == 4
    assert [row.step for row in sink.rows] == [0, 2]
    assert sink.rows[0].lr == 0.1


def test_steps_without_an_optimizer_are_counted_in_calls():
    case, sink = make("mlp"), Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=2, accumulate=3) as probe:
        for call in range(12):
            probe.backward(case.losses(call))
    assert [row.step for row in sink.rows] == [0, 2]


def bad_calls():
    case = mlp(torch.float64)
    good = case.losses(0)
    yield "no task", {}, None, "no loss was given"
    yield "has a new task", {**good, "t9": good["t0"]}, None, r"unknown \['t9'\]"
    yield "detached", {task: loss.detach() for task, loss in good.items()}, None, "'t0' has no graph"
    yield "a vector", {**good, "t1": good["t1"].expand(4)}, None, r"'t1' has shape \(4,\)"
    yield "no tensor", {**good, "t1": "3.0"}, None, "'t1' is a str"
    yield "NaN weight", good, {"t0": 1.0, "t1": float("nan")}, "weight of task 't1' is nan"
    yield "missing weight", good, {"t0": 1.0}, r"weights lack \['t1'\]"


@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize(
    ("losses", "weights", "message"), [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()]
)
def test_a_wrong_call_says_which_task_and_what_to_do(use, losses, weights, message):
    with (
        GradientProbe(mlp(torch.float64).model, ("t0", "t1"), every=1) as probe,
        pytest.raises(ProbeError, match=message),
    ):
        getattr(probe, use)(losses, weights)


def test_wrong_arguments_are_found_at_once():
    model = mlp(torch.float64).model
    with pytest.raises(ProbeError, match="two or more different names"):
        GradientProbe(model, ("t0",))
    with pytest.raises(ProbeError, match="every=0"):
        GradientProbe(model, ("t0", "t1"), every=0)
    with pytest.raises(ProbeError, match="no parameter there"):
        GradientProbe(model, ("t0", "t1"), shared="nowhere")
    GradientProbe(model, ("t0", "t1")).close()  # the failed ones left nothing attached


def test_attaching_twice_raises_and_detaching_allows_it_again():
    model = mlp(torch.float64).model
    probe = GradientProbe(model, ("t0", "t1"))
    with pytest.raises(ProbeError, match="has a probe already"):
        GradientProbe(model, ("t0", "t1"))
    probe.close()
    GradientProbe(model, ("t0", "t1")).close()


def test_a_failure_in_measuring_is_a_row_with_a_reason_and_no_exception(monkeypatch):
    case, sink = make("mlp"), Collector()
    opt = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1, optimizer=opt) as probe:
        probe.backward(case.losses(0))
        opt.step()
        monkeypatch.setattr(passes, "pass_to", lambda *_: 1 / 0)
        case.model.zero_grad()
        with pytest.warns(RuntimeWarning, match="measuring failed: ZeroDivisionError"):
            probe.backward(case.losses(1))
        assert all(p.grad is not None for p in case.model.parameters())
        opt.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            probe.backward(case.losses(2))
    assert [row.status.split(":")[0] for row in sink.rows] == [MEASURED, "measuring failed", "measuring failed"]
    assert np.isnan(sink.rows[1].gram).all()
    assert np.isfinite(sink.rows[1].loss).all()


def test_a_failure_within_the_joint_backward_is_a_row_too(monkeypatch):
    case, sink = make("mlp"), Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1) as probe:
        probe.backward(case.losses(0))
        case.model.zero_grad()
        monkeypatch.setattr(passes.GramianSum, "add", lambda *_: 1 / 0)
        with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
            probe.backward(case.losses(1))
        expected = case.losses(1)
        found = [p.grad.clone() for p in case.model.parameters()]
        case.model.zero_grad()
        (expected["t0"] * 1.0 + expected["t1"] * 1.0).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, case.model.parameters(), strict=True))


def test_a_sink_that_fails_ends_no_training():
    class Broken(Collector):
        def write(self, row):
            raise OSError("gone")

    case, good = make("mlp"), Collector()
    probe = GradientProbe(case.model, ("t0", "t1"), [Broken(), good], every=1)
    with probe, pytest.warns(RuntimeWarning, match="Broken failed: OSError: gone"):
        probe.backward(case.losses(0))
    assert len(good.rows) == 1


def test_a_sink_that_cannot_start_is_left_out_and_the_file_is_started_once(tmp_path):
    class Broken(Collector):
        def start(self, header):
            raise ValueError("no")

    case, path = make("mlp"), tmp_path / "run.h5"
    with gradprobe.attach(case.model, ("t0", "t1"), path, every=1, sinks=[Broken()]) as probe:
        with pytest.warns(RuntimeWarning, match="Broken could not start and is left out: ValueError: no"):
            probe.backward(case.losses(0))
        for step in range(1, 5):
            probe.backward(case.losses(step))
    with gradprobe.open_run(path) as run:
        assert run["step"].tolist() == list(range(5))


def test_a_closed_probe_says_so():
    case = make("mlp")
    probe = GradientProbe(case.model, ("t0", "t1"))
    probe.close()
    for use in (probe.backward, probe.record):
        with pytest.raises(ProbeError, match="was closed"):
            use(case.losses(0))


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    case = make("mlp")
    opt = torch.optim.SGD(case.model.parameters(), lr=0.1)
    try:
        with GradientProbe(case.model, ("t0", "t1"), every=1, optimizer=opt) as probe:
            for step in range(3):
                probe.backward(case.losses(step))
                if fails and step == 2:
                    raise RuntimeError("the user's own")
    except RuntimeError:
        assert fails
    reference = weakref.ref(probe)
    del probe
    gc.collect()
    assert reference() is None
    assert not opt._optimizer_step_post_hooks
    assert all(not p._backward_hooks for p in case.model.parameters())


def test_how_a_run_ended_is_told(tmp_path):
    for error, end in (
        (None, "finished"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("x"), "failed: ValueError"),
    ):
        sink = Collector()
        try:
            with GradientProbe(mlp(torch.float64).model, ("t0", "t1"), [sink]):
                if error is not None:
                    raise error
        except (KeyboardInterrupt, ValueError):
            pass
        assert sink.end == end


def test_attach_records_into_a_file(tmp_path):
    case, path = make("mlp"), tmp_path / "run.h5"
    opt = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with gradprobe.attach(case.model, ("t0", "t1"), path, every=2, optimizer=opt) as probe:
        for step in range(6):
            probe.backward(case.losses(step), {"t0": 1.0, "t1": 0.01}, batch_size=8)
            opt.step()
            opt.zero_grad()
        probe.log_metrics(0, accuracy=0.5)
    with gradprobe.open_run(path) as run:
        assert run["step"].tolist() == [0, 2, 4]
        assert run.layers == ("trunk.0", "trunk.2")
        np.testing.assert_allclose(run["weight"], [[1, 0.01]] * 3, rtol=1e-6)
        assert run["batch_size"].tolist() == [8, 8, 8]
        assert run.epochs["accuracy"].tolist() == [0.5]
        assert np.isfinite(run.cosine()).all()
    with pytest.raises(gradprobe.GradprobeError, match="this run exists"):
        gradprobe.attach(case.model, ("t0", "t1"), path)


def test_a_state_dict_goes_on_where_it_stopped():
    case, sink = make("mlp"), Collector()
    probe = GradientProbe(case.model, ("t0", "t1"), [sink], every=3)
    for step in range(4):
        probe.backward(case.losses(step))
    state = probe.state_dict()
    probe.close()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=3) as second:
        second.load_state_dict(state)
        for step in range(4, 8):
            second.backward(case.losses(step))
    assert [row.step for row in sink.rows] == [0, 3, 6]
    assert sink.rows[2].time > sink.rows[1].time


@pytest.mark.parametrize(
    ("size", "bound"), [(1, 1e-14), (100, 1e-14), (1 << 16, 3e-8), ((1 << 16) + 1, 3e-8), (3_000_000, 3e-8)]
)
def test_long_products_keep_their_digits(size, bound):
    a, b = torch.randn(2, size, generator=torch.Generator().manual_seed(size)) + 1
    exact = (a.double() * b.double()).sum()
    assert abs(products([a, b])[0, 1] - exact) <= bound * a.double().norm() * b.double().norm()


def test_half_precision_is_multiplied_in_float32():
    a = torch.full((4000,), 1.0, dtype=torch.bfloat16)
    assert products([a, a])[0, 1] == 4000
