"""``gradprobe audit`` as a user runs it."""

from __future__ import annotations

import inspect
import itertools
import json

import h5py
import numpy as np
import pytest
import torch
import training
from audit_zoo import factory

from gradprobe.audit import AuditOptions, attribution, audit, audit_section
from gradprobe.audit.pair import setting
from gradprobe.cli.app import run
from gradprobe.cli.audit import audit as audit_command
from gradprobe.cli.record import record
from gradprobe.errors import MissingExtraError, RunFileError, UsageError
from gradprobe.plots import divergence
from gradprobe.runfile import open_run
from gradprobe.trainers import audited, balancer
from gradprobe.trainers.data.loading import load_data
from gradprobe.trainers.settings import resolve

mean_and_dropout, clean = factory("mean", "dropout"), factory()


def broken():
    raise ValueError("no data here")


def test_json_figure_and_file_tell_the_same(tmp_path, capsys):
    figure, out = tmp_path / "parting.png", tmp_path / "audit.h5"
    arguments = ["audit", "test_audit_command:mean_and_dropout", "--steps", "6", "--json"]
    assert run([*arguments, "--figure", str(figure), "--out", str(out), "--fail-on", "material"]) == 10
    found = json.loads(capsys.readouterr().out)
    opened = {door["door"] for door in found["doors"] if door["state"] == "open"}
    assert opened == {"random stream", "mean over tasks"}
    assert found["class"] == "material"
    assert found["first_differences"][0]["step"] == 0
    assert found["effect"]["evaluation"]["det"]["without"] != found["effect"]["evaluation"]["det"]["with"]
    assert figure.stat().st_size > 10_000
    table = figure.with_suffix(".csv").read_text().splitlines()
    assert table[0] == "curve,step,displacement"
    assert {line.split(",")[0] for line in table[1:]} == {"as it is", *(f"{name} alone" for name in opened)}
    with h5py.File(out) as file:
        group = file["audit"]
        assert group.attrs["class"] == "material"
        np.testing.assert_array_equal(group["displacement"][()], found["displacement"])
        states = dict(zip(group["door"].asstr()[()], group["state"].asstr()[()], strict=True))
        assert {door for door, state in states.items() if state == "open"} == opened
        assert json.loads(group["json"].asstr()[0]) == found
    assert run([*arguments, "--out", str(out)]) == 2, "a file that is there is kept"


