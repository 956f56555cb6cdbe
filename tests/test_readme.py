"""The README is true: its Python runs, its commands and flags exist, its table is the file's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from gradprobe.cli.app import app
from gradprobe.runfile import schema

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language=""):
    every = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [code for kind, code in every if kind == language]


def commands():
    text = "\n".join(block.replace("\\\n", " ") for block in blocks())
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line for line in lines if line and Path(line[0]).name == "gradprobe"]


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("('trunk',)")


@pytest.mark.parametrize("words", commands(), ids=lambda w: " ".join(w[1:4]))
def test_every_command_and_flag_exists(words):
    import typer

    command = typer.main.get_command(app)
    while words[1:] and not words[1].startswith("-") and hasattr(command, "commands"):
        command, words = command.commands[words[1]], words[1:]
    known = {name for parameter in command.params for name in parameter.opts}
    if command.context_settings.get("ignore_unknown_options"):  # they are handed on to `record`
        known |= {
            name for parameter in typer.main.get_command(app).commands["record"].params for name in parameter.opts
        }
    assert {word for word in words if word.startswith("--")} <= known


def test_there_are_commands_to_look_at():
    assert len(commands()) >= 8


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_dataset_named_is_in_the_schema_and_the_other_way_round():
    page = (ROOT / "docs/run-file.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| dataset \|.*?\n\n", page, re.DOTALL | re.MULTILINE)[0]  # at a glance
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line)))
    known = {field.name for field in (*schema.ROWS.fields, *schema.HEADER_FIELDS)} | {
        "layer",
        "task",
        "pair",
    }
    assert named == known


def test_the_pictures_are_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).stat().st_size > 10_000
