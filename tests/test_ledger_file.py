"""A loss ledger in the run file, and what reads it there."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pandas as pd
import pytest
from ledger_loop import SOURCES, TASKS, Options
from test_ledger_probe import record

import gradprobe
from gradprobe.cli.app import run as command
from gradprobe.errors import RunFileError
from gradprobe.ledger.windows import window
from gradprobe.runfile import files, schema
from gradprobe.summary import sentences, summarise


def seal(path):
    with path.open("r+b") as file:
        files.seal(file)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "run.h5"
    record(path, Options(optimizer="momentum", steps=59, ends="probe", batch=64), measured_in_micro=False)
    return path


def test_the_file_is_whole_and_plain_tools_read_the_table(path):
    assert command(["check", str(path)]) == 0
    with h5py.File(path) as file:
        assert list(file["ledger/source"].asstr()) == list(SOURCES)
        for field in schema.LEDGER.fields:
            dataset = file[f"ledger/{field.name}"]
            assert dataset.dtype == field.dtype
            assert dataset.attrs["long_name"] == field.meaning
            assert len(dataset) == 60
        scales = [[scale.name for scale in axis.values()] for axis in file["ledger/term"].dims]
        assert scales == [["/ledger/step"], ["/layer"], ["/task"], ["/ledger/source"]]


def test_a_run_without_one_says_so(tmp_path):
    record(tmp_path / "run.h5", Options(optimizer="sgd"), steps=1, burst=1, every=10)
    with h5py.File(tmp_path / "run.h5", "a") as file:
        del file["ledger"]
    seal(tmp_path / "run.h5")
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run.ledger == {}
        assert summarise(run)["ledger"] is None


def test_it_survives_repair_and_export(path, tmp_path):
    assert command(["check", str(path), "--repair", str(tmp_path / "again.h5")]) == 0
    with gradprobe.open_run(path) as run, gradprobe.open_run(tmp_path / "again.h5") as again:
        for name, values in run.ledger.items():
            np.testing.assert_array_equal(values, again.ledger[name])
        ledger = run.ledger
        assert run.to_xarray()["ledger.term"].dims == ("ledger.step", "layer", "task", "source")
    assert command(["export", str(path), "--to", "csv", "--out", str(tmp_path / "csv")]) == 0
    terms = pd.read_csv(tmp_path / "csv" / "ledger_terms.csv")
    one = terms[(terms.step == 7) & (terms.layer == "trunk.2") & (terms.task == "b") & (terms.source == "a")]
    np.testing.assert_allclose(one.term, ledger["term"][7, 1, 1, 0], rtol=1e-6)
    rows = pd.read_csv(tmp_path / "csv" / "ledger.csv")
    np.testing.assert_allclose(rows["loss_change.a"], ledger["loss_change"][:, 0])
    assert {"left", "right", "correction"} <= {p.stem.removeprefix("ledger_") for p in (tmp_path / "csv").iterdir()}


def test_a_ledger_of_other_sources_is_refused(path, tmp_path):
    broken = tmp_path / "run.h5"
    broken.write_bytes(path.read_bytes())
    with h5py.File(broken, "a") as file:
        values = file["ledger/term"][()]
        del file["ledger/term"]
        file["ledger/term"] = values[..., :3]
    seal(broken)
    with pytest.raises(RunFileError, match="ledger/term"):
        gradprobe.open_run(broken)


def test_numbers_that_cannot_be_are_found(path, tmp_path):
    broken = tmp_path / "run.h5"
    broken.write_bytes(path.read_bytes())
    with h5py.File(broken, "r+") as file:
        file["ledger/head"][3] = np.inf
    seal(broken)
    assert command(["check", str(broken)]) == 3


def test_the_summary_says_what_was_cancelled_and_whether_to_believe_it(path, capsys):
    assert command(["summary", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["ledger"]
    with gradprobe.open_run(path) as run:
        made, said = window(run.ledger, TASKS), sentences(run)
    assert found["counted"] == len(made.rows) == 60
    assert found["ends"] == "probe"
    told = {(pair["task"], pair["by"]): pair["c"] for pair in found["cancelled"]}
    assert told[("a", "b")] == pytest.approx(made.interference[0, 1])
    assert any("b's part of the updates" in sentence for sentence in said)


def test_a_short_ledger_says_what_cannot_be_told(tmp_path):
    record(tmp_path / "run.h5", Options(optimizer="sgd", ends="probe"), steps=4)
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert any("is not known: 4 rows" in sentence for sentence in sentences(run))
