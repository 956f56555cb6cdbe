"""Noise parts in the run file: kept, merged with rows that have none, resumed, checked, repaired, exported."""

from __future__ import annotations

import csv
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from run_factory import make_header, make_rows, make_run
from zoo import mlp

import gradprobe
from gradprobe.errors import RunFileError
from gradprobe.runfile import RunWriter, open_run
from gradprobe.runfile.exports import export_run
from gradprobe.runfile.files import seal
from gradprobe.runfile.integrity import check_run
from gradprobe.runfile.repair import repair
from gradprobe.runfile.thin import ThinRun

HEADER = make_header(3, ("a", "b", "c"))


def rows(count=40, without=()):
    """Rows with noise parts that tell their step, but those of ``without``."""
    for place, row in enumerate(make_rows(HEADER, count)):
        noise = np.full((3, 3, 3), float(row.step)) + np.arange(27.0).reshape(3, 3, 3) / 32
        measured = replace(row, gram_noise=noise, micro_batches=4)
        yield row if place in without else measured


def expected(count=40, without=()):
    noise = [np.full((3, 3, 3), np.nan) if r.gram_noise is None else r.gram_noise for r in rows(count, without)]
    return np.array(noise, dtype=np.float32)


def write(path, given, *, parts=0, end="finished", **options):
    """``parts`` > 0: so many rows go into each part."""
    writer = RunWriter(path, flush_seconds=600, **options)
    writer.start(HEADER)
    for place, row in enumerate(given):
        writer.write(row)
        if parts and place % parts == parts - 1:
            assert writer.flush()
    if end:
        writer.close(end)
    return writer


