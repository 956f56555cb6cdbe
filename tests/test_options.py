"""The options of the commands: which there are, what they take, and that one table says so."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import gradprobe
from gradprobe.cli.app import app, run
from gradprobe.errors import UsageError
from gradprobe.trainers.flags import PANELS, options
from gradprobe.trainers.registry import unused_options
from gradprobe.trainers.settings import Settings, resolve

FLAGS = Path(__file__).parent / "fixtures" / "flags.tsv"
"""Command, flags, name, type, default, whether required, a switch, many, and metavar; all that 0.1.0 began with."""


def described(command: str) -> list[str]:
    """One line for each parameter of a command."""
    lines = []
    for each in typer.main.get_command(app).commands[command].params:
        facts = (
            command,
            "/".join([*each.opts, *each.secondary_opts]),
            each.name,
            each.type.name,
            repr(each.default),
            each.required,
            getattr(each, "is_flag", "-"),
            getattr(each, "multiple", "-"),
            each.metavar or "-",
        )
        lines.append("\t".join(map(str, facts)))
    return lines


@pytest.mark.parametrize("command", ["record", "audit", "study"])
def test_every_flag_of_before_is_there_and_takes_the_same(command):
    before = [line for line in FLAGS.read_text(encoding="utf-8").splitlines() if line.startswith(f"{command}\t")]
    assert len(before) > 10
    assert set(before) <= set(described(command))


# ---- one table


@pytest.mark.parametrize("command", ["record", "audit"])
def test_the_help_is_in_panels_the_common_ones_first_and_fits_80_columns(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) < 80
    heads = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert [head for head in heads if head in PANELS] == [panel for panel in PANELS if panel in heads]
    common = text.partition("Common:\n")[2].partition("\n\n")[0]
    assert 8 <= sum(line.startswith("  --") for line in common.splitlines()) <= 13
    for name in ("--trainer", "--data", "--epochs", "--help"):
        assert f"  {name} " in common


NUMBERS = {each.name: known for each, known in options(Settings) if type(each.default) in (int, float)}


@pytest.mark.parametrize("name", NUMBERS)
def test_no_setting_takes_what_is_no_number(name):
    known = NUMBERS[name]
    for value, words in (
        (math.nan, known.range),
        (-1, known.range),
        *(() if known.endless else ((math.inf, "finite"),)),
    ):
        with pytest.raises(UsageError, match=re.escape(f"--{name.replace('_', '-')} {value}: must be {words}")):
            resolve({name: value})


@pytest.mark.parametrize(
    "words",
    [
        ["--lr", "-1"],
        ["--optimizer", "adam"],
        ["--group-by", "("],
        ["--nonsense"],
        ["--from", "other.h5"],
        ["--seed", "0"],
    ],
)
def test_a_study_refuses_what_record_would_before_it_writes(words, tmp_path, capsys):
    study = ["study", "--trainers", "joint", "--out", str(tmp_path / "study"), "--data", "dial:size=32"]
    assert run([*study, *words]) == 2
    assert words[0] in capsys.readouterr().err
    assert run([*study, "--arm", " ".join(["other=joint", *words])]) == 2
    assert words[0] in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


DIAL = ["--data", "dial:size=32", "--epochs", "1"]


def test_a_flag_that_the_trainer_does_not_read_is_told(tmp_path, capsys):
    out = tmp_path / "run.h5"
    assert run(["record", "--trainer", "joint", *DIAL, "--gradnorm-alpha", "3", "--lr", "0.01", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "--gradnorm-alpha changes nothing here: joint does not use it; gradnorm would." in told.out + told.err
    assert "--lr changes nothing" not in told.out + told.err
    assert unused_options("gradnorm", ["gradnorm_alpha", "lr"]) == []
    assert unused_options("my_module:Mine", ["gradnorm_alpha"]) == []
    assert run(["audit", "--trainer", "joint", *DIAL[:2], "--task", "b", "--steps", "2", "--cagrad-c", "0.1"]) == 0
    assert "--cagrad-c changes nothing here" in capsys.readouterr().err


TILTED = '''
"""A trainer with a flag of its own."""

from gradprobe.trainers.balancer import Balancer


class Tilted(Balancer):
    def __init__(self, tasks, tilt):
        self.tilted = {task: tilt if place else 1.0 for place, task in enumerate(tasks)}

    def weights(self):
        return self.tilted

    def update(self, losses):
        pass

    @classmethod
    def create(cls, model, setup):
        return cls(setup.tasks, setup.settings.tilt)
'''


def test_a_trainer_with_a_flag_touches_two_files(tmp_path):
    package = shutil.copytree(Path(gradprobe.__file__).parent, tmp_path / "gradprobe")
    (package / "trainers/tilted.py").write_text(TILTED)
    registry = package / "trainers/registry.py"
    text = registry.read_text()
    for where, more in (
        (
            '    "single": Trainer(\n',
            '    "tilted": Trainer("the second task tilted", "none", "", _HERE + "tilted:Tilted"),\n',
        ),
        (
            "    task: str = option(\n",
            '    tilt: float = option(1.0, "tilted: its weight.", above=0, trainers=("tilted",))\n',
        ),
    ):
        assert where in text
        text = text.replace(where, more + where)
    registry.write_text(text)

    def command(*words):
        return subprocess.run(
            [sys.executable, package / "__main__.py", "record", *words],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    trained = command("--trainer", "tilted", "--tilt", "2", *DIAL, "--out", "run.h5")
    assert trained.returncode == 0, trained.stderr
    with gradprobe.open_run(tmp_path / "run.h5") as recorded:
        assert recorded.provenance["settings.tilt"] == 2.0
        assert recorded["weight"][-1].tolist() == [1.0, 2.0]
    section = command("--help").stdout.partition("Other trainers:\n")[2].partition("\n\n")[0]
    assert "  --tilt FLOAT               tilted: its weight. [default: 1.0]" in section
    assert "--tilt 0.0: must be a positive number" in command("--trainer", "tilted", "--tilt", "0", *DIAL).stderr
    assert "tilted" in command("--list-trainers").stdout
