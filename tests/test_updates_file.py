"""Rows on updates in the run file, and what is made of them."""

from __future__ import annotations

import io
import json

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from test_updates import TASKS, WEIGHTS, Net, losses_of, train

import gradprobe
from gradprobe import measures
from gradprobe.cli.app import run as command
from gradprobe.errors import RunFileError
from gradprobe.plots.figure import make
from gradprobe.runfile import schema
from gradprobe.summary import summarise


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("updates") / "run.h5"
    train(path, "adamw", steps=40, every=2, clip=0.5)
    return path


def test_the_file_is_whole_and_plain_tools_read_the_table(path):
    assert command(["check", str(path)]) == 0
    with h5py.File(path) as file:
        assert list(file["update/source"].asstr()) == ["a", "b", "weight decay", "earlier momentum"]
        for field in schema.UPDATES.fields:
            dataset = file[f"update/{field.name}"]
            assert dataset.dtype == field.dtype
            assert dataset.attrs["long_name"] == field.meaning
            assert len(dataset) == 20
        scales = [[scale.name for scale in axis.values()] for axis in file["update/effect"].dims]
        assert scales == [["/update/step"], ["/layer"], ["/task"], ["/update/source"]]


def test_rows_are_readable_while_they_are_recorded_and_after(tmp_path):
    model = Net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", every=1, optimizer=opt, updates=True) as probe:
        for step in range(5):
            probe.backward(losses_of(model, step), WEIGHTS)
            opt.step()
            opt.zero_grad()
            if step in (1, 3):
                assert probe.flush()
        assert probe.flush()
        assert list((tmp_path / "run.h5.parts").glob("*.h5"))
        with gradprobe.open_run(tmp_path / "run.h5") as run:
            before = run.updates
    assert before["step"].tolist() == [0, 1, 2, 3, 4]
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        for name, values in run.updates.items():
            np.testing.assert_array_equal(values, before[name])


def test_a_training_that_goes_back_takes_its_update_rows_along(tmp_path):
    model = Net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", every=1, optimizer=opt, updates=True) as probe:
        for step in range(6):
            if step == 3:
                state = probe.state_dict()
            probe.backward(losses_of(model, step), WEIGHTS)
            opt.step()
            opt.zero_grad()
        probe.load_state_dict(state)
        probe.backward(losses_of(model, 3), WEIGHTS)
        opt.step()
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run["update/step"].tolist() == run["step"].tolist() == [0, 1, 2, 3]


def test_a_repaired_copy_keeps_the_rows(path, tmp_path):
    assert command(["check", str(path), "--repair", str(tmp_path / "copy.h5")]) == 0
    with gradprobe.open_run(path) as run, gradprobe.open_run(tmp_path / "copy.h5") as copy:
        for name, values in run.updates.items():
            np.testing.assert_array_equal(copy.updates[name], values)


@pytest.mark.parametrize("spoil", ["long", "type", "sources", "status"])
def test_a_table_that_is_not_as_it_should_be_is_refused(path, tmp_path, spoil):
    other = tmp_path / "other.h5"
    other.write_bytes(path.read_bytes())
    with h5py.File(other, "r+") as file:
        if spoil == "status":
            file["update/status"][3] = 200
        else:
            name = "update/source" if spoil == "sources" else "update/clip_scale"
            kind = h5py.string_dtype() if spoil == "sources" else "<f8" if spoil == "type" else "<f4"
            values = ["a", "b"] if spoil == "sources" else np.zeros(21 if spoil == "long" else 20)
            del file[name]
            file.create_dataset(name, data=values, dtype=kind)
    words = {
        "long": "clip_scale",
        "type": "clip_scale",
        "sources": "2 parts",
        "status": "status 200",
    }
    with pytest.raises(RunFileError, match=words[spoil]), gradprobe.open_run(other) as run:
        _ = run.updates


def test_impossible_numbers_are_found(path, tmp_path, capsys):
    other = tmp_path / "other.h5"
    other.write_bytes(path.read_bytes())
    with h5py.File(other, "r+") as file:
        file["update/update_norm"][2, 0, 0] = -1
        file["update/skipped"][1] = -3
        file["update/shared_cosine"][0] = 2
    assert command(["check", str(other)]) == 3
    said = capsys.readouterr().out
    for what in ("update/update_norm is negative", "update/skipped is negative", "update/shared_cosine is beyond"):
        assert what in said


def test_every_format_holds_the_table(path, tmp_path):
    with gradprobe.open_run(path) as run:
        data, found = run.to_xarray(), run.updates
        np.testing.assert_array_equal(data["update.effect"], found["effect"])
        assert data["update.share"].dims == ("update.step", "layer", "source")
        frame = run.to_pandas("update/share")
        assert list(frame.columns) == ["step", "layer", "source", "share"]
    for kind in ("csv", "parquet", "netcdf", "tensorboard"):
        assert command(["export", str(path), "--to", kind, "--out", str(tmp_path / kind)]) == 0
    rows = pd.read_csv(tmp_path / "csv" / "updates.csv")
    np.testing.assert_allclose(rows["shared_share.earlier momentum"], found["shared_share"][:, 3], rtol=1e-5)
    assert rows.status.tolist() == ["measured"] * 20
    effects = pd.read_csv(tmp_path / "csv" / "update_effects.csv")
    assert list(effects.columns) == ["step", "layer", "task", "source", "effect"]
    assert len(effects) == found["effect"].size


