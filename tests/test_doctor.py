"""Each finding is provoked, and none is found on a model that is sound."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from test_probes import make
from test_probes_exact import Embedded, detection_losses
from test_probes_exact import detector as _detector
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, Collector, Heads

import gradprobe
from gradprobe.cli.app import run
from gradprobe.errors import ProbeError
from gradprobe.probes import GradientProbe
from gradprobe.probes.doctor import SEVERITIES

detector = _detector


def found(model, losses):
    return [(f.severity, f.check, f.module) for f in gradprobe.doctor(model, losses)]


def the(model, losses, check):
    (finding,) = [f for f in gradprobe.doctor(model, losses) if f.check == check]
    assert finding.severity in SEVERITIES
    assert finding.message
    assert finding.advice
    return finding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("name", list(ZOO))
def test_nothing_is_found_on_a_sound_model(name, tasks, dtype):
    case = make(name, dtype, tasks)
    for step in range(3):
        assert gradprobe.doctor(case.model, case.losses(step)) == []


def test_nothing_is_found_on_the_bundled_detector(detector):
    assert gradprobe.doctor(detector, detection_losses(detector)) == []


def test_nothing_is_found_on_losses_as_people_write_them():
    torch.manual_seed(0)
    model, x = Heads(nn.Linear(6, 5), 5, 3), torch.randn(8, 6)
    a, b, c = model(x)
    losses = {
        "weighted": 0.25 * F.mse_loss(a.squeeze(1), torch.zeros(8)) + 1e-4 * model.trunk.weight.pow(2).sum(),
        "normalised": F.cross_entropy(b, torch.zeros(8, dtype=torch.long), reduction="sum") / 8,
        "classes": F.binary_cross_entropy_with_logits(c, torch.zeros(8, 3), reduction="none").mean(0).sum(),
    }
    assert gradprobe.doctor(model, losses) == []


def test_the_examination_changes_nothing():
    case = make("checkpointed", torch.float32)
    losses = case.losses(0)
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    state = torch.get_rng_state()
    gradprobe.doctor(case.model, losses)
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in case.model.parameters())
    sum(losses.values()).backward()  # the graph is still there


# ---- the model


@pytest.fixture
def donating():
    with contextlib.ExitStack() as stack:
        yield lambda on: stack.enter_context(torch._functorch.config.patch(donated_buffer=on))
    torch._dynamo.reset()


@pytest.mark.parametrize(("donated", "severity"), [(True, "error"), (False, "warning")])
@pytest.mark.parametrize("how", ["the module", "in place", "a function"])
def test_a_compiled_model(how, donated, severity, donating):
    donating(donated)
    case = make("mlp", torch.float32)
    x = torch.randn(8, 6)
    if how == "the module":
        case.model.trunk = torch.compile(case.model.trunk, backend="aot_eager")
    elif how == "in place":
        case.model.trunk.compile(backend="aot_eager")
    forward = torch.compile(case.model.forward, backend="aot_eager") if how == "a function" else case.model
    a, b = forward(x)
    finding = the(case.model, {"a": a.mean(), "b": b.pow(2).mean()}, "compiled")
    assert finding.severity == severity
    assert finding.module == ("" if how == "a function" else "trunk")
    assert ("donated_buffer = False" in finding.advice) == donated


@pytest.mark.filterwarnings("ignore:gradprobe. step 0. measuring failed:RuntimeWarning")
@pytest.mark.parametrize("donated", [True, False])
def test_a_compiled_model_is_measured_only_where_its_buffers_are_kept(donated, donating):
    donating(donated)
    case, sink = make("convolutional", torch.float32), Collector()
    case.model.trunk = torch.compile(case.model.trunk, backend="aot_eager")
    for step in range(2):
        sum(case.losses(step).values()).backward()
    with GradientProbe(case.model, ("t0", "t1"), [sink]) as probe:
        probe.backward(case.losses(2))
    assert ("donated buffers" in sink.rows[0].status) == donated
    assert (sink.rows[0].status == "measured") != donated


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.hidden = nn.Linear(6, 12), nn.Linear(12, 12)

    def forward(self, x):
        return checkpoint(self.hidden, self.first(x), use_reentrant=True)


def test_a_reentrant_checkpoint():
    model = Heads(Reentrant(), 12)
    a, b = model(torch.randn(4, 6))
    losses = {"a": a.mean(), "b": b.mean()}
    finding = the(model, losses, "reentrant_checkpoint")
    assert (finding.severity, finding.module) == ("error", "trunk.hidden")
    assert "hide 2 parameters" in finding.message
    assert "use_reentrant=False" in finding.advice
    with GradientProbe(model, losses) as probe, pytest.raises(ProbeError, match=r"1 reentrant.*use_reentrant=False"):
        probe.backward(losses)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_parameters(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    case = make("mlp", torch.float32)
    losses = case.losses(0)
    case.model.trunk[2].weight = nn.Parameter(
        distribute_tensor(case.model.trunk[2].weight.detach(), mesh, [Replicate()])
    )
    finding = the(case.model, losses, "sharded")
    assert (finding.severity, finding.module) == ("error", "trunk.2")
    with GradientProbe(case.model, losses) as probe, pytest.raises(ProbeError, match=r"trunk\.2 are sharded"):
        probe.record(losses)


def test_a_fully_sharded_module(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case = make("mlp", torch.float32)
    losses = case.losses(0)
    fully_shard(case.model.trunk, mesh=init_device_mesh("cpu", (1,)))
    finding = the(case.model, losses, "sharded")
    assert (finding.severity, finding.module) == ("error", "trunk")


@pytest.mark.parametrize("mode", ["plain", "find_unused_parameters", "static_graph"])
def test_data_parallelism(mode, one_process):
    case = make("mlp", torch.float32)
    model = nn.parallel.DistributedDataParallel(case.model, **({} if mode == "plain" else {mode: True}))
    a, b = model(torch.randn(8, 6))
    findings = gradprobe.doctor(model, {"a": a.mean(), "b": b.pow(2).mean()})
    by_graph = [f for f in findings if f.check == "graph_alone"]
    assert [f.module for f in by_graph] == ([] if mode == "plain" else ["module.heads.0"])
    findings = [f for f in findings if f not in by_graph]
    assert {f.check for f in findings} == {"data_parallel"}
    assert [f.severity for f in findings] == (["note"] if mode == "plain" else ["warning", "note"])
    assert "Attach the probe to the DDP model in every process" in findings[-1].advice
    assert mode == "plain" or mode in findings[0].message


def test_the_older_data_parallelism():
    case = make("mlp", torch.float32)
    assert the(nn.DataParallel(case.model), case.losses(0), "data_parallel").severity == "warning"


@pytest.mark.parametrize("kind", ["parameter", "module", "module before"])
def test_the_users_own_hooks(kind):
    case = make("mlp")
    layer = case.model.trunk[2]
    if kind == "parameter":
        layer.weight.register_hook(lambda gradient: None)
    elif kind == "module":
        layer.register_full_backward_hook(lambda *_: None)
    else:
        layer.register_full_backward_pre_hook(lambda *_: None)
    finding = the(case.model, case.losses(0), "own_hooks")
    assert (finding.severity, finding.module) == ("warning", "trunk.2" + (".weight" if kind == "parameter" else ""))
    assert "once per task" in finding.message


def test_sparse_gradients():
    model = Embedded()
    finding = the(model, model.losses(torch.tensor([1, 2, 3])), "sparse")
    assert (finding.severity, finding.module) == ("warning", "table")


def test_complex_parameters():
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
    z = model.weight @ torch.randn(3, dtype=torch.complex64)
    assert the(model, {"a": z.abs().mean(), "b": z.real.mean()}, "complex").severity == "note"


def test_tied_weights():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    trunk[2].weight = trunk[0].weight
    model = Heads(trunk, 6)
    a, b = model(torch.randn(4, 6))
    finding = the(model, {"a": a.mean(), "b": b.pow(2).mean()}, "tied")
    assert (finding.severity, finding.module) == ("note", "trunk.0")
    assert "trunk.2.weight" in finding.message


# ---- the losses


def outputs():
    torch.manual_seed(0)
    model = Heads(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), 5)
    return model, *model(torch.randn(8, 6))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss: loss.expand(3), r"shape \(3,\)"),
        (lambda loss: loss.detach(), "no graph"),
        (lambda loss: 1.0, "is a float"),
        (lambda loss: loss * 1j, "is complex"),
    ],
    ids=["a vector", "detached", "a number", "complex"],
)
def test_a_loss_that_cannot_be_measured(spoil, message):
    model, a, b = outputs()
    finding = the(model, {"good": a.mean(), "bad": spoil(b.mean())}, "loss")
    assert finding.severity == "error"
    assert "'bad'" in finding.message
    assert re.search(message, finding.message)


def test_losses_that_share_no_parameter():
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1), "c": nn.Linear(1, 1)})
    x = torch.randn(3, 2)
    one, other = model["a"](x), model["b"](x)
    losses = {"t": one.mean(), "alone": other.mean(), "u": model["c"](one).mean()}
    finding = the(model, losses, "shares_nothing")
    assert finding.severity == "error"
    assert "'alone'" in finding.message


@pytest.mark.parametrize("scale", [2.0**16, 2.0**10])
def test_a_loss_that_a_scaler_scaled(scale):
    model, a, b = outputs()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    finding = the(model, {"a": scaler.scale(a.pow(2).mean()), "b": b.mean()}, "grad_scaler")
    assert finding.severity == "warning"
    assert f"task 'a' is multiplied by {scale:g}" in finding.message
    assert "scaler=" in finding.advice


def test_all_losses_scaled_and_one_also_by_the_batch():
    model, a, b = outputs()
    scaler = torch.amp.GradScaler("cpu")
    findings = gradprobe.doctor(model, {"a": scaler.scale(a.mean()), "b": scaler.scale(b.mean() * 8)})
    assert [f.check for f in findings] == ["grad_scaler"] * 2
    assert "'a'" in findings[0].message
    assert "'b'" in findings[1].message


@pytest.mark.parametrize(
    "make_loss",
    [
        lambda b: b.pow(2).mean() * 8,
        lambda b: (b.pow(2).mean() + b.mean()) * 8,
        lambda b: b.pow(2).sum(),
        lambda b: b.pow(2).sum(1).sum(),
        lambda b: 2 * F.mse_loss(b, torch.zeros(8, 2), reduction="sum"),
        lambda b: F.cross_entropy(b, torch.zeros(8, dtype=torch.long), reduction="sum") + b.mean(),
    ],
    ids=["times", "a sum times", "sum", "sum of sums", "mse", "cross entropy"],
)
def test_a_loss_that_grows_with_the_batch(make_loss):
    model, a, b = outputs()
    finding = the(model, {"a": a.mean(), "b": make_loss(b)}, "batch_scaled")
    assert finding.severity == "warning"
    assert "task 'b'" in finding.message
    assert "8" in finding.message


def test_yolov5s_own_loss_is_told_to_grow_with_the_batch(detector):
    """As yolov5's ComputeLoss returns it: multiplied by the batch size."""
    losses = detection_losses(detector)
    findings = gradprobe.doctor(detector, {"det": losses["det"] * 2, "cls": losses["cls"]})
    assert [(f.check, "'det'" in f.message) for f in findings] == [("batch_scaled", True)]


