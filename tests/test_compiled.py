"""Compiled models: measured as the plain ones where buffers are kept; see also test_doctor.py."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch._functorch.config
from test_probes import make
from zoo import Collector, batch, naive_gramian

import gradprobe
from gradprobe.probes import GradientProbe
from gradprobe.probes.shared_layers import by_module, find_shared

WEIGHTS = {"t0": 1.0, "t1": 0.3}
COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def kept_buffers():
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


def losses(model, step):
    """As the zoo's, of a model that may be another than the case's."""
    a, b = model(batch(step, (8, 6), torch.float32))
    return {"t0": a.square().mean(), "t1": (b - 1).sin().sum(1).mean()}


def recorded(model, compiled, steps=4):
    """Rows of a training of ``compiled``, and the names of its layers."""
    optimizer, sink = torch.optim.SGD(model.parameters(), lr=0.1), Collector()
    with GradientProbe(compiled, ("t0", "t1"), [sink], every=1, optimizer=optimizer) as probe:
        for step in range(steps):
            probe.backward(losses(compiled, step), WEIGHTS)
            optimizer.step()
            optimizer.zero_grad()
        return sink.rows, probe.header.layers


@COMPILER
@pytest.mark.timeout(900)  # the first compilation on a machine takes a while
@pytest.mark.filterwarnings("ignore:.*TensorFloat32:UserWarning")
def test_a_trunk_that_inductor_compiled_is_measured_as_it_was_before():
    plain, compiled = make("mlp", torch.float32).model, make("mlp", torch.float32).model
    compiled.trunk = torch.compile(compiled.trunk, backend="inductor")
    expected, names = recorded(plain, plain)
    found, found_names = recorded(compiled, compiled)
    assert found_names == names == ("trunk.0", "trunk.2")
    for row, one in zip(found, expected, strict=True):
        assert row.status == one.status == "measured"
        np.testing.assert_allclose(row.gram, one.gram, rtol=1e-5, atol=1e-7 * np.nanmax(one.gram))


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_of_a_model_that_is_compiled_as_a_whole_only_what_is_shared_has_gradients(how):
    """Every parameter of the region looks reached by every task; a head's other task has an exact zero there."""
    plain, model = make("mlp", torch.float32).model, make("mlp", torch.float32).model
    compiled = torch.compile(model, backend="aot_eager") if how == "wrapped" else model
    if how == "in place":
        model.compile(backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="'heads.0', 'heads.1': shared by the graph alone"):
        rows, names = recorded(model, compiled, steps=1)
    first = losses(plain, 0)
    shared = find_shared(by_module(plain), first)
    assert names == ("trunk.0", "trunk.2", "heads.0", "heads.1")
    expected = naive_gramian(shared.layers, first)
    np.testing.assert_allclose(rows[0].gram[:2], expected, rtol=1e-5)
    np.testing.assert_array_equal(rows[0].gram[2:, 0, 1], 0)
    assert rows[0].gram[2, 1, 1] == rows[0].gram[3, 0, 0] == 0
    findings = gradprobe.doctor(compiled, losses(compiled, 1))
    assert "shows an exactly zero gradient there" in next(f.message for f in findings if f.check == "compiled")
