from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from writing import LAYERS, TASKS, row, write

from gradprobe import errors, measures
from gradprobe.rows import Header, Row
from gradprobe.runfile import Run, RunWriter, open_run, schema


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, range(50))
    writer.write_epoch(0, {"mAP50": 0.25})
    writer.write_epoch(1, {"mAP50": 0.5, "accuracy": 1.0})
    writer.close()
    with open_run(path) as run:
        assert run.complete
        assert len(run) == 50
        assert (run.tasks, run.layers, run.pairs) == (TASKS, LAYERS, ("det|cls", "det|seg", "cls|seg"))
        np.testing.assert_array_equal(run["step"], np.arange(50))
        gram = np.array([row(s).gram for s in range(50)])
        np.testing.assert_allclose(run["grad_norm"], measures.norm(gram), rtol=1e-6)
        np.testing.assert_allclose(run["cosine"], measures.pair_cosine(gram), atol=1e-6)
        np.testing.assert_allclose(run["loss"], [row(s).loss for s in range(50)], rtol=1e-6)
        np.testing.assert_allclose(run.gram(), gram, rtol=1e-5, atol=1e-5)
        assert run.provenance["hyp.box"] == 0.05
        assert run.provenance["argv"] == ["record", "--epochs"]
        np.testing.assert_equal(run.epochs["accuracy"], [np.nan, 1.0])
        assert not run.reach[0, 2]
        assert run["layer_size"].tolist() == [100, 8, 300]
    assert not (tmp_path / "run.h5.parts").exists()


def test_groups_of_layers_are_the_joined_vectors(tmp_path):
    path = tmp_path / "run.h5"
    write(path, range(5)).close()
    gram = np.array([row(s).gram for s in range(5)])
    with open_run(path) as run:
        two = measures.over_layers(gram[:, :2], run.reach[:2])
        np.testing.assert_allclose(run.norm("model.0"), two[0], rtol=1e-5)
        np.testing.assert_allclose(run.cosine("model.0"), two[1], atol=1e-5)
        every = measures.over_layers(gram, run.reach)
        np.testing.assert_allclose(run.cosine(), every[1], atol=1e-6)
        np.testing.assert_allclose(run.cosine(["model.1.conv"]), measures.pair_cosine(gram[:, 2]), atol=1e-5)
        with pytest.raises(errors.RunFileError, match=r"no shared layer at 'model.7' .*model.0.conv"):
            run.cosine("model.7")
        with pytest.raises(errors.RunFileError, match=r"no dataset 'weigth'.*weight"):
            run["weigth"]


def test_a_stride_goes_on_across_parts(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, range(7), flush_rows=1000, flush_seconds=1000)
    assert writer.flush()
    for step in range(7, 20):
        writer.write(row(step))
    assert writer.flush()
    with open_run(path) as run:
        assert not run.complete
        assert run.read("step", stride=3).tolist() == list(range(0, 20, 3))
        assert run.read("cosine", stride=4, layers=1).shape == (5, 3)
    writer.close()


@pytest.mark.parametrize("flushes", [40, pytest.param(60, marks=pytest.mark.slow)])
def test_a_run_can_be_read_while_it_is_written_and_parts_stay_few(tmp_path, monkeypatch, flushes):
    monkeypatch.setattr(RunWriter, "merge_at", 3)
    path = tmp_path / "run.h5"
    writer = write(path, [], flush_rows=1000, flush_seconds=1000)
    wide = False
    for step in range(flushes):
        writer.write(row(step))
        assert writer.flush()
        with open_run(path) as run:
            np.testing.assert_array_equal(run["step"], np.arange(step + 1))
            assert len(run._files) <= 1 + 3 * 4
            wide = wide or any("-" in piece.path.name for piece in run._files)
    assert wide  # parts were put together beside the main file
    with h5py.File(path) as main:
        assert len(main["step"]) >= 20
    writer.close()
    with open_run(path) as run:
        np.testing.assert_array_equal(run["step"], np.arange(flushes))
        np.testing.assert_allclose(run["loss"], [row(s).loss for s in range(flushes)], rtol=1e-6)


def test_rows_reach_the_disk_by_themselves(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, range(10), flush_seconds=0.05)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with open_run(path) as run:
            if len(run) == 10:
                break
        time.sleep(0.02)
    else:
        pytest.fail("no row reached the disk in 30 s")
    writer.close()


def test_flushed_rows_are_there_at_once(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, range(7), flush_rows=10**9, flush_seconds=1000)
    writer.flush()
    with open_run(path) as run:
        assert len(run) == 7
    writer.close()


def test_an_existing_run_is_not_touched_without_being_asked(tmp_path):
    path = tmp_path / "run.h5"
    write(path, range(5)).close()
    before = path.read_bytes()
    with pytest.raises(errors.RunFileError, match=r"--overwrite.*--resume"):
        RunWriter(path)
    assert path.read_bytes() == before
    assert not (tmp_path / "run.h5.parts").exists()


def test_overwriting_keeps_the_old_run_until_the_new_one_begins(tmp_path):
    path = tmp_path / "run.h5"
    write(path, range(5)).close()
    RunWriter(path, overwrite=True).close("failed: before it began")
    with open_run(path) as run:
        assert len(run) == 5
    write(path, range(2), overwrite=True).close()
    with open_run(path) as run:
        assert len(run) == 2


def test_a_folder_is_no_file(tmp_path):
    for path in (tmp_path, Path()):
        with pytest.raises(errors.RunFileError, match="is a folder, which a file must not replace"):
            RunWriter(path, overwrite=True)