def test_the_summary_sets_update_and_gradient_side_by_side(path, capsys):
    with gradprobe.open_run(path) as run:
        told = summarise(run)["updates"]
        found = run.updates
        gram = run.gram().sum(axis=1)
        weighted = gram * np.outer([1, 0.5], [1, 0.5])
        share = weighted.sum(2) / weighted.sum((1, 2))[:, None]
    medians = np.median(found["shared_share"], axis=0)
    np.testing.assert_allclose([told["share"][s] for s in found["source"]], medians, rtol=1e-5)
    np.testing.assert_allclose([told["gradient_share"][t] for t in TASKS], np.median(share, axis=0), rtol=1e-4)
    total = found["effect"].astype(float).sum(axis=1)
    pulls = np.where(total[:, 0, 0] < 0, total[:, 0, 1] / total[:, 0, 0], np.nan)
    np.testing.assert_allclose(told["effect"][0]["median"], np.nanmedian(pulls), rtol=1e-4)
    assert told["clipping"]["clipped"] == 20
    assert told["batchnorm"]["batches_per_step"] == 1
    assert command(["summary", str(path)]) == 0
    said = capsys.readouterr().out
    assert "Share of the update (after momentum and preconditioning, median): a " in said
    assert "The gradient was scaled down before 20 of 20 updates" in said
    assert "averaged" not in said  # one batch per step is nothing to say
    assert command(["summary", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == told


def test_a_run_without_updates_says_so(tmp_path, capsys):
    train(tmp_path / "run.h5", "sgd", steps=3, updates=False)
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert summarise(run)["updates"] is None
    assert command(["plot", str(tmp_path / "run.h5"), "--what", "updates"]) == 3
    assert "Record with --updates" in capsys.readouterr().err


def test_the_figure_draws_update_and_gradient_beside_each_other(path, tmp_path):
    with gradprobe.open_run(path) as run:
        figure, tables = make(run, "updates")
        found, cosine = run.updates, run["shared_cosine"]
    titles = [ax.get_title(loc="left").strip() for ax in figure.axes]
    assert titles[:3] == [
        "Share of the update",
        "Cosine between the tasks' parts",
        "Effect on the other's progress, first order",
    ]
    assert titles[3:] == ["Clip scale", "BatchNorm's running statistics", "Steps that changed nothing"]
    (raw,) = [line for line in figure.axes[1].lines if line.get_gid() == "raw a | b"]
    np.testing.assert_array_equal(raw.get_ydata(), found["shared_cosine"][:, 0])
    assert any(line.get_linestyle() == "--" for line in figure.axes[1].lines)
    frame = pd.read_csv(io.StringIO(tables["updates"].csv()))
    of_gradients = frame[(frame.quantity == "cosine of gradients")].value
    np.testing.assert_allclose(of_gradients, cosine[:, 0], rtol=1e-5)


def test_a_figure_of_updates_that_were_not_taken_apart(tmp_path):
    train(tmp_path / "run.h5", lambda p: torch.optim.RMSprop(p, 1e-3), steps=4)
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        figure, _ = make(run, "updates")
    notes = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert any("no update of this run was split by task" in note for note in notes)


def test_share_and_effect_are_invariant_to_the_order_of_tasks():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 4, 7))
    gram = vectors @ vectors.swapaxes(1, 2)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(measures.share(gram)[:, order], measures.share(gram[:, order][:, :, order]))
    np.testing.assert_allclose(measures.share(gram).sum(axis=1), 1)
    whole = vectors.sum(axis=1)
    twin = np.einsum("npd,nd->np", vectors, whole) / np.einsum("nd,nd->n", whole, whole)[:, None]
    np.testing.assert_allclose(measures.share(gram), twin)


def test_a_part_that_points_uphill_is_no_progress_to_measure_by():
    effect = np.array([[-2.0, 1.0, 0.0], [0.5, 0.1, 0.0]])  # the second task's own part raises its loss
    found = measures.update_effect(effect)
    np.testing.assert_allclose(found[0], [1.0, -0.5])
    assert np.isnan(found[1]).all()


def test_recording_with_updates(tmp_path):
    data = tmp_path / "phantoms"
    assert command(["data", "make", str(data), "--n", "24", "--seed", "3"]) == 0
    flags = ["--data", str(data / "data.yaml"), "--imgsz", "32", "--batch-size", "4", "--epochs", "1", "--every", "1"]
    out = tmp_path / "run.h5"
    assert command(["record", *flags, "--trainer", "joint", "--updates", "--clip-norm", "0.1", "--out", str(out)]) == 0
    with gradprobe.open_run(out) as run:
        found = run.updates
        assert found["step"].tolist() == run["step"].tolist()
        assert [run.status_names[code] for code in found["status"]] == ["measured"] * len(run)
        assert (found["clip_scale"] < 1).any()
        np.testing.assert_allclose(found["clip_share"].sum(axis=1), 1, atol=1e-3)
        np.testing.assert_allclose(found["shared_share"].sum(axis=1), 1, atol=1e-4)
        assert run.provenance["probe.updates"]
