"""Recordings of the dial problem that were stopped, so small that a test can afford dozens."""

from __future__ import annotations

import shutil

import torch

from gradprobe.cli.app import run as command
from gradprobe.trainers import loop
from gradprobe.trainers.checkpoint import digest
from gradprobe.trainers.paths import Paths

DIAL = ["--data", "dial:size=32", "--every", "1"]


def stop_in_epoch(monkeypatch, epoch, out, *arguments):
    """Record into ``out``, up to the first step of an epoch (from 1)."""
    real = loop.train_step

    def step(training, batch):
        if training.epoch == epoch - 1:
            raise KeyboardInterrupt
        real(training, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        assert command(["record", *DIAL, "--epochs", "3", *map(str, arguments), "--out", str(out)]) == 130
    return out


def copied(run, folder):
    """The run with all its side files, in another folder."""
    folder.mkdir(exist_ok=True)
    for path in (run, *Paths(run).existing()):
        shutil.copy2(path, folder)
    return folder / run.name


def altered(run, change, *, seal=True):
    """Change the state in a run's checkpoint, or put another in its place; ``seal``: as if it had been saved so."""
    path = Paths(run).checkpoint
    state = torch.load(path, weights_only=True)
    new = change(state)
    state = state if new is None else new
    if seal and isinstance(state, dict) and "sum" in state:
        state["sum"] = digest(state)
    torch.save(state, path)


def contents(folder):
    """What every file holds, locks and folders left out."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