@pytest.mark.parametrize("total", [lambda a, b: a + b, lambda a, b: (0.5 * a + b) * 2, lambda a, b: a.exp() + b])
def test_a_loss_that_is_part_of_another(total):
    model, a, b = outputs()
    one, other = a.mean(), b.pow(2).mean()
    finding = the(model, {"one": one, "total": total(one, other)}, "counted_twice")
    assert finding.severity == "error"
    assert "'one' is part of that of task 'total'" in finding.message


def test_one_loss_under_two_names():
    model, a, _ = outputs()
    loss = a.mean()
    assert "'a' is also that of task 'again'" in the(model, {"a": loss, "again": loss}, "counted_twice").message


def test_two_outputs_of_one_operation_are_two_losses():
    model, a, _ = outputs()
    one, other = torch.stack([a.mean(), a.pow(2).mean()]).unbind()
    assert [f for f in gradprobe.doctor(model, {"a": one, "b": other}) if f.check == "counted_twice"] == []


# ---- BatchNorm


def normed(kind):
    torch.manual_seed(0)
    return Heads(nn.Sequential(nn.Linear(6, 5), kind(5), nn.Tanh()), 5)


def divided_losses(model):
    x = torch.randn(8, 6)
    z = model.trunk(x)
    return {"a": model.heads[0](z[:4]).mean(), "b": model.heads[1](z[4:]).pow(2).mean()}


