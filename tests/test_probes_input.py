"""What a loop can do wrong, or change under the probe: handled, or an error that names it and says what to do."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from test_probes import TOLERANCE, assert_close, make
from torch import nn
from zoo import Collector, naive_gramian

import gradprobe
from gradprobe.errors import GradprobeError, ProbeError
from gradprobe.probes import GradientProbe
from gradprobe.rows import MEASURED, NONFINITE_LOSS

T = ("t0", "t1")


def attached(case, **options):
    sink = Collector()
    return sink, GradientProbe(case.model, T, [sink], **({"every": 1} | options))


def replaced_by_assignment(model):
    model.load_state_dict({k: v.clone() * 1.5 for k, v in model.state_dict().items()}, assign=True)


def moved_to_another_type(model):
    model.float()


def moved_with_new_parameters(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("when", ["before the first row", "in mid-run"])
@pytest.mark.parametrize("change", [replaced_by_assignment, moved_to_another_type, moved_with_new_parameters])
def test_a_model_that_is_moved_or_loaded_is_measured_as_it_is_then(change, when, use):
    case = make("mlp")
    sink, probe = attached(case)
    with probe:
        if when == "in mid-run":
            for step in range(3):
                probe.backward(case.losses(step))
        old = {id(p) for p in case.model.parameters()}
        change(case.model)
        new = [p for p in case.model.parameters() if id(p) not in old]
        dtype = next(case.model.parameters()).dtype
        x = torch.randn(8, 6, dtype=dtype)
        for step in range(2):
            losses = {t: out.pow(2).mean() for t, out in zip(T, case.model(x), strict=True)}
            if step == 0 and new and when == "in mid-run":
                with pytest.warns(RuntimeWarning, match=r"shared parameters were replaced, 'trunk\.0\.weight' first"):
                    getattr(probe, use)(losses)
            else:
                getattr(probe, use)(losses)
            losses = {t: out.pow(2).mean() for t, out in zip(T, case.model(x), strict=True)}
            assert_close(sink.rows[-1].gram, naive_gramian(probe.shared.layers, losses), TOLERANCE[dtype])
            assert {id(p) for p in probe.shared.parameters} <= {id(p) for p in case.model.parameters()}
    assert all(row.status == MEASURED for row in sink.rows)


def test_what_was_chosen_by_parameter_is_followed_too():
    case = make("mlp")
    sink, probe = attached(case, shared=[case.model.trunk[0].weight], layers={"first": [case.model.trunk[0].weight]})
    replaced_by_assignment(case.model)
    with probe:
        probe.record(case.losses(0))
        assert probe.shared.parameters[0] is case.model.trunk[0].weight
    assert sink.header.layers == ("first",)


@pytest.mark.parametrize("use", ["record", "backward"])
def test_a_shared_parameter_that_is_gone_is_named(use):
    case = make("mlp")
    _, probe = attached(case)
    with probe:
        probe.backward(case.losses(0))
        case.model.trunk[2] = nn.Identity()
        with pytest.raises(
            ProbeError, match=r"'trunk\.2\.weight' is no longer in the model.*close it.*attach a new one"
        ):
            getattr(probe, use)(case.losses(1))


def test_a_shared_parameter_of_another_shape_is_named():
    case = make("mlp")
    _, probe = attached(case)
    with probe:
        probe.backward(case.losses(0))
        case.model.trunk[0] = nn.Linear(6, 16, dtype=torch.float64)
        case.model.trunk[2] = nn.Linear(16, 20, dtype=torch.float64)
        case.model.heads = nn.ModuleList(nn.Linear(20, 1, dtype=torch.float64) for _ in T)
        with pytest.raises(ProbeError, match=r"'trunk\.2\.weight' had shape \(16, 16\) and has \(20, 16\) now"):
            probe.backward(case.losses(1))


def test_a_step_counter_that_goes_back_cuts_the_rows_of_what_is_done_again(tmp_path):
    case = make("mlp")
    path, sink = tmp_path / "run.h5", Collector()
    with gradprobe.attach(case.model, T, path, every=2, level="both", sinks=[sink]) as probe:
        for step in range(3):
            probe.backward(case.losses(step))
        early = probe.state_dict()
        for step in range(3, 8):
            probe.backward(case.losses(step))
        probe.load_state_dict(early)
        assert probe.step == 3
        with gradprobe.open_run(path) as run:
            assert run["step"].tolist() == [0, 2]
            assert run["features/step"].tolist() == [0, 1, 2]
        for step in range(3, 7):
            probe.backward(case.losses(step))
    with gradprobe.open_run(path) as run:
        assert run["step"].tolist() == [0, 2, 4, 6]
        assert run["features/step"].tolist() == list(range(7))
    assert [row.step for row in sink.rows] == [0, 2, 4, 6, 4, 6]  # a sink that forgets nothing sees them again


def test_a_state_saved_between_a_measurement_and_its_step_keeps_the_row(tmp_path):
    """By the optimizer's clock the step is still the same then; it is not measured twice, nor lost."""
    case = make("mlp")
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with gradprobe.attach(case.model, T, tmp_path / "run.h5", every=1, optimizer=optimizer) as probe:
        probe.backward(case.losses(0))
        optimizer.step()
        probe.backward(case.losses(1))
        state = probe.state_dict()
        optimizer.step()
        probe.backward(case.losses(2))
    with gradprobe.attach(case.model, T, tmp_path / "run.h5", every=1, optimizer=optimizer, resume=True) as probe:
        probe.load_state_dict(state)
        optimizer.step()
        probe.backward(case.losses(2))
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run["step"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("broken", ["write", "write_epoch", "flush", "close"])
def test_a_logger_that_fails_ends_neither_the_training_nor_the_other_sinks(broken):
    case, good = make("mlp"), Collector()
    bad = Collector()
    setattr(bad, broken, lambda *_: 1 / 0)
    probe = GradientProbe(case.model, T, [bad, good], every=1)

    def train():
        with probe:
            probe.backward(case.losses(0))
            probe.log_metrics(0, accuracy=0.5)
            assert probe.flush() == (broken != "flush")

    with pytest.warns(RuntimeWarning, match="Collector failed: ZeroDivisionError"):
        train()
    assert len(good.rows) == 1
    assert good.epochs == {0: {"accuracy": 0.5}}
    assert good.end == "finished"


def test_a_copy_of_the_last_state_may_be_loaded_again():
    """Nothing was recorded since: a loop that retries a step."""
    case = make("mlp")
    sink, probe = attached(case, every=5)
    with probe:
        for step in range(3):
            probe.backward(case.losses(step))
        state = copy.deepcopy(probe.state_dict())
        probe.backward(case.losses(3))
        probe.load_state_dict(state)
        for step in range(3, 7):
            probe.backward(case.losses(step))
    assert [row.step for row in sink.rows] == [0, 5]


def test_a_step_that_is_noted_counts_and_is_no_second_row():
    case = make("mlp")
    sink, probe = attached(case, accumulate=2)
    with probe:
        probe.backward(case.losses(0))
        probe.note(case.losses(1), None, NONFINITE_LOSS)  # of the same step, which has its row
        probe.note(case.losses(2), None, NONFINITE_LOSS)
        probe.backward(case.losses(3))
        assert probe.step == 2
    assert [(row.step, row.status) for row in sink.rows] == [(0, MEASURED), (1, NONFINITE_LOSS)]


def test_what_was_chosen_not_to_be_measured_is_no_layer_left_out():
    case = make("mlp")
    with GradientProbe(case.model, ("t0", "t1"), shared="trunk.2", every=1) as probe:
        for step in range(2):
            probe.record(case.losses(step))


@pytest.mark.parametrize("use", ["record", "backward"])
def test_losses_made_without_a_graph_are_refused_where_none_is_asked_for_too(use):
    case = make("mlp")
    with GradientProbe(case.model, ("t0", "t1"), every=1) as probe, torch.no_grad():
        losses = case.losses(0)
        with pytest.raises(ProbeError, match="'t0' has no graph"):
            getattr(probe, use)(losses)


def test_a_task_may_reach_further_than_at_first():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def losses(self, x, deep):
            one = self.one(x).tanh()
            two = self.two(one)
            return {"t0": two.mean(), "t1": two.pow(2).mean(), "t2": (two if deep else one).sum()}

    model, sink, x = Late(), Collector(), torch.randn(2, 3)
    with GradientProbe(model, ("t0", "t1", "t2"), [sink], every=1) as probe:
        probe.record(model.losses(x, False))
        probe.record(model.losses(x, True))
    assert np.isnan(sink.rows[0].gram[1, 2, 2])
    assert np.isfinite(sink.rows[1].gram).all()
    assert [row.reach.tolist() for row in sink.rows] == [[[True] * 3, [True, True, False]], [[True] * 3] * 2]
    assert sink.header.reach.all()


@pytest.mark.parametrize("use", ["record", "backward"])
def test_a_new_task_in_mid_run_is_named(use):
    case = make("mlp", tasks=3)
    _, probe = attached(case)
    losses = case.losses(0)
    with probe:
        probe.backward({t: losses[t] for t in T})
        with pytest.raises(ProbeError, match=r"attached for tasks \['t0', 't1'\]; losses have the unknown \['t2'\]"):
            getattr(probe, use)(case.losses(1))
        with pytest.raises(ProbeError, match=r"weights have the unknown \['t7'\]"):
            getattr(probe, use)({t: case.losses(2)[t] for t in T}, {"t0": 1.0, "t1": 1.0, "t7": 1.0})


def test_a_complex_loss_is_named():
    case = make("mlp")
    _, probe = attached(case)
    losses = case.losses(0)
    with probe, pytest.raises(ProbeError, match="'t1' is complex"):
        probe.backward({**losses, "t1": losses["t1"] * 1j})


def test_weights_that_are_learned_get_their_gradient_and_are_stored():
    """Uncertainty weighting: the weight itself is a parameter."""
    case = make("mlp")
    learned = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    sink, probe = attached(case)
    with probe:
        for step in range(3):
            probe.backward(case.losses(step), {"t0": learned, "t1": torch.tensor(2.0)})
    assert learned.grad == pytest.approx(sum(float(case.losses(s)["t0"].detach()) for s in range(3)))
    assert [row.weight.tolist() for row in sink.rows] == [[0.5, 2.0]] * 3


def short(argument):
    """An id that is the same in every process: without addresses."""
    return re.sub(" at 0x[0-9a-f]+", "", str(argument))[:40]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2, "budget": 0.1}, "exclude each other"),
        ({"every": None, "budget": 0.0}, "budget=0.0"),
        ({"every": None, "budget": 5}, "budget=5"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"level": "layers"}, "level='layers': there are 'parameters', 'features', 'both'"),
        ({"memory": "none"}, "memory='none': there are 'normal' and 'low'"),
        ({"shared": "nowhere"}, "no parameter there"),
        ({"shared": lambda name, p: False}, "chooses no parameter"),
        ({"shared": []}, "chooses no parameter"),
        ({"every": float("nan")}, "every=nan: must be a whole number of at least 1"),
        ({"every": "10"}, "every='10'"),
        ({"every": float("inf")}, "every=inf"),
        ({"every": None, "budget": "5%"}, "budget='5%'"),
        ({"every": None, "budget": float("nan")}, "budget=nan"),
        ({"accumulate": None}, "accumulate=None"),
        ({"scaler": object()}, "scaler= is a object; pass the loop's torch.amp.GradScaler"),
    ],
    ids=short,
)
def test_wrong_arguments_are_found_before_anything_is_attached(options, message):
    case = make("mlp")
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with pytest.raises(ProbeError, match=message):
        attached(case, optimizer=optimizer, **options)
    assert not optimizer._optimizer_step_post_hooks
    GradientProbe(case.model, T).close()


