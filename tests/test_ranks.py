"""Two and three real processes: what is recorded is what one process would record, and the noise comes with it."""

from __future__ import annotations

import itertools
import os
import socket
from importlib.util import find_spec
from pathlib import Path

import many_ranks
import numpy as np
import pytest
import torch
from many_ranks import BATCH, SIZES, STEPS, SYNCHRONISED, TASKS, WAYS
from warm import Process
from zoo import naive_gramian

import gradprobe
from gradprobe.probes.shared_layers import by_module, find_shared

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
BOTH = pytest.mark.parametrize("size", [2, 3])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of two and of three processes, which run at the same time."""
    program, started, folders = Path(many_ranks.__file__), [], {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(program.parents[1]), str(program.parent)])}
    for size in (2, 3):
        folders[size] = tmp_path_factory.mktemp(f"ranks{size}")
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            (folders[size] / "port").write_text(str(one.getsockname()[1]))
        for rank in range(size):
            started.append(Process([folders[size], rank, size], env=environment, program=program))
    for process in started:
        _, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors
    return folders


SHOWN = ("loss", "batch_size", "status", "micro_batches")


def rows(path):
    with gradprobe.open_run(path) as run:
        return run.gram(), run.gram_noise(), {n: run[n] for n in SHOWN if n in run}


def apart(found, expected, scale):
    """The largest difference, relative to the norms; what one lacks the other must lack too."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    bound = np.sqrt(np.einsum("nlii,nljj->nlij", scale, scale))
    return np.nanmax(np.abs(found - expected) / bound, initial=0)


@BOTH
@pytest.mark.parametrize("way", list(WAYS))
def test_processes_with_unequal_parts_record_what_one_does_with_all_samples(size, way, runs, tmp_path):
    many_ranks.recorded(many_ranks.make(), tmp_path / "one.h5", "backward")
    one, many = rows(tmp_path / "one.h5"), rows(runs[size] / f"{way}.h5")
    assert apart(many[0], one[0], one[0]) < 1e-5
    np.testing.assert_allclose(many[2]["loss"], one[2]["loss"], rtol=1e-5)
    assert many[2]["batch_size"].tolist() == [BATCH] * STEPS
    assert many[2]["status"].tolist() == [0] * STEPS
    assert many[2]["micro_batches"].tolist() == [size * (2 if way == "micro" else 1)] * STEPS


@BOTH
@pytest.mark.parametrize("way", SYNCHRONISED)
def test_synchronised_batchnorm_makes_processes_record_what_one_does_with_all_samples(size, way, runs, tmp_path):
    """Its backward communicates too, in every task's pass."""
    model = many_ranks.make(torch.nn.BatchNorm1d(16))
    many_ranks.recorded(model, tmp_path / "one.h5", way)
    one, many = rows(tmp_path / "one.h5"), rows(runs[size] / f"synchronised-{way}.h5")
    assert np.isfinite(one[0]).any(axis=(0, 2, 3)).tolist() == [True] * 3  # the norm's own parameters among them
    assert apart(many[0], one[0], one[0]) < 1e-5
    np.testing.assert_allclose(many[2]["loss"], one[2]["loss"], rtol=1e-5)
    assert many[2]["status"].tolist() == [0] * STEPS


def brute_force(size, way):
    """F - U of the first step, U from the products of every two different micro-batches, and their shares."""
    model, parts = many_ranks.make().double(), batch_parts(size, way)
    x = [many_ranks.batch(0).double()[p] for p in parts]
    shared = find_shared(by_module(model), many_ranks.losses(model, many_ranks.batch(0).double()))
    gradients = []
    for part in x:
        found = many_ranks.losses(model, part)
        gradients.append(
            [torch.autograd.grad(found[t], shared.parameters, retain_graph=True, allow_unused=True) for t in TASKS]
        )
    shares = np.array([len(part) / BATCH for part in x])
    owner = [i for i, layer in enumerate(shared.layers) for _ in layer.parameters]
    unbiased = np.zeros((len(shared.layers), 3, 3))
    weight = 0.0
    for one, other in itertools.permutations(range(len(x)), 2):
        weight += shares[one] * shares[other]
        for place, layer in enumerate(owner):
            for i, j in itertools.product(range(3), repeat=2):
                g, h = gradients[one][i][place], gradients[other][j][place]
                if g is not None and h is not None:
                    unbiased[layer, i, j] += shares[one] * shares[other] * float((g * h).sum())
    whole = many_ranks.losses(model, many_ranks.batch(0).double())
    gram = naive_gramian(shared.layers, whole)
    return gram, gram - unbiased / weight


