"""The callback inside Ultralytics' real trainer; all trainings run once, in a process of their own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_probes_harmless import assert_same

import gradprobe
from gradprobe.measures import from_norms

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ultralytics")
    script = Path(__file__).with_name("ultralytics_runs.py")
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(script), str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def left_behind(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize(("bare", "probed"), [("bare", "probed"), ("end2end bare", "end2end")])
def test_the_training_ends_in_every_bit_as_without(folder, bare, probed):
    assert_same(left_behind(folder, bare), left_behind(folder, probed))


def test_the_file_holds_what_was_trained(folder):
    with gradprobe.open_run(folder / "probed.h5") as run:
        assert run.end == "finished"
        assert run.tasks == ("box", "cls", "dfl")
        assert run["step"].tolist() == [0, 2, 4]
        assert run["epoch"].tolist() == [0, 0, 1]
        np.testing.assert_allclose(run["weight"], np.multiply.outer(run["batch_size"], [7.5, 0.5, 1.5]))
        assert (run["loss"] > 0).all()
        epochs = run.epochs_by_number()
        assert {"train.box_loss", "val.cls_loss", "metrics.mAP50(B)"} <= set(epochs[1])
        # Ultralytics prints the mean over the epoch of gain * loss
        assert epochs[0]["train.cls_loss"] == pytest.approx(0.5 * run["loss"][0, 1], rel=0.5)
        assert run.provenance["trainer"] == "ultralytics"
        assert "ultralytics" in " ".join(run.provenance)


def test_a_branch_is_reached_by_its_own_losses_alone(folder):
    with gradprobe.open_run(folder / "probed.h5") as run:
        reach = dict(zip(run.layers, run["reach"].tolist(), strict=True))
    boxes = [tasks for layer, tasks in reach.items() if layer.startswith("model.22.cv2")]
    assert boxes == [[1, 0, 1]] * len(boxes) != []
    assert not [layer for layer in reach if layer.startswith("model.22.cv3")]
    assert all(tasks == [1, 1, 1] for layer, tasks in reach.items() if not layer.startswith("model.22"))


def test_what_is_measured_is_what_ultralytics_own_losses_give(folder):
    naive = torch.load(folder / "naive.pt", weights_only=True)
    with gradprobe.open_run(folder / "twin.h5") as run:
        assert run["step"].tolist() == sorted(naive) != []
        measured, reach = from_norms(run["grad_norm"], run["cosine"]), run["reach"].astype(bool)
        for row, step in enumerate(sorted(naive)):
            for index, layer in enumerate(run.layers):
                own = gramian(naive[step], layer)
                both = np.logical_and.outer(reach[index], reach[index])
                allowed = 1e-5 * np.sqrt(np.multiply.outer(own.diagonal(), own.diagonal()))
                assert (np.abs(measured[row, index] - own)[both] <= allowed[both]).all(), layer
                assert np.isnan(measured[row, index][~both]).all(), layer
                assert (own[~both] == 0).all(), layer  # in Ultralytics' one vector such a gradient is 0, not missing


def gramian(gradients, layer):
    """(T, T) in float64, of the gradients {parameter: tensor} of each task."""
    members = [name for name in gradients[0] if name.rpartition(".")[0] == layer]
    vectors = torch.stack([torch.cat([task[name].double().ravel() for name in members]) for task in gradients])
    return (vectors @ vectors.T).numpy()


@pytest.mark.parametrize(("name", "end"), [("failed", "failed: ValueError"), ("interrupted", "interrupted")])
def test_the_file_is_complete_however_it_ends(folder, name, end):
    with gradprobe.open_run(folder / f"{name}.h5") as run:
        assert run.end == end
        assert run["step"].tolist() == [0, 1, 2]
    assert not (folder / f"{name}.h5.parts").exists()


def test_a_criterion_that_cannot_be_asked_again_costs_rows_and_no_training(folder):
    assert_same(left_behind(folder, "bare"), left_behind(folder, "fragile"))
    with gradprobe.open_run(folder / "fragile.h5") as run:
        assert run["step"].tolist() == [0, 2, 4]
        assert {run.status_names[i] for i in run["status"]} == {"measuring failed: RuntimeError: CUDA out of memory"}
        assert np.isfinite(run["loss"]).all()
        assert np.isnan(run["grad_norm"]).all()
    said = (folder / "warnings.txt").read_text().splitlines()
    assert len([line for line in said if line.startswith("gradprobe: step 0: measuring failed")]) == 1


def test_heads_that_are_trained_end_to_end(folder):
    with gradprobe.open_run(folder / "end2end.h5") as run:
        assert run.tasks == ("box", "cls", "l1")
        assert np.isfinite(run["shared_cosine"]).all()


def test_a_loss_that_is_switched_off_is_no_task(folder):
    with gradprobe.open_run(folder / "no dfl.h5") as run:
        assert run.tasks == ("box", "cls")


def test_other_heads_are_measured_outside_the_head(folder):
    with gradprobe.open_run(folder / "segments.h5") as run:
        assert run.tasks == ("box", "seg", "cls", "dfl", "sem")
        assert len(run.layers) > 50
        assert not [layer for layer in run.layers if layer.startswith("model.22")]
        assert np.isfinite(run["shared_cosine"][:, 0]).all()