def test_what_is_no_model_is_refused():
    with pytest.raises(ProbeError, match=r"model is a str, not a torch\.nn\.Module"):
        GradientProbe("model", T)


@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, 2.0]}, "weights are a list; give a dict"),
        ({"weights": {"t0": "much", "t1": 1.0}}, "weight of task 't0' is 'much'"),
        ({"weights": {"t0": torch.ones(2), "t1": 1.0}}, "weight of task 't0' is tensor"),
        ({"batch_size": None}, "batch_size=None: must be a whole number of at least 0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"losses": [1.0, 2.0]}, "losses are a list; give a dict"),
    ],
    ids=short,
)
def test_wrong_arguments_of_a_call_are_found_before_anything_is_done(options, message, use):
    case = make("mlp")
    sink, probe = attached(case)
    with probe:
        with pytest.raises(ProbeError, match=message):
            getattr(probe, use)(**({"losses": case.losses(0)} | options))
        assert all(p.grad is None for p in case.model.parameters())
        probe.backward(case.losses(0), {"t0": 1, "t1": np.float32(2)}, batch_size=torch.tensor(4))
    assert [row.batch_size for row in sink.rows] == [4]


@pytest.mark.parametrize("epoch", ["x", -1, 0.5, None])
def test_an_epoch_that_is_none_is_refused_where_it_is_set(epoch, tmp_path):
    case = make("mlp")
    with gradprobe.attach(case.model, T, tmp_path / "run.h5", every=1) as probe:
        with pytest.raises(ProbeError, match=r"epoch=.*whole number of at least 0"):
            probe.epoch = epoch
        probe.backward(case.losses(0))
    assert len(gradprobe.open_run(tmp_path / "run.h5")) == 1


