from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from gradprobe import errors, measures
from gradprobe.rows import Header, Row
from gradprobe.runfile import Run, RunWriter, files, open_run, schema

TASKS, LAYERS = ("det", "cls", "seg"), ("model.0.conv", "model.0.bn", "model.1.conv")


def header(**provenance):
    reach = np.ones((3, 3), bool)
    reach[0, 2] = False  # seg does not reach the first layer
    return Header(TASKS, LAYERS, np.array([100, 8, 300]), reach, provenance)


def row(step, rng=None):
    rng = rng or np.random.default_rng(step)
    g = rng.normal(size=(3, 3, 7))
    gram = g @ g.transpose(0, 2, 1)
    gram[0, 2, :] = gram[0, :, 2] = np.nan
    return Row(step, step // 10, step * 0.5, rng.random(3), rng.random(3), gram, 1e-3, 0.01, 16)


def write(path, steps, **options):
    writer = RunWriter(path, **options)
    writer.start(header(trainer="joint", argv=["record", "--epochs"], hyp={"box": 0.05, "none": None}))
    for step in steps:
        writer.write(row(step))
    return writer


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
    writer._flush()
    for step in range(7, 20):
        writer.write(row(step))
    writer._flush()
    with open_run(path) as run:
        assert not run.complete
        assert run.read("step", stride=3).tolist() == list(range(0, 20, 3))
        assert run.read("cosine", stride=4, layers=1).shape == (5, 3)
    writer.close()


def test_a_run_can_be_read_while_it_is_written_and_is_merged_when_parts_are_many(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, [], flush_rows=1000, flush_seconds=1000)
    writer.merge_at = 4
    for step in range(40):
        writer.write(row(step))
        writer._try_flush()
        with open_run(path) as run:
            np.testing.assert_array_equal(run["step"], np.arange(step + 1))
            assert len(run._files) <= 1 + 4 + len(run) // 4
    assert writer._state.merged_through > 0
    writer.close()
    with open_run(path) as run:
        np.testing.assert_array_equal(run["step"], np.arange(40))


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


KILLED = """
import sys; sys.path.insert(0, {tests!r})
from test_runfile import write, row
writer = write({path!r}, [], flush_rows=10, flush_seconds=0.01)
writer.merge_at = 5
step = 0
while True:
    writer.write(row(step)); step += 1
    if step == 50: print("going", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("wait", [0.0, 0.013, 0.05, 0.11, 0.3])
def test_a_killed_run_is_readable(tmp_path, wait):
    path = tmp_path / "run.h5"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
    with open_run(path) as run:
        assert not run.complete
        steps = run["step"]
        np.testing.assert_array_equal(steps, np.arange(len(steps)))
        for index in range(len(steps))[-3:]:
            np.testing.assert_allclose(run["grad_norm"][index], measures.norm(row(index).gram), rtol=1e-6)


def test_a_kill_between_merge_and_clean_up_counts_no_row_twice(tmp_path):
    path, saved = tmp_path / "run.h5", tmp_path / "saved"
    writer = write(path, range(5), flush_rows=1000, flush_seconds=1000)
    writer._flush()
    shutil.copytree(tmp_path / "run.h5.parts", saved)
    writer._merge()
    for part in saved.glob("*.h5"):  # what a kill before the removal leaves behind
        shutil.copy(part, tmp_path / "run.h5.parts")
    with open_run(path) as run:
        np.testing.assert_array_equal(run["step"], np.arange(5))
    writer.close()


def test_going_on_cuts_the_rows_from_there(tmp_path):
    path = tmp_path / "run.h5"
    first = write(path, range(25))
    for epoch in range(3):
        first.write_epoch(epoch, {"mAP50": epoch})
    first.close("interrupted")
    second = write(path, range(20, 30), resume_at=20)
    second.write_epoch(2, {"mAP50": 7})
    second.close()
    with open_run(path) as run:
        np.testing.assert_array_equal(run["step"], np.arange(30))
        np.testing.assert_array_equal(run.epochs["mAP50"], [0, 1, 7])
        assert run.end == "finished"


def test_going_on_with_other_layers_is_refused(tmp_path):
    path = tmp_path / "run.h5"
    write(path, range(5)).close()
    writer = RunWriter(path, resume_at=5)
    other = Header(TASKS, ("a", "b"), np.array([1, 2]), np.ones((2, 3), bool))
    with pytest.raises(errors.RunFileError, match="Resume with the same model"):
        writer.start(other)


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


def test_a_second_writer_is_refused_before_it_touches_anything(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "run.h5"
    writer = write(path, range(3))
    for options in ({}, {"overwrite": True}, {"resume_at": 0}):
        with pytest.raises(errors.RunFileError, match="is being recorded into already"):
            RunWriter(path, **options)
    writer.close()
    with open_run(path) as run:
        assert len(run) == 3


def parts_of_a_killed_run(path):
    """A run whose process was killed: rows in parts that nobody merged."""
    writer = write(path, range(9), flush_rows=10**9, flush_seconds=1000)
    writer.flush()
    writer._lock.release()
    writer._closing = True
    return sorted((path.parent / f"{path.name}.parts").glob("*.h5"))


@pytest.mark.parametrize("options", [{"resume_at": 9}, {"overwrite": True}])
def test_a_run_that_fails_to_begin_leaves_a_killed_run_as_it_was(tmp_path, options):
    path = tmp_path / "run.h5"
    parts = parts_of_a_killed_run(path)
    assert parts
    RunWriter(path, **options).close("failed: no data")
    assert all(part.exists() for part in parts)
    with open_run(path) as run:
        assert run["step"].tolist() == list(range(9))


def test_resuming_without_another_row_still_ends_the_run(tmp_path):
    path = tmp_path / "run.h5"
    first = write(path, range(3))
    first.write_epoch(0, {"mAP50": 0.1})
    first.close("interrupted")
    writer = RunWriter(path, resume_at=40, resume_epoch=1)
    writer.resume({"resumed": {"step": 40}})
    writer.write_epoch(1, {"mAP50": 0.2})
    writer.annotate({"test": {"mAP50": 0.3}})
    writer.close()
    with open_run(path) as run:
        assert run.end == "finished"
        assert run.epochs["mAP50"].tolist() == [0.1, 0.2]
        assert (run.provenance["test.mAP50"], run.provenance["resumed.step"]) == (0.3, 40)
        assert run.provenance["argv"] == ["record", "--epochs"]  # of the first session


def test_epochs_are_cut_by_their_number_and_not_by_the_last_row(tmp_path):
    path = tmp_path / "run.h5"
    first = write(path, [0])  # one row, in epoch 0, and metrics of many epochs after it
    for epoch in range(6):
        first.write_epoch(epoch, {"mAP50": epoch})
    first.close("interrupted")
    writer = RunWriter(path, resume_at=100, resume_epoch=5)
    writer.write_epoch(5, {"mAP50": 50})  # before the first row of the new session
    writer.start(header())
    writer.close()
    with open_run(path) as run:
        assert run.epochs["mAP50"].tolist() == [0, 1, 2, 3, 4, 50]


def test_a_folder_is_no_file(tmp_path):
    for path in (tmp_path, Path()):
        with pytest.raises(errors.RunFileError, match="Name a file"):
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


FORGOTTEN = """
import sys; sys.path.insert(0, {tests!r})
from test_runfile import write
writer = write({path!r}, range(5))
"""


def test_a_program_that_never_closes_its_run_loses_nothing(tmp_path):
    path = tmp_path / "run.h5"
    code = FORGOTTEN.format(tests=str(Path(__file__).parent), path=str(path))
    subprocess.run([sys.executable, "-c", code], check=True)
    with open_run(path) as run:
        assert len(run) == 5
        assert run.end == "failed: the program ended without closing it"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_its_parents_file_alone(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, range(5))
    child = os.fork()
    if child == 0:
        writer.close("failed: the child's")
        os._exit(0)
    os.waitpid(child, 0)
    writer.write(row(5))
    writer.close()
    with open_run(path) as run:
        assert (len(run), run.end) == (6, "finished")


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.RunFileError, match="Choose another place with --out"):
        RunWriter(tmp_path / "file" / "run.h5")


class FullDisk:
    """Stands before ``os``-level writes of CarefulFile and lets through only so many bytes."""

    def __init__(self, monkeypatch):
        self.full = False
        real = files.CarefulFile.__init__
        disk = self

        def init(careful, path):
            real(careful, path)
            inner = careful._file

            class Guarded:
                def __getattr__(self, name):
                    return getattr(inner, name)

                def write(self, data):
                    if disk.full:
                        raise OSError(28, "No space left on device")
                    return inner.write(data)

            careful._file = Guarded()

        monkeypatch.setattr(files.CarefulFile, "__init__", init)


def test_a_full_disk_keeps_rows_in_memory_says_so_once_and_recovers(tmp_path, monkeypatch, caplog):
    path = tmp_path / "run.h5"
    disk = FullDisk(monkeypatch)
    writer = write(path, [], flush_rows=10**9, flush_seconds=1000)
    writer._flush_seconds = 0  # no pause after a failure
    disk.full = True
    for step in range(30):
        writer.write(row(step))
        writer._try_flush()
    assert [r.message for r in caplog.records if "cannot be written now" in r.message] == [
        f"{path}: cannot be written now ([Errno 28] No space left on device); training goes on, rows are kept in "
        "memory and written when there is space again"
    ]
    assert not list(tmp_path.glob("**/*.tmp"))
    disk.full = False
    writer.close()
    with open_run(path) as run:
        np.testing.assert_array_equal(run["step"], np.arange(30))
        assert run.rows_dropped == 0


def test_beyond_the_bound_the_oldest_rows_are_dropped_and_counted(tmp_path):
    path = tmp_path / "run.h5"
    writer = RunWriter(path, flush_rows=10**9, flush_seconds=1000)
    writer.keep_rows = 10
    writer.start(header())
    for step in range(25):
        writer.write(row(step))
    writer.close()
    with open_run(path) as run:
        np.testing.assert_array_equal(run["step"], np.arange(15, 25))
        assert run.rows_dropped == 15


def test_a_disk_that_stays_full_loses_only_what_was_not_flushed_and_says_how_much(tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    disk = FullDisk(monkeypatch)
    writer = write(path, range(4), flush_rows=10**9, flush_seconds=1000)
    writer._flush()
    disk.full = True
    writer.write(row(4))
    with pytest.raises(errors.RunFileError, match="1 rows are lost"):
        writer.close()
    with open_run(path) as run:
        np.testing.assert_array_equal(run["step"], np.arange(4))


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
        for field in (*schema.ROW_FIELDS, *schema.HEADER_FIELDS):
            dataset = file[field.name]
            assert dataset.dtype == field.dtype, field.name
            assert dataset.attrs["long_name"] == field.meaning
            assert tuple(d.label for d in dataset.dims) == field.axes
        assert file.attrs["encoding-type"] == "gradprobe-run"
        assert file.attrs["encoding-version"] == "1.0"


def test_large_runs_are_chunked_along_steps():
    (field,) = (f for f in schema.ROW_FIELDS if f.name == "grad_norm")
    assert schema.chunk_shape(field, (1_000_000, 60, 2)) == (4096, 8, 2)
    assert schema.chunk_shape(field, (100, 60, 2)) is None


def test_a_run_object_lets_go_of_its_files(tmp_path):
    path = tmp_path / "run.h5"
    write(path, range(3)).close()
    run = Run(path)
    run.close()
    run.close()
    assert run._files == []
