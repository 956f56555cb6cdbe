"""The options of the commands: which there are, what they take, and that one table says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from gradprobe.cli.app import app

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
