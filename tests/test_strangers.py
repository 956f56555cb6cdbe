"""A stranger's folder: nothing in it is run, waited for without end, or answered with a traceback."""

from __future__ import annotations

import collections
import copy
import io
import math
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from stopped_runs import DIAL, altered, contents, copied, stop_in_epoch

from gradprobe import named_code, open_run
from gradprobe.cli.app import run as command
from gradprobe.errors import UsageError
from gradprobe.trainers import registry
from gradprobe.trainers.models.cfg import find_cfg
from gradprobe.trainers.paths import Paths

PLANTED = """\
from pathlib import Path

Path({marker!r}).touch()
from gradprobe.trainers.joint import Joint


class Mine(Joint):
    pass
"""


def plant(folder, *names):
    """Modules that leave a marker when they are imported."""
    marker = folder / "imported"
    for name in names:
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PLANTED.format(marker=str(marker)))
    return marker


def gradprobe(*words, cwd, module=False, **environment):
    """As the installed command runs it, or as ``python -m``."""
    start = (
        ["-m", "gradprobe"]
        if module
        else ["-c", "import sys; sys.path.pop(0); from gradprobe.__main__ import main; main()"]
    )
    return subprocess.run(
        [sys.executable, *start, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(registry.__file__).parents[2]), **environment},
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A GradNorm run, stopped in its third epoch."""
    with pytest.MonkeyPatch.context() as patch:
        yield stop_in_epoch(patch, 3, tmp_path_factory.mktemp("stopped") / "run.h5", "--trainer", "gradnorm")


@pytest.fixture
def run(stopped, tmp_path):
    return copied(stopped, tmp_path / "folder")


# ---- what is imported


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A run of a trainer of somebody's own, stopped, and the marker that its module leaves."""
    folder = tmp_path / "strange"
    folder.mkdir()
    marker = plant(folder, "stranger_trainer")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    run = stop_in_epoch(monkeypatch, 2, folder / "run.h5", "--trainer", "stranger_trainer:Mine")
    del sys.modules["stranger_trainer"]
    marker.unlink()
    return run, marker


@pytest.mark.parametrize("module", [False, True], ids=["gradprobe", "python -m gradprobe"])
def test_a_module_that_only_the_checkpoint_names_is_not_imported(own, module):
    run, marker = own
    before = contents(run.parent)
    done = gradprobe("record", "--resume", run.name, cwd=run.parent, module=module)
    assert done.returncode == 2, done.stderr
    assert "was recorded with 'stranger_trainer:Mine', a module that is no part of gradprobe" in done.stderr
    assert "--trainer stranger_trainer:Mine" in done.stderr
    assert not marker.exists()
    assert {k: v for k, v in contents(run.parent).items() if "__pycache__" not in k.parts} == {
        k: v for k, v in before.items() if "__pycache__" not in k.parts
    }