def test_an_epoch_that_is_no_number_is_refused_and_costs_no_row(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, range(4))
    with pytest.raises(errors.RunFileError, match="epoch 'x'"):
        writer.write_epoch("x", {"accuracy": 0.3})
    writer.close()
    with open_run(path) as run:
        assert len(run) == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_writer_survives_any_failure_of_a_flush(tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    writer = write(path, range(4), flush_rows=10**9, flush_seconds=1000)
    with monkeypatch.context() as broken:
        broken.setattr("gradprobe.runfile.content.columns", lambda *_: 1 / 0)
        assert writer.flush() is False
    assert writer.flush() is True
    writer.close()
    with open_run(path) as run:
        assert len(run) == 4


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.RunFileError, match="Choose another place with --out"):
        RunWriter(tmp_path / "file" / "run.h5")


def test_reasons_are_stored_by_name(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, range(2))
    bad = row(2)
    writer.write(Row(bad.step, 0, 0.0, bad.loss, bad.weight, bad.gram, status="measuring failed: RuntimeError: no"))
    writer.close()
    with open_run(path) as run:
        assert [run.status_names[code] for code in run["status"]] == ["measured"] * 2 + [
            "measuring failed: RuntimeError: no"
        ]


def test_a_run_without_shared_layers_is_a_run(tmp_path):
    path = tmp_path / "run.h5"
    writer = RunWriter(path)
    writer.start(Header(("a", "b"), (), np.zeros(0, np.int64), np.zeros((0, 2), bool)))
    writer.write(Row(0, 0, 0.0, np.ones(2), np.ones(2), np.zeros((0, 2, 2))))
    writer.close()
    with open_run(path) as run:
        assert np.isnan(run.cosine()).all()  # not applicable, and not 0
        assert run["cosine"].shape == (1, 0, 1)


def test_files_that_are_no_runs_are_refused_with_what_they_are(tmp_path):
    with pytest.raises(errors.RunFileError, match="no such file"):
        open_run(tmp_path / "none.h5")
    text = tmp_path / "text.h5"
    text.write_text("step,loss\n")
    with pytest.raises(errors.RunFileError, match="cannot be read as a run file"):
        open_run(text)
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["x"] = [1]
    with pytest.raises(errors.RunFileError, match="not a gradprobe run"):
        open_run(foreign)
    write(tmp_path / "run.h5", range(3)).close()
    with h5py.File(tmp_path / "run.h5", "a") as file:
        file.attrs["encoding-version"] = "2.0"
    with pytest.raises(errors.RunFileError, match=r"format version 2\.0.*pip install -U gradprobe"):
        open_run(tmp_path / "run.h5")


def test_xarray_reads_it_with_names(tmp_path):
    xarray = pytest.importorskip("xarray")
    path = tmp_path / "run.h5"
    write(path, range(6)).close()
    with xarray.open_dataset(path, engine="h5netcdf") as dataset:
        assert dataset["cosine"].dims == ("step", "layer", "pair")
        assert dataset["reach"].dims == ("layer", "task")
        one = dataset["grad_norm"].sel(layer="model.1.conv", task="cls", step=4)
        expected = measures.norm(row(4).gram)[2, 1]
        assert float(one) == pytest.approx(expected, rel=1e-6)
        assert dataset["grad_norm"].attrs["units"] == "loss per unit of parameter"


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not installed (Debian: hdf5-tools)")
def test_h5dump_reads_it(tmp_path):
    path = tmp_path / "run.h5"
    write(path, range(6)).close()
    text = subprocess.run(["h5dump", "-d", "/task", "-d", "/step", path], check=True, capture_output=True, text=True)
    assert '"det"' in text.stdout
    assert "0, 1, 2, 3, 4, 5" in text.stdout


def test_names_of_metrics_that_hdf5_cannot_hold(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, range(3))
    writer.write_epoch(0, {"val/mAP50": 0.5})
    with pytest.raises(errors.RunFileError, match="cannot be called 'epoch'"):
        writer.write_epoch(0, {"epoch": 1})
    writer.close()
    with open_run(path) as run:
        assert run.epochs["val.mAP50"].tolist() == [0.5]


def test_every_dataset_of_the_table_is_in_the_file_with_its_meaning(tmp_path):
    path = tmp_path / "run.h5"
    write(path, range(3)).close()
    with h5py.File(path) as file:
        for field in (*schema.ROWS.held(()), *schema.HEADER_FIELDS):
            dataset = file[field.name]
            assert dataset.dtype == field.dtype, field.name
            assert dataset.attrs["long_name"] == field.meaning
            assert tuple(d.label for d in dataset.dims) == field.axes
        assert file.attrs["encoding-type"] == "gradprobe-run"
        assert file.attrs["encoding-version"] == "1.0"


def test_large_runs_are_chunked_along_steps():
    field = schema.ROWS["grad_norm"]
    assert schema.chunk_shape(field, (1_000_000, 60, 2)) == (4096, 8, 2)
    assert schema.chunk_shape(field, (100, 60, 2)) is None


def test_a_run_object_lets_go_of_its_files(tmp_path):
    path = tmp_path / "run.h5"
    write(path, range(3)).close()
    run = Run(path)
    run.close()
    run.close()
    assert run._files == []


def test_a_program_may_change_its_folder_while_it_records(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    writer = write(Path("run.h5"), [])
    for step in range(4):
        writer.write(row(step))
        assert writer.flush()
        monkeypatch.chdir(tmp_path / "elsewhere")
    writer.close()
    with open_run(tmp_path / "run.h5") as run:
        assert run["step"].tolist() == [0, 1, 2, 3]
    assert not list((tmp_path / "elsewhere").iterdir())