def test_the_state_of_something_else_is_refused():
    with GradientProbe(make("mlp").model, T) as probe, pytest.raises(ProbeError, match="no state of a probe: it lacks"):
        probe.load_state_dict({"clock": probe.state_dict()["clock"]})


def test_arguments_that_are_wrong_leave_the_old_probe_of_a_variable_as_it_is(tmp_path):
    case = make("mlp")
    probe = gradprobe.attach(case.model, T, tmp_path / "run.h5", every=1)
    with pytest.raises(ProbeError, match="memory='none'"):
        probe = gradprobe.attach(case.model, T, tmp_path / "other.h5", memory="none")
    probe.backward(case.losses(0))
    probe = gradprobe.attach(case.model, T, tmp_path / "other.h5")
    probe.close()
    assert len(gradprobe.open_run(tmp_path / "run.h5")) == 1


@pytest.mark.parametrize("tasks", ["ab", ("t0",), ("t0", "t0"), ("a|b", "c")], ids=str)
def test_wrong_tasks_are_found(tasks):
    with pytest.raises(ProbeError, match=r"tasks="):
        GradientProbe(make("mlp").model, tasks)


@pytest.mark.parametrize("name", ["", "a\0", "a\x1b[2J", 3], ids=repr)
def test_names_with_which_no_file_could_be_read_again_are_found_beforehand(name):
    model = make("mlp").model
    for options in ({"tasks": ("t0", name)}, {"tasks": T, "layers": {name: [model.trunk[0].weight]}}):
        with pytest.raises(ProbeError, match="without control characters"):
            GradientProbe(model, **options)