def test_the_module_that_the_command_line_names_is_gone_on_with(own):
    run, marker = own
    done = gradprobe("record", "--resume", run.name, "--trainer", "stranger_trainer:Mine", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert marker.exists()
    with open_run(run) as file:
        assert file.end == "finished"
        assert file.provenance["trainer"] == "stranger_trainer:Mine"


@pytest.mark.parametrize("named", ["stranger_trainer:Other", "other_module:Mine", "joint"])
def test_another_trainer_than_the_run_was_recorded_with_is_refused(own, named, capsys):
    run, marker = own
    assert command(["record", "--resume", str(run), "--trainer", named]) == 2
    assert "was recorded with --trainer stranger_trainer:Mine" in capsys.readouterr().err
    assert not marker.exists()


def test_a_bundled_trainer_may_be_named_too(run):
    assert command(["record", "--resume", str(run), "--trainer", "gradnorm"]) == 0


@pytest.mark.parametrize(
    "name", ["planted:Mine", "planted.deep:Mine", "os:system", "gradprobe.trainers.joint:Joint", "joint:x"]
)
def test_a_trainer_that_was_put_into_a_checkpoint_is_not_imported(run, name, monkeypatch, capsys):
    marker = plant(run.parent, "planted", "planted.deep", "joint")
    monkeypatch.chdir(run.parent)
    monkeypatch.syspath_prepend(str(run.parent))
    altered(run, lambda state: state["settings"].update(trainer=name))
    assert command(["record", "--resume", run.name]) == 2
    assert f"was recorded with {name!r}" in capsys.readouterr().err
    assert not marker.exists()


def test_no_module_of_the_present_folder_stands_in_for_an_installed_one(run):
    marker = plant(
        run.parent,
        "yaml",
        "torch",
        "h5py",
        "json",
        "typer",
        "rich",
        "torchjd",
        "gradprobe/cli/app",
        "gradprobe/__init__",
    )
    for words in (["record", "--resume", run.name], ["replay", run.name, "--no-figure"], ["summary", run.name]):
        done = gradprobe(*words, cwd=run.parent)
        assert done.returncode == 0, done.stderr
    assert not marker.exists()


def test_processes_that_are_started_look_into_no_folder_either(tmp_path, monkeypatch):
    """`python -m gradprobe` would take a folder of that name that lies in the present one."""
    folder = tmp_path / "strange"
    folder.mkdir()
    run = stop_in_epoch(monkeypatch, 2, folder / "run.h5")
    altered(run, lambda state: state["settings"].update(processes=2))
    marker = plant(folder, "yaml", "torch", "gradprobe/__init__", "gradprobe/__main__")
    done = gradprobe("record", "--resume", run.name, cwd=folder)
    assert not marker.exists()
    assert done.returncode == 0, done.stderr


def test_a_named_module_that_is_installed_goes_before_one_of_the_present_folder(tmp_path, monkeypatch):
    marker = plant(tmp_path, "fractions")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "fractions", raising=False)
    before = list(sys.path)
    assert Path(named_code.import_named("fractions").__file__).parent != tmp_path
    assert sys.path == before
    assert not marker.exists()


def test_a_name_that_is_no_module_is_no_trainer(capsys):
    for name in (".relative:Mine", "a..b:Mine", "a b:Mine", "a:", ":b", "a:b:c", "../a:Mine", "a:b()", "a\nb:c"):
        assert command(["record", "--trainer", name, *DIAL]) == 2, name
        assert "unknown trainer" in capsys.readouterr().err


def test_many_processes_are_not_started_by_a_file(run, capsys):
    altered(run, lambda state: state["settings"].update(processes=4096, batch_size=4096))
    assert command(["record", "--resume", str(run)]) == 3
    assert "4096 processes" in capsys.readouterr().err


# ---- checkpoints that are not what was saved


class Evil:
    def __reduce__(self):
        return (os.system, ("touch imported",))