def batch_parts(size, way):
    ends = [0, *itertools.accumulate(SIZES[size])]
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    if way != "micro":
        return parts
    return [piece for p in parts for piece in (slice(p.start, p.start + 2), slice(p.start + 2, p.stop))]


@BOTH
@pytest.mark.parametrize("way", list(WAYS))
def test_the_noise_part_is_that_of_all_products_across_processes(size, way, runs):
    gram, noise = brute_force(size, way)
    recorded = rows(runs[size] / f"{way}.h5")
    assert apart(recorded[0][:1], gram[None], gram[None]) < 1e-5
    assert apart(recorded[1][:1], noise[None], gram[None]) < 1e-5
    assert np.nanmax(np.abs(noise)) > 1e-2 * np.nanmax(np.abs(gram))  # there is some


@BOTH
def test_the_first_process_s_numbers_hold_and_means_are_over_all(size, runs):
    for rank in range(size):
        out = result(runs, size, rank)
        assert out["agreed"] == {"a": 0.0, "b": 2.0}
        assert out["mean"][0] == (size - 1) / 2
        assert np.isnan(out["mean"][1])


def result(runs, size, rank):
    return torch.load(runs[size] / f"{rank}.pt", weights_only=False)


@BOTH
def test_weights_that_are_learned_are_equal_in_all_processes_and_those_of_one_with_all_samples(size, runs):
    expected = many_ranks.balanced(many_ranks.make())
    found = [result(runs, size, rank)["balanced"] for rank in range(size)]
    assert all(one == found[0] for one in found)
    assert found[0].keys() == expected.keys()
    for name, history in expected.items():
        np.testing.assert_allclose(found[0][name], history, rtol=2e-5, err_msg=name)
        assert np.ptp(history, axis=0).min() > 1e-3, name  # they move


@pytest.mark.skipif(find_spec("yolov5") is None, reason="yolov5 is not installed")
def test_a_bundled_trainer_in_two_processes_is_one_in_two_micro_batches(runs):
    """YOLOv5's loss is normalised by the boxes of each process's part, and its BatchNorm by its images: what is
    recorded is the mean of that, as in micro-batches. The last batch of an epoch has a single image: one part.
    """
    first, other = result(runs, 2, 0)["bundled"], result(runs, 2, 1)["bundled"]
    expected = many_ranks.bundled(micro_batches=2)
    assert [row["size"] for row in first["rows"]] == [row["size"] for row in expected["rows"]] == [4, 1, 4]
    for row, one in zip(first["rows"], expected["rows"], strict=True):
        assert row["status"] == one["status"] == "measured"
        np.testing.assert_allclose(row["loss"], one["loss"], rtol=1e-5)
        np.testing.assert_allclose(row["weight"], one["weight"], rtol=1e-5)
        # Rounding is that of the parts' gradients, of which mean and noise are made: it does not cancel where they do.
        parts = one["gram"][None] + np.nan_to_num(one["noise"][None])
        assert apart(row["gram"][None], one["gram"][None], parts) < 1e-5
        assert apart(row["noise"][None], one["noise"][None], parts) < 1e-5
        assert np.isnan(row["noise"]).all() == (row["size"] == 1)  # of a single image nothing is known
    assert first["weights"] == other["weights"] != {"det": 1.0, "cls": 1.0}
    assert first["watched"] == other["watched"]
    assert not other["rows"]