def test_batchnorm_over_a_batch_that_tasks_divide():
    model = normed(nn.BatchNorm1d)
    finding = the(model, divided_losses(model), "batchnorm")
    assert (finding.severity, finding.module) == ("warning", "trunk.1")
    assert "different samples of one batch" in finding.message
    model.eval()  # with fixed statistics samples do not meet
    assert gradprobe.doctor(model, divided_losses(model)) == []


def test_layernorm_couples_nothing():
    model = normed(nn.LayerNorm)
    assert gradprobe.doctor(model, divided_losses(model)) == []


def test_batchnorm_in_a_forward_per_task():
    model = normed(nn.BatchNorm1d)
    losses = {"a": model(torch.randn(4, 6))[0].mean(), "b": model(torch.randn(4, 6))[1].pow(2).mean()}
    finding = the(model, losses, "batchnorm")
    assert (finding.severity, finding.module) == ("warning", "trunk.1")
    assert "running statistics" in finding.message


def test_the_most_severe_comes_first():
    model, a, _ = outputs()
    model.trunk[0].weight.register_hook(lambda gradient: None)
    loss = a.mean()
    severities = [f.severity for f in gradprobe.doctor(model, {"a": loss, "b": loss})]
    assert severities == sorted(severities, key=SEVERITIES.index)
    assert len(severities) == 2