def put(*path, value):
    """A change that puts a value somewhere into the state."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


def drop(*path):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def first(state, part="model"):
    return next(iter(state[part]))


def moments(state):
    return state["optimizer"]["state"][0]


def swapped(state):
    model = state["model"]
    one, other = "blocks.0.weight", "heads.a.bias"
    model[one], model[other] = model[other], model[one]


NAN, MANY = math.nan, 2**62
TOP = [
    *("settings", "hyp", "ignored_hyp", "data_fingerprint", "epoch", "best", "model", "optimizer", "schedule"),
    *("balancer", "scaler", "probe", "rng"),
]

KINDS = {
    "is a list": lambda _: [1],
    "is a tensor": lambda _: torch.ones(3),
    "is a text": lambda _: "x",
    "is empty": lambda _: {},
    "is a number": lambda _: 3,
    "is weights": lambda state: dict(state["model"]),
    **{f"lacks {name}": drop(name) for name in TOP},
    **{f"{name} is None": put(name, value=None) for name in TOP},
    **{f"{name} is a text": put(name, value="x") for name in TOP if name != "data_fingerprint"},
    **{f"{name} is a list of itself": (lambda state, n=name: state.update({n: [[state[n]]]})) for name in TOP},
    "an unknown part": put("surplus", value=1),
    "a number for a name": lambda state: {3: state},
    "nested a hundredfold": lambda state: state.update(plan={"a": deep(100)}),
    # settings
    "an unknown setting": put("settings", "lerning_rate", value=1.0),
    "a whole number for a beta": put("settings", "gradnorm_momentum", value=0),
    "a setting of another type": put("settings", "lr", value="0.1"),
    "a list for a number": put("settings", "epochs", value=[3]),
    "a truth for a number": put("settings", "epochs", value=True),
    "a fraction for a count": put("settings", "batch_size", value=16.5),
    "a learning rate of NaN": put("settings", "lr", value=NAN),
    "a negative learning rate": put("settings", "lr", value=-1.0),
    "another learning rate": put("settings", "lr", value=0.5),
    "another optimizer": put("settings", "optimizer", value="SGD"),
    "another momentum": put("settings", "momentum", value=0.5),
    "another trainer": put("settings", "trainer", value="uncertainty"),
    "a trainer without state": put("settings", "trainer", value="joint"),
    "an unknown trainer": put("settings", "trainer", value="gradnrom"),
    "another precision": put("settings", "precision", value="16-mixed"),
    "no such device": put("settings", "device", value="warp:3"),
    "a device without memory": put("settings", "device", value="meta"),
    "three task weights": put("settings", "task_weights", value=(1.0, 1.0, 1.0)),
    "a layer that is not there": put("settings", "gradnorm_layer", value="blocks.77"),
    "another model": put("settings", "data", value="dial:size=32,dim=8"),
    "other data": put("settings", "data", value="dial:size=64"),
    "data with a NUL": put("settings", "data", value="a\0b"),
    "a path of 5,000": put("settings", "data", value="x" * 5000),
    "data that are no file": put("settings", "data", value="/dev/zero"),
    "huge images": put("settings", "imgsz", value=32 * 2**40),
    "fewer epochs than it has": put("settings", "epochs", value=1),
    "a huge batch": put("settings", "batch_size", value=2**70),
    "a hyper-parameter of text": put("hyp", "box", value="0.05"),
    "a negative hyper-parameter": put("hyp", "box", value=-1.0),
    "an unknown hyper-parameter": put("hyp", "bxo", value=1.0),
    # numbers
    "a negative epoch": put("epoch", value=-1),
    "a huge epoch": put("epoch", value=MANY),
    "an epoch of NaN": put("epoch", value=NAN),
    "a best of NaN": put("best", value=NAN),
    "a huge number": put("epoch", value=10**400),
    # tensors
    "another shape": lambda state: state["model"].update({first(state): torch.zeros(7)}),
    "another type": lambda state: state["model"].update({first(state): state["model"][first(state)].double()}),
    "swapped": swapped,
    "a NaN weight": lambda state: state["model"][first(state)].fill_(NAN),
    "an infinite weight": lambda state: state["model"][first(state)].fill_(math.inf),
    "a weight that is a list": lambda state: state["model"].update({first(state): [0.0]}),
    "a weight that is missing": drop("model", "blocks.0.weight"),
    "a weight more": put("model", "blocks.9.weight", value=torch.zeros(1, 32)),
    "a weight without memory": lambda state: state["model"].update({first(state): torch.zeros(1).expand(10**12)}),
    "a sparse weight": lambda state: state["model"].update({first(state): torch.eye(3).to_sparse()}),
    # the optimizer
    "moments of another shape": lambda state: moments(state).update(exp_avg=torch.zeros(3)),
    "moments that are missing": lambda state: drop("exp_avg_sq")(moments(state)),
    "moments of NaN": lambda state: moments(state)["exp_avg"].fill_(NAN),
    "moments of SGD": lambda state: state["optimizer"].update(state={0: {"momentum_buffer": torch.zeros(1, 32)}}),
    "moments of no parameter": lambda state: state["optimizer"]["state"].update({99: moments(state)}),
    "moments under a text": lambda state: state["optimizer"]["state"].update({"0": moments(state)}),
    "a step that is a list": lambda state: moments(state).update(step=[3]),
    "a group less": lambda state: drop("param_groups", -1)(state["optimizer"]),
    "a group of other parameters": lambda state: state["optimizer"]["param_groups"][0].update(params=[0, 0]),
    "a rate of NaN": lambda state: state["optimizer"]["param_groups"][0].update(lr=NAN),
    "a negative rate": lambda state: state["optimizer"]["param_groups"][0].update(lr=-0.1),
    "a rate of text": lambda state: state["optimizer"]["param_groups"][0].update(lr="0.1"),
    "another rate": lambda state: state["optimizer"]["param_groups"][0].update(lr=0.7),
    "betas of text": lambda state: state["optimizer"]["param_groups"][0].update(betas="ab"),
    # the schedule
    "a schedule that is ahead": put("schedule", "last_epoch", value=MANY),
    "a schedule that is behind": put("schedule", "last_epoch", value=-4),
    "a schedule of text": put("schedule", "last_epoch", value="4"),
    "a schedule of other rates": put("schedule", "base_lrs", value=[1.0, 1.0]),
    "a schedule with functions": put("schedule", "lr_lambdas", value=[{"x": 1}, {"y": 2}]),
    # the balancer
    "a balancer of three tasks": put("balancer", "weight", value=torch.ones(3, dtype=torch.float64)),
    "a balancer's NaN": put("balancer", "weight", value=torch.full((2,), NAN, dtype=torch.float64)),
    "negative weights": put("balancer", "weight", value=torch.tensor([-1.0, 3.0], dtype=torch.float64)),
    "first losses of three tasks": put("balancer", "initial_losses", value=torch.ones(3, dtype=torch.float64)),
    "first losses of text": put("balancer", "initial_losses", value="ab"),
    "a balancer's optimizer": put("balancer", "optimizer", value={}),
    "a balancer's moments": lambda state: state["balancer"]["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    # random numbers
    "random state of another length": put("rng", value=torch.zeros(7, dtype=torch.uint8)),
    "random state of zeros": lambda state: state.update(rng=torch.zeros_like(state["rng"])),
    "random state of floats": lambda state: state.update(rng=state["rng"].double()),
    # the probe
    **{f"probe.{n} of text": put("probe", n, value="x") for n in ("clock", "meter", "epoch", "last_row", "seconds")},
    "a clock of text": put("probe", "clock", "step", value="4"),
    "a clock that is behind": put("probe", "clock", "step", value=-1),
    "a clock that is ahead": put("probe", "clock", "step", value=2**40),
    "a clock without calls": drop("probe", "clock", "calls"),
    "time of NaN": put("probe", "seconds", value=NAN),
    "metrics of later epochs": put("probe", "last_metrics", value=99),
    "rows of a later step": put("probe", "last_row", value=99),
    "layers without a count": put("probe", "meter", "sharing", "rows", value=[]),
    "layers of numbers": put("probe", "meter", "sharing", "layers", value=[[1, [0]]] * 3),
    "a guard of text": put("probe", "meter", "guard", value="x"),
    "a Gramian of text": put("probe", "meter", "last_gram", value="x"),
    # the rest
    "batches of text": put("batches", "count", value="4"),
    "an unknown plan": put("plan", value=["x"]),
    "an arm of numbers": put("arm", value=5),
    "another id": put("id", value="f" * 32),
    "no id": drop("id"),
    "no sum": drop("sum"),
    "a sum of numbers": put("sum", value=5),
}  # fmt: skip


UNSUMMED = ("a weight without memory", "a sparse weight", "a sum of numbers")
"""No sum can be made over them."""


def deep(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


def refused(run, capsys):
    """Try to go on; the one message that it gives, and nothing is touched."""
    before = contents(run.parent)
    capsys.readouterr()
    code = command(["record", "--resume", str(run)])
    said = capsys.readouterr()
    assert code in (1, 2, 3), said.err
    assert contents(run.parent) == before
    assert said.out == ""
    told = said.err.splitlines()
    assert len(told) == 1, said.err
    assert told[0].startswith("gradprobe: ")
    assert len(told[0]) < 1500
    return told[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_altered_checkpoint_is_one_clear_error_and_touches_nothing(kind, run, capsys):
    altered(run, KINDS[kind], seal=kind not in UNSUMMED)
    said = refused(run, capsys)
    named = (run.name, "run.checkpoint.pt", "--", "/dev/zero: cannot be read")
    assert any(name in said for name in named), said


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 2000, "\ud800"], ids=["long name", "long path", "surrogate"])
@pytest.mark.parametrize("kind", ["", ".yaml"])
def test_data_that_no_file_can_be_is_one_clear_error(name, kind, run, capsys):
    altered(run, put("settings", "data", value=name + kind))
    assert command(["record", "--resume", str(run)]) == 1
    assert capsys.readouterr().err.startswith("gradprobe: ")
    with pytest.raises(UsageError, match="unknown model cfg"):
        find_cfg(name + kind, run.parent)


def test_a_checkpoint_as_it_was_saved_goes_on(run):
    altered(run, lambda state: None)
    assert command(["record", "--resume", str(run)]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"].update({"blocks.0.weight": state["model"]["blocks.1.weight"]}),
        lambda state: state["rng"].random_(0, 2),
        lambda state: state.update(best=0.25),
        lambda state: state["probe"]["clock"].update(step=2, last_asked=1),
        lambda state: state["balancer"]["initial_losses"].mul_(2),
        lambda state: state["settings"].update(seed=1),
    ],
    ids=["weights swapped", "random numbers", "best", "clock", "first losses", "seed"],
)  # fmt: skip
def test_what_looks_right_and_is_not_what_was_saved_is_told_by_the_sum(change, run, capsys):
    altered(run, lambda state: (change(state), None)[1], seal=False)
    assert "its content is not what was saved" in refused(run, capsys)


def test_every_bit_that_flips_in_a_tensor_is_noticed(run, capsys):
    """torch reads it as it is."""
    path = Paths(run).checkpoint
    weight = torch.load(path, weights_only=True)["model"]["blocks.1.weight"]
    data = bytearray(path.read_bytes())
    place = data.index(weight.numpy().tobytes())
    data[place + 5] ^= 16
    path.write_bytes(data)
    assert "its content is not what was saved" in refused(run, capsys)


@pytest.mark.parametrize("part", [0, 1, 10, 1000, 0.5, 0.9, 0.999])
def test_a_checkpoint_that_was_cut_is_refused(part, run, capsys):
    path = Paths(run).checkpoint
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data)) if isinstance(part, float) else part])
    assert "is no checkpoint to go on from" in refused(run, capsys)


def packed(run):
    """The same parts, deflated: a small file could hold any number of zeros."""
    path = Paths(run).checkpoint
    parts = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(parts, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    path.write_bytes(parts.getvalue())


def other_zip(run):
    with zipfile.ZipFile(Paths(run).checkpoint, "w") as file:
        file.writestr("hello", "world")


def a_folder(run):
    Paths(run).checkpoint.unlink()
    Paths(run).checkpoint.mkdir()


def a_fifo(run):
    Paths(run).checkpoint.unlink()
    os.mkfifo(Paths(run).checkpoint)


def a_device(run):
    Paths(run).checkpoint.unlink()
    Paths(run).checkpoint.symlink_to("/dev/zero")


def a_dangling_link(run):
    Paths(run).checkpoint.unlink()
    Paths(run).checkpoint.symlink_to("nowhere")


@pytest.mark.parametrize(
    "make",
    [
        lambda run: Paths(run).checkpoint.write_bytes(pickle.dumps(Evil())),
        lambda run: torch.save(Evil(), Paths(run).checkpoint),
        lambda run: torch.save({"settings": Evil()}, Paths(run).checkpoint),
        lambda run: torch.save(collections.Counter("abc"), Paths(run).checkpoint),
        lambda run: torch.save(torch.nn.Linear(2, 2), Paths(run).checkpoint),
        lambda run: torch.save(copy.deepcopy({"a": 1}), Paths(run).checkpoint, _use_new_zipfile_serialization=False),
        lambda run: Paths(run).checkpoint.write_text("not a checkpoint"),
        lambda run: Paths(run).checkpoint.write_bytes(os.urandom(5000)),
        *(packed, other_zip, a_folder, a_fifo, a_device, a_dangling_link),
    ],
    ids=[
        *("a bare pickle", "a pickle", "a pickle within", "a counter", "a module", "an old format", "text", "noise"),
        *("packed", "another zip", "a folder", "a FIFO", "a device", "a link to nowhere"),
    ],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_other_files_in_the_place_of_a_checkpoint_are_refused(make, run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    make(run)
    code = command(["record", "--resume", str(run)])
    said = capsys.readouterr().err
    assert code == 3
    assert "is no checkpoint to go on from" in said
    assert len(said.splitlines()) == 1
    assert not (run.parent / "imported").exists()


BALANCERS = {
    "uncertainty": lambda state: state["balancer"].update(log_variance=torch.zeros(3)),
    "rlw": lambda state: state["balancer"].update(generator=torch.zeros(5, dtype=torch.uint8)),
    "dwa": lambda state: state["balancer"].update(seen=10**6),
    "pcgrad": lambda state: state["balancer"].update(weights={"a": 1.0}),
    "gradvac": lambda state: state["balancer"].update(method={"phi": torch.ones(3, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("trainer", BALANCERS)
def test_an_altered_state_of_every_kind_of_balancer_is_refused(trainer, tmp_path, monkeypatch, capsys):
    run = stop_in_epoch(monkeypatch, 2, tmp_path / "run.h5", "--trainer", trainer)
    whole = Paths(run).checkpoint.read_bytes()
    for change in (BALANCERS[trainer], put("balancer", value={"x": 1}), put("balancer", value={})):
        Paths(run).checkpoint.write_bytes(whole)
        altered(run, change)
        assert "its balancer is not of this training" in refused(run, capsys)
    Paths(run).checkpoint.write_bytes(whole)
    assert command(["record", "--resume", str(run)]) == 0


# ---- what a run file says of itself


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seed", "abc"), ("seed", -1), ("seed", 2.5), ("cagrad_c", "x"), ("cagrad_c", [1.0]), ("match_norm", "yes")),
        *(("task_weights", "ab"), ("task_weights", [1.0]), ("task_weights", [1.0, math.nan]), ("gradnorm_lr", -1.0)),
        *(("gradnorm_alpha", math.nan), ("gradnorm_momentum", 7.0), ("gradnorm_layer", 3), ("weight_sum", "x")),
    ],
)  # fmt: skip
def test_settings_that_a_run_file_makes_up_are_one_clear_error(name, value, stopped, monkeypatch, capsys):
    from gradprobe.runfile import Run

    opened = Run.__init__

    def open_(run, *arguments, **options):
        opened(run, *arguments, **options)
        run.provenance[f"settings.{name}"] = value

    monkeypatch.setattr(Run, "__init__", open_)
    assert command(["replay", str(stopped), "--method", "cagrad,gradnorm", "--no-figure"]) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"gradprobe: {stopped}: ")
    assert len(said.splitlines()) == 1