class Wrapped(torch.optim.Optimizer):
    """As accelerate wraps one: an Optimizer by type, without the hooks of one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def test_a_wrapped_optimizer_counts_steps_too():
    case = make("mlp")
    optimizer = Wrapped(torch.optim.SGD(case.model.parameters(), lr=0.25))
    sink, probe = attached(case, optimizer=optimizer)
    with probe:
        for step in range(3):
            probe.backward(case.losses(step))
            optimizer.step()
    assert [(row.step, row.lr) for row in sink.rows] == [(0, 0.25), (1, 0.25), (2, 0.25)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": object()}, "optimizer= is a object, which is no torch.optim.Optimizer"),
        ({"layers": {}}, "hold no parameter of this model"),
        ({"layers": {"other": list(nn.Linear(2, 2).parameters())}}, r"layers=\['other'\] hold no parameter"),
        ({"layers": {"trunk": "trunk"}}, r"layers\['trunk'\] holds a str; give parameters"),
        ({"layers": {"trunk": nn.Linear(2, 2)}}, r"layers\['trunk'\] holds a Linear; give parameters"),
    ],
    ids=["optimizer", "no layers", "another model's", "a name", "a module"],
)
def test_an_optimizer_or_layers_that_are_none_are_refused(options, message):
    case = make("mlp")
    with pytest.raises(ProbeError, match=message):
        attached(case, **options)
    GradientProbe(case.model, T).close()


@pytest.mark.parametrize(
    "call",
    [
        lambda probe: probe.log_metrics(1, accuracy=0.5),
        lambda probe: probe.load_state_dict({}),
        lambda probe: probe.note({"t0": torch.ones(()), "t1": torch.ones(())}, None, NONFINITE_LOSS),
    ],
    ids=["log_metrics", "load_state_dict", "note"],
)
def test_what_comes_after_the_end_is_told(call):
    _, probe = attached(make("mlp"))
    probe.close()
    with pytest.raises(ProbeError, match="was closed, and its file is complete"):
        call(probe)


@pytest.mark.parametrize("name", ["", "."])
def test_a_metric_whose_name_no_file_can_hold_is_refused_and_costs_nothing(name, tmp_path):
    case = make("mlp")
    with gradprobe.attach(case.model, T, tmp_path / "run.h5", every=1) as probe:
        probe.backward(case.losses(0))
        with pytest.raises(GradprobeError, match="cannot be the name of a metric"):
            probe.log_metrics(0, **{name: 1.0, "good": 2.0})
        probe.log_metrics(0, good=2.0)
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run.epochs_by_number() == {0: {"good": 2.0}}