# ---- the command

FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    trunk, heads = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    z = trunk(torch.randn(8, 3))
    a, b = heads[0](z).mean(), heads[1](z).pow(2).mean()
    return nn.ModuleList([trunk, heads]), {"a": a, "b": b}

def twice():
    model, losses = make()
    return model, {**losses, "total": sum(losses.values())}

def wrong():
    return 3

def broken():
    raise ValueError("no data")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "cases_for_the_doctor.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("cases_for_the_doctor", None)


def test_the_command_lists_findings(folder, capsys):
    assert run(["doctor", "cases_for_the_doctor:twice", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {(f["severity"], f["check"]) for f in findings} == {("error", "counted_twice")}
    assert set(findings[0]) == {"severity", "check", "module", "message", "advice"}
    assert run(["doctor", "cases_for_the_doctor:twice"]) == 0
    assert "error: the loss of task 'a' is part of that of task 'total'" in capsys.readouterr().out


def test_the_command_on_a_sound_model(folder, capsys):
    assert run(["doctor", "cases_for_the_doctor:make", "--fail-on", "note"]) == 0
    assert capsys.readouterr().out == "nothing found\n"


def test_a_gate_can_be_asked_for(folder, capsys):
    assert run(["doctor", "cases_for_the_doctor:twice", "--fail-on", "warning"]) == 10


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("cases_for_the_doctor", "write MODULE:FUNCTION"),
        ("nowhere_at_all:make", "No module named 'nowhere_at_all'"),
        ("cases_for_the_doctor:missing", "has no attribute 'missing'"),
        ("cases_for_the_doctor:broken", "ValueError: no data"),
        ("cases_for_the_doctor:wrong", "returned a int, not a model"),
    ],
)
def test_a_wrong_target_is_wrong_usage(target, message, folder, capsys):
    assert run(["doctor", target]) == 2
    assert message in capsys.readouterr().err


def test_the_installed_command_finds_the_folder_it_is_called_from(folder):
    code = "import sys; sys.path.remove(''); from gradprobe.cli.app import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "doctor", "cases_for_the_doctor:make"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert (done.returncode, done.stdout) == (0, "nothing found\n"), done.stderr
