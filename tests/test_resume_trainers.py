"""A training that is stopped and gone on with equals one in one go, number for number, under every trainer."""

from __future__ import annotations

import numpy as np
import pytest

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.rows import TABLES
from gradprobe.trainers import loop, registry

DIAL = "dial:size=64"
STATEFUL = ("gradnorm", "uncertainty", "dwa", "rlw", "gradvac", "dual")
"""The others are tried by ``make soak``."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of GradNorm, for the trainers that take something from one."""
    out = tmp_path_factory.mktemp("source") / "gradnorm.h5"
    assert record("gradnorm", out) == 0
    return out


def record(trainer, out, *more):
    words = ["record", "--data", DIAL, "--trainer", trainer, "--epochs", "3", "--every", "2", "--out", str(out), *more]
    return command(words)


def options(trainer, source):
    if trainer == "single":
        return ["--task", "a"]
    more = {"gradnorm-static": ["--from", str(source)], "split": ["--from", str(source), "--top-k", "1"]}
    return more.get(trainer, [])


def numbers(path):
    with open_run(path) as run:
        found = {f"{t.name}.{name}": v for t in TABLES for name, v in run.table(t.name).items()}
        found |= {f"epochs.{name}": values for name, values in run.epochs.items()}
        found["statuses"] = np.array([run.status_names[code] for code in run["status"]])
        return {name: v for name, v in found.items() if not name.endswith((".time", ".overhead", ".status"))}


@pytest.mark.parametrize(
    "trainer", [pytest.param(t, marks=() if t in STATEFUL else pytest.mark.slow) for t in registry.TRAINERS]
)
def test_a_resumed_run_equals_an_uninterrupted_one(trainer, source, tmp_path, monkeypatch):
    own = options(trainer, source)
    assert record(trainer, tmp_path / "whole.h5", *own) == 0
    real, steps = loop.train_step, []

    def stop_in_the_second_epoch(training, batch):
        steps.append(1)
        if len(steps) == len(training.train_loader) + 2:
            raise KeyboardInterrupt
        real(training, batch)

    with monkeypatch.context() as stopped:
        stopped.setattr(loop, "train_step", stop_in_the_second_epoch)
        assert record(trainer, tmp_path / "part.h5", *own) == 130
    assert command(["record", "--resume", str(tmp_path / "part.h5")]) == 0
    whole, part = numbers(tmp_path / "whole.h5"), numbers(tmp_path / "part.h5")
    assert whole.keys() == part.keys()
    assert len(whole["rows.step"]) > 4
    for name, values in whole.items():
        np.testing.assert_array_equal(values, part[name], err_msg=f"{trainer}: {name}")
