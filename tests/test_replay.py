"""``gradprobe replay``: weights from the file are the live ones, and what they would have changed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import training
from run_factory import make_run

from gradprobe import measures, open_run
from gradprobe.cli.app import run as command
from gradprobe.cli.replay import replay_run
from gradprobe.plots.method_effects import draw
from gradprobe.runfile import RunWriter
from gradprobe.verdict.replayed import effect, medians_by_task

pytest.importorskip("torchjd")


def recorded(path, trainer, steps=5, **options):
    """A live run in a file."""
    training.run(training.make(trainer, seed=2, sinks=[RunWriter(path)], **options), steps)
    return path


@pytest.mark.parametrize(
    "method",
    [
        *("pcgrad", "upgrad", "gradnorm"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("cagrad", "mgda", "imtl", "aligned", "fairgrad")),
    ],
)
def test_replayed_weights_are_those_of_the_live_run_at_the_same_parameters(method, tmp_path):
    static = (1.0, 0.7)
    path = recorded(tmp_path / "live.h5", method, task_weights=static)
    with open_run(path) as run:
        (found,) = [r for r in replay_run(run, [method]) if r.method == method]
        live = run["weight"]
    np.testing.assert_allclose(found.weight, live, rtol=1e-5)
    assert np.abs(live - live[0]).max() > 1e-3  # they did move


def test_a_method_is_replayed_on_the_run_of_another(tmp_path):
    path = recorded(tmp_path / "joint.h5", "joint", steps=3)
    with open_run(path) as run:
        replayed = {r.method: r for r in replay_run(run, ["mgda", "gradnorm"])}
    np.testing.assert_allclose(replayed["mgda"].length, 1, rtol=1e-5)
    np.testing.assert_allclose(replayed["joint"].weight, replayed["recorded"].weight)


def test_progress_and_harm_by_hand():
    gram = np.array([[[4.0, -6.0], [-6.0, 9.0]], [[1.0, 0.5], [0.5, 1.0]]])
    static = np.ones(2)
    joint = effect("joint", gram, static, np.ones((2, 2)))
    np.testing.assert_allclose(joint.progress, [[-2 / 4, 3 / 9], [1.5, 1.5]])
    np.testing.assert_allclose(joint.harmed, [0.5, 0.0])
    np.testing.assert_allclose(joint.length, 1)
    other = effect("x", gram, static, np.array([[1.5, 1.0], [np.nan, np.nan]]))
    rows = medians_by_task([joint, other], ("a", "b"))
    assert [r["rows"] for r in rows] == [2, 2, 1, 1]
    assert rows[2]["progress"] == 0  # exactly balanced
    assert rows[2]["change"]["median"] == pytest.approx(0.5)
    assert other.harmed.tolist() == [0.0, 0.0]


def test_pcgrad_never_harms_where_the_joint_step_does(tmp_path):
    path = make_run(tmp_path / "run.h5", rows=60, provenance={"settings": {"task_weights": [1.0, 8.0]}})
    with open_run(path) as run:
        replayed = {r.method: r for r in replay_run(run, ["pcgrad"])}
        assert measures.conflict(run["shared_cosine"]).mean() > 0.05
    assert replayed["joint"].harmed.max() > 0.02
    assert replayed["pcgrad"].harmed.max() == 0  # two tasks: each projected off the other


def test_the_command_gives_a_table_a_figure_and_json(tmp_path, capsys):
    path = make_run(tmp_path / "run.h5", tasks=("det", "cls", "seg"))
    assert command(["replay", str(path), "--method", "pcgrad,mgda,gradnorm"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("recorded", "joint", "pcgrad", "mgda", "gradnorm", "seg", "run-replay.png"))
    assert "gradnorm saw the 60 measured rows alone" in shown
    assert (tmp_path / "run-replay.png").stat().st_size > 10_000
    lines = (tmp_path / "run-replay.csv").read_text().splitlines()
    assert lines[0] == "step,method,task,weight,progress"
    assert len(lines) == 1 + 5 * 60 * 3
    assert command(["replay", str(path), "--method", "mgda", "--no-figure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["method"], r["task"]) for r in found["methods"]][6:] == [("mgda", t) for t in ("det", "cls", "seg")]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gradvac", "record it live: --trainer gradvac"),
        ("pcgard", "unknown (there are: pcgrad"),
        (",", "--method names none (there are: pcgrad"),
    ],
)
def test_what_cannot_be_replayed_is_said(method, message, tmp_path, capsys):
    path = make_run(tmp_path / "run.h5")
    assert command(["replay", str(path), "--method", method]) == 2
    assert message in capsys.readouterr().err


def test_the_figure_shows_small_and_large_progress_beside_each_other(tmp_path):
    with open_run(make_run(tmp_path / "run.h5")) as run:
        figure, _ = draw(run, [effect("x", run.gram().sum(1), np.ones(2), np.tile([1.0, 100.0], (len(run), 1)))])
    left = figure.axes[0]
    at = {value: left.transData.transform((value, 0))[0] for value in (0, 1, 10, 1000)}
    assert at[1] - at[0] > 0.02 * (at[1000] - at[0])
    assert [left.xaxis.get_major_formatter()(value, 0) for value in (-10, 0, 1)] == ["-10", "0", "1"]


def test_a_run_with_nothing_shared_has_nothing_to_replay(tmp_path, capsys):
    path = make_run(tmp_path / "run.h5", layers=[])
    assert command(["replay", str(path)]) == 3
    assert "share no layer" in capsys.readouterr().err
