"""Several processes with a batch each are measured as one process with all of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import two_ranks
from two_ranks import BATCH, STEPS, TASKS, WAYS
from warm import Process
from zoo import Collector

import gradprobe
from gradprobe import measures
from gradprobe.processes import ManyProcesses, OneProcess
from gradprobe.rows import MEASURED, absent

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5}  # the file keeps float32
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    program = Path(two_ranks.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(program.parents[1]), str(program.parent)])}
    processes = [Process([folder, rank], env=environment, program=program) for rank in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def gramians(path):
    with gradprobe.open_run(path) as run:
        return run.gram(), {name: run[name] for name in ("loss", "batch_size", "status", "step")}, run.layers


@DTYPES
@pytest.mark.parametrize("way", list(WAYS))
def test_two_processes_record_what_one_does_with_all_samples(way, dtype, folder, tmp_path):
    two_ranks.recorded(two_ranks.make(dtype), tmp_path / "one.h5", lambda x: x, way, dtype)
    one, two = gramians(tmp_path / "one.h5"), gramians(folder / f"{way}-{dtype}.h5")
    assert one[2] == two[2] == ("first", "norm", "second")
    bound = np.sqrt(np.einsum("nlii,nljj->nlij", one[0], one[0]))
    np.testing.assert_array_equal(np.isnan(one[0]), np.isnan(two[0]))
    assert np.nanmax(np.abs(two[0] - one[0]) / bound) < TOLERANCE[dtype]
    np.testing.assert_allclose(two[1]["loss"], one[1]["loss"], rtol=TOLERANCE[dtype])
    assert two[1]["batch_size"].tolist() == [BATCH] * STEPS
    assert two[1]["status"].tolist() == [0] * STEPS


def test_micro_batches_of_two_processes_are_those_of_one(folder, tmp_path):
    """Each process's count, with their shares in the batch of all."""
    sizes = [size for one in two_ranks.SIZES for size in one]
    two_ranks.in_micro_batches(two_ranks.make(torch.float64), tmp_path / "one.h5", sizes, range(4))
    with gradprobe.open_run(tmp_path / "one.h5") as one, gradprobe.open_run(folder / "micro.h5") as two:
        for name in ("grad_norm", "cosine", "gram_noise", "loss"):
            np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-7)
        assert np.isfinite(two.gram_noise()[:, 0]).all()
        assert two["micro_batches"].tolist() == one["micro_batches"].tolist() == [4] * STEPS
        assert two["batch_size"].tolist() == one["batch_size"].tolist() == [BATCH] * STEPS


def test_each_process_draws_samples_of_its_own(folder):
    model = two_ranks.make(torch.float64)
    loader, data = two_ranks.drawn(model), batch_of_the_loader()
    expected = []
    for step in (0, 2, 4):
        micro = [two_ranks.losses(model, data[p]) for rank in range(2) for p in loader.indices(step, rank)]
        expected.append([np.mean([float(one[t].detach()) for one in micro]) for t in TASKS])
        found = [torch.autograd.grad(one["a"], model.first.weight)[0].flatten() for one in micro]
        expected[-1].append(float(sum(found).norm() / 4))
    with gradprobe.open_run(folder / "micro.h5") as run:
        table = run.probe_loader
        assert table["step"].tolist() == [0, 2, 4]
        assert table["micro_batches"].tolist() == [4] * 3
        assert table["batch_size"].tolist() == [16] * 3
        np.testing.assert_allclose(table["loss"], [e[:3] for e in expected], rtol=1e-6)
        assert (table["grad_norm"][:, 0, 0] >= [e[3] * (1 - 1e-6) for e in expected]).all()  # and a bias of the layer
        assert run.provenance["self_check"] == pytest.approx([1, -1], abs=1e-6)


def batch_of_the_loader():
    return two_ranks.batch(99, torch.float64)


def test_updates_of_two_processes_are_those_of_one(folder, tmp_path):
    two_ranks.updated(two_ranks.make(torch.float32), tmp_path / "one.h5", lambda x: x)
    with gradprobe.open_run(tmp_path / "one.h5") as one, gradprobe.open_run(folder / "updates.h5") as two:
        found = one.updates
        for name in ("share", "shared_cosine", "clip_scale", "clip_share", "clip_scale_without", "effect", "status"):
            scale = np.nanmax(np.abs(found[name]))
            np.testing.assert_allclose(two[f"update/{name}"], found[name], rtol=1e-4, atol=1e-4 * scale, err_msg=name)
        assert found["status"].tolist() == [0] * STEPS
        assert (found["clip_scale"] < 1).all()


@DTYPES
def test_features_of_two_processes_are_those_of_one(dtype, folder, tmp_path):
    two_ranks.recorded(two_ranks.make(dtype), tmp_path / "one.h5", lambda x: x, "both", dtype)
    with gradprobe.open_run(tmp_path / "one.h5") as one, gradprobe.open_run(folder / f"both-{dtype}.h5") as two:
        assert one.feature_names == two.feature_names
        grams = [measures.from_norms(r["features/grad_norm"], r["features/cosine"]) for r in (one, two)]
    assert np.isfinite(grams[0][:, :, :2, :2]).any()
    np.testing.assert_array_equal(np.isnan(grams[0]), np.isnan(grams[1]))
    bound = np.sqrt(np.einsum("nfii,nfjj->nfij", grams[0], grams[0]))
    assert np.nanmax(np.abs(grams[1] - grams[0]) / bound) < 2e-5


