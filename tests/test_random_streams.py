"""The global random streams go on after a measurement as without one, the waiting normal of numpy included."""

from __future__ import annotations

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from gradprobe.probes.state import sow, state_kept, undisturbed, walked_once, where_random_streams_are


def drawn():
    return [random.random(), *np.random.standard_normal(3), np.random.random(), float(torch.rand(()))]


def disturb(how):
    if how == "sow":
        sow(7)
    elif how == "draw":
        drawn()
    elif how == "waiting":
        np.random.standard_normal()
    elif how == "another generator":
        np.random.set_bit_generator(np.random.PCG64(5))


@pytest.fixture(autouse=True)
def streams():
    before = np.random.get_bit_generator(), np.random.get_state()
    yield
    np.random.set_bit_generator(before[0])
    np.random.set_state(before[1])


@pytest.mark.parametrize("within_a_row", [False, True])
@pytest.mark.parametrize("how", ["nothing", "sow", "draw", "waiting", "another generator"])
@pytest.mark.parametrize("normals", [0, 1, 2])
@pytest.mark.parametrize("keeper", [state_kept, undisturbed])
def test_they_go_on_from_where_they_were(keeper, normals, how, within_a_row):
    model = nn.Linear(2, 2)

    def streamed(measure):
        sow(3)
        np.random.standard_normal(normals)  # of an odd number one is waiting
        found = []
        with walked_once(model) if within_a_row else nullcontext():
            for _ in range(3):
                if measure:
                    with keeper(model):
                        disturb(how)
                if not within_a_row:
                    found += drawn()
        return found + drawn()

    assert streamed(measure=True) == streamed(measure=False)


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64])
def test_where_they_are_tells_of_every_draw(kind):
    np.random.set_bit_generator(kind(1))
    at = [where_random_streams_are()]
    for draw in (random.random, np.random.random, lambda: torch.rand(())):
        assert where_random_streams_are() == at[-1]
        draw()
        at.append(where_random_streams_are())
    assert len(set(map(str, at))) == 4
