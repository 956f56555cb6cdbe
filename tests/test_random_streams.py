"""The global random streams go on after a measurement as without one, the waiting normal of numpy included."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from gradprobe.probes.state import sow, state_kept, undisturbed, where_random_streams_are


def drawn():
    return [random.random(), *np.random.standard_normal(3), np.random.random(), float(torch.rand(()))]


def disturb(how):
    if how == "sow":
        sow(7)
    elif how == "draw":
        drawn()
    elif how == "waiting":
        np.random.standard_normal()


@pytest.mark.parametrize("how", ["nothing", "sow", "draw", "waiting"])
@pytest.mark.parametrize("normals", [0, 1, 2])
@pytest.mark.parametrize("keeper", [state_kept, undisturbed])
def test_they_go_on_from_where_they_were(keeper, normals, how):
    model = nn.Linear(2, 2)

    def streamed(measure):
        sow(3)
        np.random.standard_normal(normals)  # of an odd number one is waiting
        found = []
        for _ in range(3):
            if measure:
                with keeper(model):
                    disturb(how)
            found += drawn()
        return found

    assert streamed(measure=True) == streamed(measure=False)


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_buffers_that_a_forward_exchanges_are_put_back(training):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train(training)
    mean, values = model[1].running_mean, model[1].running_mean.clone()
    with undisturbed(model):
        model.train(not training)
        model[1].running_mean = torch.ones(2)
        model[1].running_mean.add_(1)
    assert model.training == model[0].training == model[1].training == training
    assert model[1].running_mean is mean
    assert torch.equal(mean, values)


def test_where_they_are_tells_of_every_draw():
    at = [where_random_streams_are()]
    for draw in (random.random, np.random.random, np.random.standard_normal, lambda: torch.rand(())):
        assert where_random_streams_are() == at[-1]
        draw()
        at.append(where_random_streams_are())
    assert len(set(at)) == 5
