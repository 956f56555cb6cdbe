"""How far one must read to follow a measured step: its files, and how often it goes from one to another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import Collector

import gradprobe
from gradprobe.probes import GradientProbe

ROOT = str(Path(gradprobe.__file__).parent)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.heads = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def losses(self):
        features = self.trunk(torch.randn(4, 8)).relu()
        return {task: head(features).square().mean() for task, head in zip(("a", "b"), self.heads, strict=True)}


def followed(call: str, with_optimizer: bool) -> tuple[set[str], int]:
    """The files of gradprobe in the sixth step, which no check falls on, and how many calls lead from one to another.

    Whatever runs in between (torch, a context manager's own machinery) is passed over; going on in a generator counts.
    """
    torch.manual_seed(0)
    model, files, changes = Toy(), set(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def trace(frame, event, _):
        nonlocal changes
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(ROOT):
            return
        above = frame.f_back
        while above is not None and not above.f_code.co_filename.startswith(ROOT):
            above = above.f_back
        changes += above is None or above.f_code.co_filename != file
        files.add(file)

    options = {"optimizer": optimizer} if with_optimizer else {}
    with GradientProbe(model, ("a", "b"), [Collector()], every=1, **options) as probe:
        for step in range(6):
            losses = model.losses()
            optimizer.zero_grad()
            if step == 5:
                sys.setprofile(trace)
            try:
                getattr(probe, call)(losses)
            finally:
                sys.setprofile(None)
            if call == "record":
                sum(losses.values()).backward()
            optimizer.step()
    return {Path(file).name for file in files}, changes


@pytest.mark.parametrize("with_optimizer", [False, True])
@pytest.mark.parametrize(("call", "most"), [("backward", 80), ("record", 56)])
def test_a_measured_step_goes_through_few_files(call, most, with_optimizer):
    files, changes = followed(call, with_optimizer)
    assert len(files) <= 14, sorted(files)
    assert changes <= most