@pytest.mark.parametrize("parts", [0, pytest.param(1, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("without", [(), range(10), range(5, 30), [39]], ids=["all", "later", "between", "to the end"])
def test_what_was_measured_is_read(tmp_path, without, parts):
    """Rows without noise may come before, between and after, and in parts of their own."""
    write(tmp_path / "run.h5", rows(without=without), parts=parts)
    with open_run(tmp_path / "run.h5") as run:
        np.testing.assert_array_equal(run.gram_noise(), expected(without=without))
        assert run["micro_batches"].tolist() == [1 if i in without else 4 for i in range(40)]
        np.testing.assert_array_equal(run.read("gram_noise", start=-3), expected(without=without)[-3:])
        np.testing.assert_array_equal(run.gram_noise(stride=3), expected(without=without)[::3])
        np.testing.assert_array_equal(ThinRun(run, 3).gram_noise(), expected(without=without)[::3])
    assert check_run(tmp_path / "run.h5").whole


@pytest.mark.parametrize("without", [(), range(20), range(20, 40)], ids=["all", "later", "first"])
def test_a_run_that_is_being_written_is_read(tmp_path, without):
    """From parts of which some have the fields and some have not."""
    writer = write(tmp_path / "run.h5", rows(without=without), parts=5, end="")
    with open_run(tmp_path / "run.h5") as run:
        np.testing.assert_array_equal(run.gram_noise(), expected(without=without))
        np.testing.assert_array_equal(run.read("gram_noise", layers=1, stride=7), expected(without=without)[::7, 1])
        blocks = list(run.blocks(len(run), size=8))
        np.testing.assert_array_equal(np.concatenate([b["gram_noise"] for b in blocks]), expected(without=without))
    writer.close()


def test_a_run_measured_as_a_whole_has_none(tmp_path):
    make_run(tmp_path / "run.h5")
    with open_run(tmp_path / "run.h5") as run, h5py.File(tmp_path / "run.h5") as file:
        assert run.gram_noise() is None
        assert not {"gram_noise", "micro_batches", "other_task"} & set(file)
        with pytest.raises(RunFileError, match="no dataset 'gram_noise'"):
            run["gram_noise"]


@pytest.mark.parametrize("without", [(), range(20), range(20, 40)], ids=["both", "second", "first"])
def test_a_resumed_run_keeps_it(tmp_path, without):
    given = list(rows(without=without))
    write(tmp_path / "run.h5", given[:30], end="interrupted")
    again = RunWriter(tmp_path / "run.h5", resume=True)
    again.rewind(given[20].step, 0)
    again.start(HEADER)
    for row in given[20:]:
        again.write(row)
    again.close()
    with open_run(tmp_path / "run.h5") as run:
        np.testing.assert_array_equal(run.gram_noise(), expected(without=without))
        assert len(run) == 40
    assert check_run(tmp_path / "run.h5").whole


def test_axes_have_names_that_differ(tmp_path):
    """Tools that select by name refuse a dataset with one axis twice."""
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    write(tmp_path / "run.h5", rows())
    with xarray.open_dataset(tmp_path / "run.h5", engine="h5netcdf") as data:
        assert data["gram_noise"].dims == ("step", "layer", "task", "other_task")
        assert data["gram_noise"].sel(task="b", other_task="c", step=10)[0] == np.float32(10 + 5 / 32)
    with open_run(tmp_path / "run.h5") as run:
        np.testing.assert_array_equal(run.to_xarray()["gram_noise"], expected())
        assert run.to_xarray()["micro_batches"].dtype == np.int32
        frame = run.to_pandas("gram_noise")
    assert list(frame.columns) == ["step", "layer", "task", "other_task", "gram_noise"]
    assert len(frame) == expected().size


def test_export_has_a_table_of_it(tmp_path):
    write(tmp_path / "run.h5", rows(4))
    with open_run(tmp_path / "run.h5") as run:
        out = export_run(run, "csv")
    with (out / "noise.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 * 27
    assert table[5] == {"step": "0", "layer": "model.0.conv", "task": "b", "other_task": "c", "gram_noise": "0.15625"}
    with (out / "rows.csv").open() as file:
        assert [row["micro_batches"] for row in csv.DictReader(file)] == ["4"] * 4


def damaged(path, change):
    with h5py.File(path, "r+") as file:
        change(file)
    with path.open("rb+") as raw:
        seal(raw)


@pytest.mark.parametrize("name", ["micro_batches", "gram_noise", "other_task"])
def test_a_file_without_a_part_of_it_is_read_without_it(tmp_path, name):
    write(tmp_path / "run.h5", rows())
    with open_run(tmp_path / "run.h5") as run:
        whole = {other: run[other] for other in ("micro_batches", "gram_noise", "loss", "cosine")}
    damaged(tmp_path / "run.h5", lambda file: file.pop(name))
    with open_run(tmp_path / "run.h5") as run:
        for other, values in whole.items():
            if other != name:
                np.testing.assert_array_equal(run[other], values)
        assert (run.gram_noise() is None) == (name == "gram_noise")
        with pytest.raises(RunFileError, match=f"no dataset '{name}'"):
            run.read(name)


def test_a_file_whose_other_tasks_are_others_is_refused(tmp_path):
    write(tmp_path / "run.h5", rows())

    def change(file):
        file["other_task"][1] = "x"

    damaged(tmp_path / "run.h5", change)
    with pytest.raises(RunFileError, match="'other_task' are not its tasks"):
        open_run(tmp_path / "run.h5")


def test_check_finds_what_cannot_be(tmp_path):
    write(tmp_path / "run.h5", rows())

    def change(file):
        file["gram_noise"][3, 0, 0, 0] = np.inf
        file["micro_batches"][4] = -1

    damaged(tmp_path / "run.h5", change)
    found = [finding.what for finding in check_run(tmp_path / "run.h5").findings]
    assert found == [
        "gram_noise is infinite in 1 rows, first in row 3",
        "micro_batches is negative in 1 rows, first in row 4",
    ]


@pytest.mark.parametrize("without", [(), range(20), range(20, 40)], ids=["all", "later", "first"])
def test_repair_saves_it(tmp_path, without):
    """Of a killed run, whose parts may lack the fields; and of a damaged file, but for the row that is damaged."""
    writer = write(tmp_path / "run.h5", rows(without=without), parts=5, end="")
    saved = tmp_path / "copy"
    saved.mkdir()
    for path in [tmp_path / "run.h5", *sorted((tmp_path / "run.h5.parts").glob("*.h5"))]:
        target = saved / path.relative_to(tmp_path)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    writer.close()
    repair(saved / "run.h5", tmp_path / "repaired.h5")
    with open_run(tmp_path / "repaired.h5") as run:
        np.testing.assert_array_equal(run.gram_noise(), expected(without=without))
        assert run["micro_batches"].tolist() == [1 if i in without else 4 for i in range(40)]
    assert check_run(tmp_path / "repaired.h5").whole


def test_repair_leaves_a_hole_where_a_number_is_damaged(tmp_path):
    path = tmp_path / "run.h5"
    write(path, rows(400))
    with h5py.File(path) as file:
        place = file["gram_noise"].id.get_offset() + 200 * 27 * 4
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(bytes(data))
    report = repair(path, tmp_path / "repaired.h5")
    assert any(f.what.startswith("gram_noise could not be read in ") for f in report.findings)
    with open_run(tmp_path / "repaired.h5") as run:
        found, right = run.gram_noise(), expected(400)
        lost = np.isnan(found)
        assert lost[200].any()
        assert not lost[~(run["status"] > 0)].any()
        np.testing.assert_array_equal(found[~lost], right[~lost])


def test_a_probe_and_its_file(tmp_path):
    torch.manual_seed(0)
    case = mlp(torch.float64)
    with gradprobe.attach(case.model, ("t0", "t1"), tmp_path / "run.h5", every=1) as probe:
        for step in range(3):
            probe.record(micro=[case.losses(10 * step + a) for a in range(4)], batch_size=32)
    with open_run(tmp_path / "run.h5") as run:
        noise, gram = run.gram_noise(), run.gram()
        assert noise.shape == gram.shape == (3, 2, 2, 2)
        assert (np.einsum("nlii->nli", noise) > 0).all()
        assert run["micro_batches"].tolist() == [4] * 3
        assert run["batch_size"].tolist() == [32] * 3
