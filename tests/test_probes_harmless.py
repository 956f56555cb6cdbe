"""A training with a probe ends in every bit as one without; and nothing is left behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import subprocess
import sys
import warnings
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probes import make
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, Collector

import gradprobe
from gradprobe.errors import ProbeError
from gradprobe.probes import GradientProbe

RECIPES = ("plain", "accumulation", "clipping", "autocast", "scaler", "overflowing scaler", "float16 and scaler")


@dataclass
class Loop:
    """A training loop as people write them; ``probe`` is the only difference."""

    name: str
    recipe: str = "plain"
    use: str | None = None
    steps: int = 4
    tasks: int = 2
    seed: int = 0
    weights: tuple[float, ...] = (1.0, 0.3, 2.0)
    optimizer: type = torch.optim.Adam

    def run(self, **options):
        """Everything that a training leaves behind, by name."""
        case = make(self.name, torch.float32, self.tasks, self.seed)
        torch.manual_seed(self.seed + 1)
        random.seed(self.seed)
        np.random.seed(self.seed)
        optimizer = self.optimizer(case.model.parameters(), lr=1e-2)
        scaler = self._scaler()
        names = [f"t{i}" for i in range(self.tasks)]
        sink, grads = Collector(), []
        probe = None
        if self.use is not None:
            probe = GradientProbe(case.model, names, [sink], optimizer=optimizer, scaler=scaler, **options)
        micro = 3 if self.recipe == "accumulation" else 1
        for call in range(self.steps * micro):
            with self._autocast():
                losses = case.losses(call)
            self._backward(probe, losses, dict(zip(names, self.weights, strict=False)), scaler)
            grads.append([None if p.grad is None else p.grad.clone() for p in case.model.parameters()])
            if call % micro == micro - 1:
                self._update(case.model, optimizer, scaler)
        if probe is not None:
            probe.close()
            assert sink.rows
        return {
            "model": case.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "torch": torch.get_rng_state(),
            "random": random.getstate(),
            "numpy": np.random.get_state(),
            "grads": grads,
        }, sink

    def _scaler(self):
        if "scaler" not in self.recipe:
            return None
        return torch.amp.GradScaler("cpu", init_scale=2.0**127 if "overflowing" in self.recipe else 2.0**16)

    def _autocast(self):
        kinds = {"autocast": torch.bfloat16, "float16 and scaler": torch.float16}
        if self.recipe not in kinds or self.name == "recurrent":  # a CPU has no LSTM in half types
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=kinds[self.recipe])

    def _backward(self, probe, losses, weights, scaler):
        if probe is not None and self.use == "backward":
            probe.backward(losses, weights)
            return
        if probe is not None:
            probe.record(losses, weights)
        total = sum(weights[t] * losses[t] for t in losses)
        (total if scaler is None else scaler.scale(total)).backward()

    def _update(self, model, optimizer, scaler):
        if self.recipe == "clipping":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


def assert_same(one, other, where=""):
    """Equal in every bit, through dicts, lists and tensors; NaN equals NaN."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)), where
        assert torch.equal(one.isnan(), other.isnan()), where
    elif isinstance(one, np.ndarray):
        assert (one == other).all(), where
    else:
        assert one == other, where


@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", list(ZOO))
def test_a_training_with_a_probe_ends_in_every_bit_as_one_without(name, recipe, use):
    bare, _ = Loop(name, recipe).run()
    probed, sink = Loop(name, recipe, use).run(every=1)
    assert_same(bare, probed)
    assert [row.step for row in sink.rows] == list(range(len(sink.rows)))