@pytest.mark.parametrize("way", list(WAYS))
def test_a_training_of_two_processes_ends_in_every_bit_as_one_without_a_probe(way, results):
    for rank in range(2):
        for name, bare in results[rank]["bare"].items():
            assert torch.equal(results[rank][way, torch.float32][name], bare), name


def test_the_first_process_alone_writes(results):
    assert [results[0]["sink", way, torch.float32] for way in WAYS] == [STEPS] * len(WAYS)
    assert [results[1]["sink", way, torch.float32] for way in WAYS] == [0] * len(WAYS)


def test_what_fails_in_one_process_is_missing_in_all_and_ends_nothing(folder, results):
    with gradprobe.open_run(folder / "failing.h5") as run:
        said = [run.status_names[code] for code in run["status"]]
        assert [i for i, words in enumerate(said) if words != "measured"] == [3, 4]
        assert "failed in another process" in said[3]
        assert np.isfinite(run["cosine"][5, 0]).any()
    for one, other in zip(results[0]["failing"], results[1]["failing"], strict=True):
        assert torch.equal(one, other)


def test_the_first_process_decides_which_steps_a_budget_allows(results):
    assert results[0]["budget"] == results[1]["budget"]
    assert 2 <= len(results[0]["budget"]) < 60


def test_a_task_may_go_another_way_or_be_absent_in_one_process(results):
    """Its gradient there is 0, as it is to the training, which averages over all processes."""
    sink = results[0]["different"]
    shared = [layer for layer, reach in zip(sink.header.layers, sink.header.reach, strict=True) if reach.sum() > 1]
    assert shared == ["first", "norm", "second"]
    model = two_ranks.make(torch.float64)
    loss = two_ranks.losses(model, two_ranks.batch(0, torch.float64))["c"]
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.first.parameters()])]).norm().item()
    for row in sink.rows[:2]:
        assert row.status == MEASURED
        assert measures.norm(row.gram)[0, 2] == pytest.approx(whole / 2, rel=1e-9)
    assert sink.rows[1].loss[2] == pytest.approx(loss.item())
    assert sink.rows[2].status == absent(["c"])
    assert np.isnan(measures.norm(sink.rows[2].gram)[:, 2]).all()


def test_processes_may_take_different_experts(results):
    sink = results[0]["experts"]
    torch.manual_seed(0)
    model = two_ranks.Experts()
    shared = [
        *model.first.parameters(),
        *model.norm.parameters(),
        *model.second.parameters(),
        *model.experts.parameters(),
    ]
    for step, row in enumerate(sink.rows):
        assert row.status == MEASURED
        parts = two_ranks.batch(step, torch.float64).chunk(2)
        both = [model.losses(x, two_ranks.expert_of(step, rank)) for rank, x in enumerate(parts)]
        found = [
            torch.autograd.grad(sum(one[task] for one in both) / 2, shared, allow_unused=True, retain_graph=True)
            for task in ("a", "b")
        ]
        one, two = (
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(own, shared, strict=True)])
            for own in found
        )
        norms, cosines = row.shared(None)
        assert norms[:2] == pytest.approx([one.norm().item(), two.norm().item()], rel=1e-9)
        assert cosines[0] == pytest.approx((one @ two / one.norm() / two.norm()).item(), abs=1e-9)


@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("flags", two_ranks.FLAGS, ids=lambda flags: next(iter(flags)))
def test_what_ddp_makes_of_the_graph_changes_neither_training_nor_numbers(flags, use, results):
    name, *_ = flags
    (bare, _), (probed, sink) = results[0][name, use]
    assert all(torch.equal(p, q) for p, q in zip(bare, probed, strict=True))
    plain = Collector()
    with gradprobe.attach(model := two_ranks.make(torch.float64), TASKS, every=1, sinks=[plain]) as probe:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(STEPS):
            probe.backward(two_ranks.losses(model, two_ranks.batch(step, torch.float64)), two_ranks.WEIGHTS)
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(plain.rows, sink.rows, strict=True):
        assert two.status == MEASURED
        for found, expected in zip(two.shared(None), one.shared(None), strict=True):
            assert found == pytest.approx(expected, rel=1e-7)


def test_gradient_surgery_of_two_processes_is_that_of_one_with_all_samples(results):
    pytest.importorskip("torchjd")
    weights, parameters = two_ranks.operated(two_ranks.make(torch.float64), lambda x: x, torch.float64)
    assert np.ptp(weights, axis=0).min() > 1e-3
    for rank in range(2):
        np.testing.assert_allclose(results[rank]["surgery"][0], weights, rtol=1e-9)
        for found, expected in zip(results[rank]["surgery"][1], parameters, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_one_process_has_the_methods_of_many():
    assert {n for n in vars(ManyProcesses) if not n.startswith("_")} <= set(dir(OneProcess))
