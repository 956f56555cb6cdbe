"""``gradprobe fork`` as a user runs it."""

from __future__ import annotations

import json
import re

import pytest
from forking import Training, adam

from gradprobe.cli.app import run
from gradprobe.forks import ForkOptions, fork, over_seeds

SHORT = ["--steps", "40", "--checkpoints", "2", "--horizon", "6"]


def make(seed=0):
    return Training({"a": 1.0, "b": 1.0}, adam, seed=seed).experiment()


def seedless():
    return make()


def clipped(seed=0):
    return Training({"a": 1.0, "b": 1.0}, adam, seed=seed, clip=0.1).experiment()


def without_infinities(text):
    return json.loads(text, parse_constant=pytest.fail)


def test_the_file_holds_what_python_finds(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "forks.json"
    words = ["fork", "test_fork_command:make", *SHORT, "--seeds", "2", "--seed", "5", "--arm", "low=a=1,b=0.1"]
    assert run([*words, "--controls", "--out", str(out)]) == 0
    found = without_infinities(out.read_text())
    options = ForkOptions(40, 2, 6, arms={"low": {"a": 1.0, "b": 0.1}}, controls=True)
    trainings = [fork(lambda seed=seed: make(seed), options) for seed in (5, 6)]
    assert [each["seed"] for each in found["trainings"]] == [5, 6]
    for mine, theirs in zip(found["trainings"], trainings, strict=True):
        assert mine["start"] == theirs.start.tolist()
        assert mine["branches"] == {name: losses.tolist() for name, losses in theirs.branches.items()}
        assert mine["same_twice"] == 0
    for mine, theirs in zip(found["pairs"], over_seeds(trainings), strict=True):
        assert (mine["task"], mine["by"], mine["undefined"]) == (theirs.task, theirs.by, theirs.undefined)
        assert mine["cost"] == theirs.cost.tolist()
        assert mine["lost"] == [None if value != value else value for value in theirs.lost.tolist()]
        assert mine["given_back"].keys() == {"low"}
    shown = capsys.readouterr().out
    assert "low gives back" in shown
    assert "times a plain one" in shown
    assert str(out) in shown.replace("\n", "")


def test_the_bundled_training(capsys):
    words = ["fork", "--data", "dial:angle=120,noise=0", "--optimizer", "SGD", "--lr", "0.001", "--weight-decay", "0"]
    assert run([*words, "--lrf", "1", "--momentum", "0.5", "--task", "b", "--seeds", "2", *SHORT]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"0\.458\d \(0\.458", shown), "minus the cosine, less what a's own head makes"


def test_one_seed_has_no_interval(capsys):
    assert run(["fork", "test_fork_command:seedless", "--seeds", "1", *SHORT]) == 0
    assert "1 training, 2 checkpoints" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["test_fork_command:seedless"], "takes no seed"),
        (["test_fork_command:seedless", "--seeds", "1", "--seed", "3"], "takes no seed"),
        (["test_fork_command:make", "--seeds", "0"], "--seeds 0: at least 1"),
        (["test_fork_command:make", "--lr", "1"], "makes its own training; --lr is for the bundled one"),
        (["test_fork_command:make", "--arm", "low"], "write a name and a weight"),
        (["test_fork_command:make", "--arm", "low=a=1,a=2"], "write a name and a weight"),
        (["test_fork_command:make", "--arm", "low=a=1"], "a weight of 0 or more for every task"),
        (["test_fork_command:make", "--arm", "low=a=1,b=1", "--arm", "low=a=1,b=0"], "'low' is given twice"),
        (["test_fork_command:make", "--arm", "without b=a=1,b=1"], "another name"),
        (["test_fork_command:make", "--task", "c"], "no such task"),
        (["test_fork_command:make", "--steps", "50"], "--steps 50: too few"),
        (["--trainer", "single"], "gradprobe audit"),
        (["test_fork_command:make", "--out", "."], "cannot be written here"),
    ],
)
def test_what_cannot_be_is_said(words, said, capsys):
    assert run(["fork", *words]) in (2, 3)
    assert said in capsys.readouterr().err


def test_clipping_is_refused(capsys):
    assert run(["fork", "test_fork_command:clipped", "--seeds", "1", *SHORT]) == 1
    assert "clipping" in capsys.readouterr().err