def test_the_file_of_an_audit_is_a_run_file(tmp_path, capsys):
    out = tmp_path / "audit.h5"
    assert run(["audit", "test_audit_command:mean_and_dropout", "--steps", "5", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert run(["check", str(out)]) == 0
    assert run(["summary", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"An audit, not a recording: {found['sentence']}" in said
    assert "mean over tasks: " in said
    assert "sum the losses" in said
    assert run(["summary", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["audit"]
    assert {d["door"]: d["state"] for d in told["doors"]} == {d["door"]: d["state"] for d in found["doors"]}
    assert told["displacement"] == found["displacement"][-1]
    with open_run(out) as file:
        assert file.tasks == ("det", "cls")
        assert len(file) == 0
        np.testing.assert_array_equal(file.audit["displacement"], found["displacement"])
        data = file.to_xarray()
        assert data["audit.displacement"].values.tolist() == found["displacement"]
        assert data["audit.state"].sel({"audit.door": "mean over tasks"}).item() == "open"
    for kind in ("csv", "netcdf", "parquet", "tensorboard"):
        assert run(["export", str(out), "--to", kind]) == 0
    table = (tmp_path / "audit-csv" / "audit_doors.csv").read_text().splitlines()
    assert table[0] == "door,state,evidence,how_to_shut,contribution,left_when_shut"
    assert len(table) == 1 + len(found["doors"])
    assert len((tmp_path / "audit-csv" / "audit_steps.csv").read_text().splitlines()) == 6
    assert run(["plot", str(out)]) == 0  # panels that say why they are empty


def test_the_file_of_an_audit_is_a_strangers_too(tmp_path):
    out = tmp_path / "audit.h5"
    assert run(["audit", "test_audit_command:clean", "--steps", "2", "--out", str(out)]) == 0
    with h5py.File(out, "r+") as file:
        del file["audit/displacement"]
        file["audit/displacement"] = np.zeros(7)
    with pytest.raises(RunFileError, match="displacement"):
        open_run(out)


@pytest.mark.parametrize("figure", ["parting.bmp", "parting"])
def test_a_figure_that_cannot_be_drawn_is_refused_before_the_training(figure, capsys):
    assert run(["audit", "test_audit_command:broken", "--figure", figure]) == 2
    assert "no figure format" in capsys.readouterr().err


def test_clean_is_said_and_passes_the_gate(capsys):
    assert run(["audit", "test_audit_command:clean", "--steps", "4", "--fail-on", "numeric"]) == 0
    assert "Clean: bitwise equal for 4 steps." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "write MODULE:FUNCTION"),
        (["test_audit_command:broken"], "no data here"),
        (["test_audit_command:missing"], "missing"),
        (["test_audit_command:clean", "--imgsz", "64"], "--imgsz is for the bundled one"),
        (["test_audit_command:clean", "--fail-on", "bad"], "--fail-on"),
        (["test_audit_command:clean", "--task", "seg"], "no such task"),
    ],
)
def test_wrong_usage(arguments, said, capsys):
    assert run(["audit", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_section_of_a_report_names_door_and_remedy():
    text = audit_section(audit(mean_and_dropout, "cls", AuditOptions(steps=4)))
    assert text.startswith("## Audit of cls")
    assert "| mean over tasks | open |" in text
    assert "sum the losses" in text


def test_the_figure_shows_equal_steps_at_its_edge():
    figure, table = divergence.make({"as it is": [0.0, 1e-3, 1e-2]}, "what was found")
    (ax,) = figure.axes
    assert ax.get_xlabel() == "steps"
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([1e-4, 1e-3, 1e-2])
    figure.canvas.draw()
    assert not [label.get_text() for label in ax.get_yticklabels() if "$" in label.get_text()]
    assert [text.get_text() for text in ax.texts] == ["lower edge: bitwise equal"]
    assert table.values["displacement"].tolist() == [0.0, 1e-3, 1e-2]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    assert run(["data", "make", str(folder), "--n", "30", "--seed", "3"]) == 0
    return ["audit", "--data", str(folder / "data.yaml"), "--imgsz", "32", "--batch-size", "4", "--json"]


def test_joint_training_at_weight_0_is_clean(bundled, capsys):
    capsys.readouterr()
    assert run([*bundled, "--steps", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clean"]
    assert found["steps"] == 3


def test_gradnorm_raises_the_detectors_weight_where_the_classifiers_is_0(bundled):
    settings = resolve({"trainer": "gradnorm", "data": bundled[2], "imgsz": 32, "batch_size": 4})
    make = audited.experiment_factory(settings, load_data(settings.data, imgsz=32, seed=0))
    where = setting(make, "cls", 2)
    assert where.run(0.0).kind == "material"
    name, said = attribution.name_weights_door(where, 0.0)
    assert name == "renormalised weights"
    assert "1.999 at weight 0, 1 at weight 1" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "opened"),
    [
        (["--trainer", "gradnorm"], ["renormalised weights"]),
        (["--clip-norm", "0.1", "--weight", "0.01", "--imgsz", "64"], ["clipping", "direct"]),
    ],
    ids=["gradnorm", "clipping"],
)
def test_the_bundled_trainers_doors(bundled, flags, opened, capsys):
    capsys.readouterr()
    assert run([*bundled, "--steps", "5", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [door["door"] for door in found["doors"] if door["state"] == "open"] == opened


@pytest.mark.parametrize("trainer", training.every_trainer())
def test_every_trainer_is_audited_or_refused_with_a_reason(trainer, bundled):
    values = {"data": bundled[2], "imgsz": 32, "batch_size": 4}
    if trainer in audited.NOT_AUDITABLE:
        with pytest.raises(UsageError, match=f"--trainer {trainer}: .*weight 0"):
            audited.check_auditable(trainer)
        return
    settings = resolve(
        {"trainer": trainer, **values} | ({"double": ("model.9.cv1.conv",)} if trainer == "split" else {})
    )
    try:
        balancer.find_balancer(trainer).require(settings)
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    make = audited.experiment_factory(settings, load_data(settings.data, imgsz=32, seed=0))
    outcome = setting(make, "cls", 1).run(1.0)
    # What sends no gradient of the classifier into the detector's layers changes nothing even at weight 1.
    assert (outcome.kind == "clean") == (trainer in ("dual", "detach"))


def test_a_trainer_that_begins_above_0_says_with_which_flag(bundled, capsys):
    assert run([*bundled, "--steps", "1", "--trainer", "uncertainty"]) == 2
    assert "--weight 1" in capsys.readouterr().err


def test_every_flag_of_record_that_changes_the_training_is_one_of_the_audit():
    flags, own = (set(inspect.signature(one).parameters) for one in (record, audit_command))
    of_the_file = {"arm", "list_trainers", "name", "overwrite", "plan", "project", "resume"}
    of_measuring = {"bn_batches", "every", "group_by", "keep_going", "updates"}  # the training is the same bit for bit
    of_measuring |= {name for name in flags if name.startswith(("ledger", "probe_"))}
    assert flags - own == of_the_file | of_measuring | {"processes"}  # the audit's arms have one process


class Untraced:
    def losses(self, losses):
        return losses


@pytest.mark.parametrize("options", [{}, {"precision": "16-mixed", "clip_norm": 0.5}, {"micro_batches": 2}], ids=str)
def test_what_is_audited_is_the_training_that_is_recorded(options):
    """Bit for bit, with a scaler and in micro-batches too."""
    recorded = training.run(training.make("joint", **options), 2)
    settings = resolve({"trainer": "joint", "imgsz": 64, "batch_size": 8, **options})
    experiment = audited.experiment_factory(settings, training.phantoms())()
    batches = experiment.batches(("det", "cls"))
    for batch in itertools.islice(batches, 2):
        experiment.step(Untraced(), batch, experiment.weights)
    expected = recorded.model.state_dict()
    assert (experiment.scaler is not None) == ("precision" in options)
    for name, value in experiment.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(v, expected[n]) for n, v in training.make("joint").model.state_dict().items())


def test_flags_of_record_reach_the_audited_training(bundled, monkeypatch):
    seen = []
    monkeypatch.setattr(
        audited, "experiment_factory", lambda settings, *_: seen.append(settings) or (_ for _ in ()).throw(Stop)
    )
    flags = ["--epochs", "3", "--lrf", "0.5", "--task-weights", "det=1,cls=0.25", "--gradnorm-momentum", "0.5"]
    flags += ["--micro-batches", "2"]
    flags += ["--max-weight", "4", "--weight-sum", "3", "--gradnorm-layer", "model.9.cv2", "--preset", "report"]
    with pytest.raises(Stop):
        run([*bundled, *flags])
    (settings,) = seen
    assert (settings.trainer, settings.epochs, settings.lrf, settings.gradnorm_momentum) == ("gradnorm", 3, 0.5, 0.5)
    assert (settings.task_weights, settings.max_weight, settings.weight_sum) == ((1.0, 0.25), 4, 3)
    assert settings.gradnorm_layer == "model.9.cv2"
    assert settings.keep_going
    assert settings.micro_batches == 2


class Stop(Exception):  # noqa: N818 - no error
    pass