class DrawsAgain(nn.Module):
    """A checkpoint that draws new random numbers in every backward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5))
        self.heads = nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 2)])

    def losses(self):
        z = checkpoint(self.second, self.first(torch.randn(8, 6)), use_reentrant=False, preserve_rng_state=False)
        return {f"t{i}": head(z).pow(2).mean() for i, head in enumerate(self.heads)}


@pytest.mark.parametrize("options", [{}, {"memory": "low"}, {"level": "both"}], ids=str)
@pytest.mark.parametrize("use", ["record", "backward"])
def test_random_numbers_drawn_in_a_backward_are_drawn_as_without_a_probe(use, options):
    def trained(use):
        torch.manual_seed(0)
        model, sink, joint = DrawsAgain(), Collector(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = GradientProbe(model, ("t0", "t1"), [sink], every=1, **options) if use else None
        for _ in range(3):
            losses = model.losses()
            if use == "backward":
                probe.backward(losses)
            else:
                if use == "record":
                    probe.record(losses)
                sum(losses.values()).backward()
            joint.append(sum(float(p.grad.pow(2).sum()) for p in model.second.parameters()))
            optimizer.step()
            optimizer.zero_grad()
        return {"model": model.state_dict(), "random": torch.get_rng_state()}, sink, joint

    bare, _, _ = trained(None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gradprobe: step 1: a gradient derived")  # other numbers, another row
        probed, sink, joint = trained(use)
    assert_same(bare, probed)
    if use == "record":  # every pass drew what the training's own then drew
        second = sink.header.layers.index("second.0")
        np.testing.assert_allclose([row.gram[second].sum() for row in sink.rows], joint, rtol=1e-5)


@pytest.mark.parametrize("options", [{"memory": "low"}, {"level": "both"}, {"level": "features"}], ids=str)
@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("name", list(ZOO))
def test_however_it_measures(name, use, options):
    bare, _ = Loop(name).run()
    probed, _ = Loop(name, use=use).run(every=1, **options)
    assert_same(bare, probed)


def anything_goes(name, recipe, use, seed, weights, optimizer, options):
    if name == "nested":
        weights = weights[:2]  # has two tasks, whatever it is asked for
    loop = {"seed": seed, "tasks": len(weights), "weights": tuple(weights), "optimizer": optimizer}
    bare, _ = Loop(name, recipe, **loop).run()
    probed, _ = Loop(name, recipe, use, **loop).run(**options)
    assert_same(bare, probed)


EVERYTHING = {
    "name": st.sampled_from(list(ZOO)),
    "recipe": st.sampled_from(RECIPES),
    "use": st.sampled_from(["record", "backward"]),
    "seed": st.integers(0, 99),
    "weights": st.lists(st.sampled_from([1e-6, 0.0, 0.3, 1.0, 7.0, 1e6, -1.0]), min_size=2, max_size=4),
    "optimizer": st.sampled_from([torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop]),
    "options": st.one_of(
        st.fixed_dictionaries(
            {"every": st.integers(1, 3), "level": st.sampled_from(["parameters", "features", "both"])},
            optional={"memory": st.just("low")},
        ),
        st.fixed_dictionaries({"budget": st.sampled_from([0.05, 0.9])}),
    ),
}


@given(**EVERYTHING)
@settings(max_examples=25, deadline=None)
def test_whatever_the_loop_and_the_probe_are(**drawn):
    anything_goes(**drawn)


@pytest.mark.slow
@given(**EVERYTHING)
@settings(max_examples=3000, deadline=None)
def test_whatever_they_are_for_long(**drawn):
    anything_goes(**drawn)


def test_gradients_of_a_scaled_loss_are_stored_unscaled():
    plain, scaled = Collector(), Collector()
    for sink, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu"))):
        case = make("mlp")
        with GradientProbe(case.model, ("t0", "t1"), [sink], every=1, scaler=scaler, level="both") as probe:
            for step in range(3):
                probe.backward(case.losses(step), {"t0": 1.0, "t1": 0.3})
            probe.record(case.losses(3))
    for one, other in zip(plain.rows, scaled.rows, strict=True):
        np.testing.assert_allclose(one.gram, other.gram, rtol=1e-12)
        np.testing.assert_array_equal(one.loss, other.loss)
    for one, other in zip(plain.feature_rows, scaled.feature_rows, strict=True):
        np.testing.assert_allclose(one.gram, other.gram, rtol=1e-12)


def test_gradients_too_small_for_float16_are_measured_scaled():
    """2^-30 is zero in float16; times 2^16 it is not."""
    layer, sink = torch.nn.Linear(4, 4).half(), Collector()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with GradientProbe(layer, ("t0", "t1"), [sink], every=1, scaler=scaler) as probe:
        z = layer(torch.full((1, 4), 2.0**-6).half()).float()
        probe.backward({"t0": z.sum() * 2.0**-30, "t1": z.pow(2).sum() * 2.0**-30})
    norms = np.sqrt(np.einsum("lii->i", sink.rows[0].gram))
    assert norms[0] == pytest.approx(2.0**-30 * np.sqrt(4 + 16 * 2.0**-12), rel=1e-3)
    assert norms[1] > 0


def hooks_of(model):
    held = [p._backward_hooks for p in model.parameters()]
    held += [p._post_accumulate_grad_hooks for p in model.parameters()]
    for m in model.modules():
        held += [m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks]
    return [h for h in held if h]


def spoilt(*_):
    raise RuntimeError("the user's own")


@pytest.mark.parametrize("where", ["nowhere", "in the loop", "in the backward", "when measuring"])
@pytest.mark.parametrize("level", ["parameters", "both"])
@pytest.mark.parametrize("memory", ["normal", "low"])
def test_nothing_is_left_behind(where, level, memory, monkeypatch):
    case = make("mlp")
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    outcome = contextlib.nullcontext() if where == "nowhere" else pytest.raises(RuntimeError, match="own")
    if where == "when measuring":
        outcome = pytest.warns(RuntimeWarning, match="measuring failed")
    with (
        outcome,
        GradientProbe(
            case.model, ("t0", "t1"), [Collector()], every=1, optimizer=optimizer, level=level, memory=memory
        ) as probe,
    ):
        for step in range(4):
            losses = case.losses(step)
            if step == 3 and where == "when measuring":
                monkeypatch.setattr("gradprobe.probes.gramian.GramianSum.add", spoilt)
            if step == 3 and where == "in the backward":
                own = case.model.trunk[0].weight.register_post_accumulate_grad_hook(spoilt)
            probe.backward(losses)
            optimizer.step()
            if step == 3 and where == "in the loop":
                spoilt()
    if where == "in the backward":
        own.remove()
    alive = ("tasks", "level", "optimizer", "epoch")  # beyond the probe, or no objects of their own
    parts = {k: v for k, v in vars(probe._recorder).items() if k not in alive and v is not None and v is not False}
    references = [weakref.ref(x) for x in (probe, *parts.values(), losses["t0"])]
    del probe, parts, losses, outcome
    gc.collect()
    assert [r() for r in references if r() is not None] == []
    assert hooks_of(case.model) == []
    assert not optimizer._optimizer_step_post_hooks
    GradientProbe(case.model, ("t0", "t1")).close()


def test_a_model_is_let_go_of_with_its_probe_closed():
    case = make("mlp")
    probe = GradientProbe(case.model, ("t0", "t1"), every=1)
    probe.backward(case.losses(0))
    probe.close()
    model = weakref.ref(case.model)
    del case, probe
    gc.collect()
    assert model() is None


def test_a_probe_that_is_lost_completes_its_file_and_frees_the_optimizer(tmp_path):
    case = make("mlp")
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    probe = gradprobe.attach(case.model, ("t0", "t1"), tmp_path / "run.h5", every=1, optimizer=optimizer)
    probe.backward(case.losses(0))
    del probe
    gc.collect()
    assert not optimizer._optimizer_step_post_hooks
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run.end == "not closed"
        assert len(run) == 1
    GradientProbe(case.model, ("t0", "t1")).close()


UNCLOSED = """
import sys, torch
from torch import nn
import gradprobe
model = nn.Linear(2, 2)
probe = gradprobe.attach(model, ("a", "b"), sys.argv[1], every=1)
z = model(torch.ones(1, 2))
probe.backward({"a": z.sum(), "b": z.pow(2).sum()})
"""


def test_a_script_that_ends_without_closing_completes_its_file(tmp_path):
    path = tmp_path / "run.h5"
    done = subprocess.run([sys.executable, "-c", UNCLOSED, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with gradprobe.open_run(path) as run:
        assert (run.end, len(run)) == ("not closed", 1)
    assert not path.with_name("run.h5.parts").exists()


CELL = "probe = attach(model, ('t0', 't1'), path, every=1, overwrite=True)\nprobe.backward(losses(0))"


def test_a_notebook_cell_that_is_run_again_replaces_its_probe(tmp_path):
    case = make("mlp")
    path = tmp_path / "run.h5"
    cell = {"attach": gradprobe.attach, "model": case.model, "losses": case.losses, "path": path}
    for _ in range(3):
        exec(compile(CELL, "<cell>", "exec"), cell)
    first = cell["probe"]
    exec(compile(CELL, "<cell>", "exec"), cell)
    assert first is not cell["probe"]
    cell["probe"].close()
    with gradprobe.open_run(path) as run:
        assert len(run) == 1


def test_another_variable_gets_no_second_probe_and_is_told_how(tmp_path):
    case = make("mlp")
    cell = {"attach": gradprobe.attach, "GradientProbe": GradientProbe, "model": case.model}
    exec("first = attach(model, ('t0', 't1'))", cell)
    for code in (
        "second = attach(model, ('t0', 't1'))",
        "GradientProbe(model, ('t0', 't1'))",
        "probes = [attach(model, ('t0', 't1'))]",
    ):
        with pytest.raises(ProbeError, match=r"has a probe already.*probe\.close\(\).*variable that holds the old one"):
            exec(code, cell)
    exec("first = GradientProbe(model, ('t0', 't1'))", cell)
    cell["first"].close()


def test_in_a_function_the_variable_counts_too():
    case = make("mlp")
    for _ in range(2):
        probe = GradientProbe(case.model, ("t0", "t1"))
    other = copy.copy(probe)  # not the one that is registered
    with pytest.raises(ProbeError, match="has a probe already"):
        other = GradientProbe(case.model, ("t0", "t1"))
    assert other is not probe
    probe.close()
