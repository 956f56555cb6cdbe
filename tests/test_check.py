"""Whether a run is whole, and what can be saved of one that is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import hostile
import numpy as np
import pytest
from run_factory import make_header, make_rows, make_run

from gradprobe.cli.app import run as command
from gradprobe.errors import RunFileError, UsageError
from gradprobe.runfile import RunWriter, files, lock, open_run, schema
from gradprobe.runfile.integrity import check_run
from gradprobe.runfile.repair import REPAIRED, repair


def findings(path) -> str:
    return "\n".join(f"{f.kind}: {f.file} {f.what}" for f in check_run(path).findings)


def killed(path: Path, rows: int = 30, layers: int = 4, per_part: int = 10) -> Path:
    """As a kill leaves a run: a main file without rows, and parts."""
    header = make_header(layers)
    writer = RunWriter(path, flush_rows=10**9, flush_seconds=1000)
    writer.start(header)
    for number, row in enumerate(make_rows(header, rows)):
        writer.write(row)
        if number % per_part == per_part - 1:
            writer.flush()
    writer._closing = True
    writer._lock.release()
    return path


def parts(path: Path) -> list[Path]:
    return sorted(path.with_name(path.name + schema.PARTS_SUFFIX).glob("*.h5"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def place_of(path: Path, name: str, row: int = 0) -> int:
    """Where in the file a row of a contiguous dataset lies."""
    with h5py.File(path) as file:
        dataset = file[name]
        return dataset.id.get_offset() + row * dataset.nbytes // len(dataset)


def assert_same(one: Path, other: Path) -> None:
    with open_run(one) as a, open_run(other) as b:
        for field in (*schema.ROWS.held(()), *schema.HEADER_FIELDS):
            np.testing.assert_array_equal(a[field.name], b[field.name], field.name)
        np.testing.assert_equal(a.epochs, b.epochs)
        assert (a.tasks, a.layers, a.status_names) == (b.tasks, b.layers, b.status_names)


# ---- check


def test_a_whole_run_is_whole(tmp_path):
    report = check_run(make_run(tmp_path / "run.h5", bad_rows=[4]))
    assert report.whole
    assert report.findings == []
    assert (report.rows, report.files) == (60, ["run.h5"])


def test_a_killed_run_is_incomplete_but_not_damaged(tmp_path):
    path = killed(tmp_path / "run.h5")
    report = check_run(path)
    assert [f.kind for f in report.findings] == ["incomplete"]
    assert "killed" in report.findings[0].what
    assert (report.rows, len(report.files)) == (30, 4)


def ended_in_pieces(path: Path) -> Path:
    """As a kill between the last rows and the last merge leaves a run, or a disk without room for the merge."""
    header, writer = make_header(4), RunWriter(path, flush_rows=10, flush_seconds=1000)
    writer._store.merge = lambda *_: (_ for _ in ()).throw(OSError("no room"))
    writer.start(header)
    for row in make_rows(header, 30):
        writer.write(row)
        writer.flush()
    writer.close()
    return path


def test_a_run_that_ended_is_whole_in_pieces_too_and_with_parts_that_are_merged_already(tmp_path, monkeypatch, capsys):
    path = ended_in_pieces(tmp_path / "run.h5")
    assert findings(path) == "note: run.h5 is in pieces, of which none is missing: keep run.h5.parts/ with the file"
    assert command(["check", str(path)]) == 0
    assert f"{path} is whole: 30 rows in " in capsys.readouterr().out
    assert command(["check", str(path), "--repair", str(tmp_path / "one.h5")]) == 0
    assert findings(tmp_path / "one.h5") == ""
    assert_same(path, tmp_path / "one.h5")
    parts(path)[-1].unlink()  # the part that says how it ended
    assert not check_run(path).whole
    shutil.rmtree(tmp_path / "run.h5.parts")
    path.unlink()
    monkeypatch.setattr(files.Disk, "unlink", lambda *_: None)  # cut off behind the merge
    left = killed(path)
    writer = RunWriter(left, resume=True)
    writer.rewind(300, 0)
    writer.start(make_header(4))
    writer.close()
    assert parts(path)
    report = check_run(path)
    assert report.whole
    assert report.rows == 30
    assert {f.what for f in report.findings} == {"is in the main file already; a kill came before it was removed"}


@pytest.mark.skipif(not lock.LOCKS.exists(), reason="needs Linux's list of locks")
def test_a_run_that_is_being_recorded_says_so_and_is_not_repaired(tmp_path):
    path = tmp_path / "run.h5"
    writer = RunWriter(path)
    writer.start(make_header(3))
    assert findings(path) == "incomplete: run.h5 is being recorded"
    with pytest.raises(UsageError, match="repair it when that has ended"):
        repair(path, tmp_path / "saved.h5")
    writer.close()
    assert check_run(path).whole


def test_every_byte_is_under_a_sum(tmp_path):
    """Also those that hold no number: what lies between HDF5's own structures."""
    path = make_run(tmp_path / "run.h5", rows=10, layers=2)
    good = path.read_bytes()
    for place in np.linspace(0, len(good) - 1, 150).astype(int):
        path.write_bytes(good)
        flip(path, place)
        assert not check_run(path).whole, place


def test_damage_is_told_by_bytes_and_by_what_cannot_be_read(tmp_path):
    path = make_run(tmp_path / "run.h5", rows=500, layers=20)
    flip(path, place_of(path, "grad_norm", 250))
    said = findings(path)
    assert "damaged: run.h5 4,096 bytes do not match their sums" in said
    assert "damaged: run.h5 grad_norm cannot be read" in said
    assert "loss" not in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda file: file["step"].__setitem__(7, 3), "step does not increase in 1 rows, first in row 7"),
        (lambda file: file["cosine"].__setitem__((5, 2, 0), 1.5), "cosine is beyond -1 to 1 in 1 rows, first in row 5"),
        (lambda file: file["grad_norm"].__setitem__((slice(4, 6), 1), -1), "grad_norm is negative or infinite in 2"),
        (lambda file: file["status"].__setitem__(3, 7), "status has no name in status_names in 1 rows"),
        (lambda file: file["epochs/epoch"].__setitem__(1, 0), "epochs/epoch does not increase"),
        (lambda file: file["reach"].__setitem__((0, 0), 2), "reach holds other values than 0 and 1"),
        (lambda file: file["epoch"].__setitem__(0, -2), "epoch is below -1 in 1 rows"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be(tmp_path, change, says):
    path = tmp_path / "run.h5"
    with hostile.changed(path) as file:  # its sums are right
        change(file)
    assert findings(path).startswith(f"damaged: run.h5 {says}")


def test_steps_increase_from_file_to_file(tmp_path):
    path = killed(tmp_path / "run.h5")
    shutil.copy(parts(path)[0], parts(path)[2])
    assert "damaged: 00000003.h5 step does not increase in 1 rows, first in row 0" in findings(path)


def test_a_missing_part_is_noticed(tmp_path):
    path = killed(tmp_path / "run.h5")
    parts(path)[1].unlink()
    assert "damaged: 00000003.h5 follows part 00000001: 1 parts between are missing" in findings(path)


def test_what_another_program_changed_cannot_be_verified(tmp_path):
    path = make_run(tmp_path / "run.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["note"] = 1
    assert "incomplete: run.h5 carries no sums" in findings(path)


def test_hostile_files_are_findings_and_no_crash(tmp_path):
    for name in ("external_link_to_a_pipe", "virtual_dataset", "cut_in_half", "pipe"):
        path = tmp_path / name / "run.h5"
        path.parent.mkdir()
        hostile.CORPUS[name][0](path)
        assert not check_run(path).whole
        with pytest.raises(RunFileError, match="nothing can be saved"):
            repair(path, tmp_path / name / "saved.h5")


# ---- repair


def test_a_killed_run_becomes_one_whole_file(tmp_path):
    path = killed(tmp_path / "run.h5")
    before = {p: p.read_bytes() for p in (path, *parts(path))}
    report = repair(path, tmp_path / "saved.h5")
    assert report.findings == []
    assert report.rows == 30
    assert_same(path, tmp_path / "saved.h5")
    assert check_run(tmp_path / "saved.h5").whole
    with open_run(tmp_path / "saved.h5") as run:
        assert run.end == "failed: the recording was killed before its end"
        assert run.provenance["repair.of"] == "run.h5"
        assert run.provenance["trainer"] == "gradnorm"
    assert {p: p.read_bytes() for p in before} == before


def test_a_damaged_part_is_left_out_and_said(tmp_path):
    path = killed(tmp_path / "run.h5")
    flip(parts(path)[1], 100)
    report = repair(path, tmp_path / "saved.h5")
    with open_run(tmp_path / "saved.h5") as run:
        assert run["step"].tolist() == [*range(0, 100, 10), *range(200, 300, 10)]
        (lost,) = run.provenance["repair.lost"]
    assert lost.startswith("00000002.h5 cannot be read as a run file (it is damaged")
    assert [f.file for f in report.findings] == ["00000002.h5"]


def test_a_damaged_main_file_leaves_its_parts(tmp_path):
    path = killed(tmp_path / "run.h5")
    path.write_bytes(b"noise")
    repair(path, tmp_path / "saved.h5")
    with open_run(tmp_path / "saved.h5") as run:
        assert len(run) == 30


def test_numbers_that_are_lost_are_nan_and_their_rows_say_so(tmp_path):
    path = make_run(tmp_path / "run.h5", rows=500, layers=20)
    with open_run(path) as run:
        right = {field.name: run[field.name] for field in schema.ROWS.held(())}
    flip(path, place_of(path, "grad_norm", 250))
    report = repair(path, tmp_path / "saved.h5")
    with open_run(tmp_path / "saved.h5") as run:
        assert len(run) == 500
        lost = np.array([run.status_names[code] == REPAIRED for code in run["status"]])
        assert 20 <= lost.sum() <= 4096 // (20 * 2 * 4) + 2  # a block of sums, and no more
        assert lost[250]
        nan = np.isnan(run["grad_norm"])
        assert nan[250].any()
        assert not nan[~lost].any()
        np.testing.assert_array_equal(run["grad_norm"][~nan], right["grad_norm"][~nan])
        for name in set(right) - {"grad_norm", "status"}:
            np.testing.assert_array_equal(run[name], right[name], name)
    assert f"grad_norm could not be read in {lost.sum()} rows" in [f.what for f in report.findings]
    assert check_run(tmp_path / "saved.h5").whole


def test_rows_without_a_step_are_left_out(tmp_path):
    path = make_run(tmp_path / "run.h5", rows=2000, layers=2)
    flip(path, place_of(path, "step", 1000))
    report = repair(path, tmp_path / "saved.h5")
    with open_run(path) as run, pytest.raises(RunFileError):
        run["step"]
    with open_run(tmp_path / "saved.h5") as run:
        assert 2000 - 513 <= len(run) < 2000  # 512 lie in a block of sums, one of them across its border
        assert 10_000 not in run["step"]
        assert (np.diff(run["step"]) > 0).all()
        assert not any(run.status_names[code] == REPAIRED for code in run["status"])
    assert any("rows are lost: no step, epoch or time" in f.what for f in report.findings)


def test_damaged_sums_cost_only_what_they_are_of(tmp_path):
    """A flipped bit in the table makes one block suspect; in the sum of the table, none."""
    path = make_run(tmp_path / "run.h5", rows=500, layers=20)
    good = tmp_path / "good.h5"
    shutil.copy(path, good)
    size = path.stat().st_size
    flip(path, size - 2)
    with pytest.raises(RunFileError, match="do not match their own sum"):
        open_run(path)
    repair(path, tmp_path / "saved.h5")
    assert_same(good, tmp_path / "saved.h5")


def test_rows_that_come_twice_are_kept_once(tmp_path):
    path = killed(tmp_path / "run.h5")
    shutil.copy(parts(path)[0], parts(path)[1])
    repair(path, tmp_path / "saved.h5")
    with open_run(tmp_path / "saved.h5") as run:
        assert run["step"].tolist() == [*range(0, 100, 10), *range(200, 300, 10)]


def test_statuses_of_parts_keep_their_names(tmp_path):
    path = tmp_path / "run.h5"
    header = make_header(3)
    writer = RunWriter(path, flush_rows=10**9, flush_seconds=1000)
    writer.start(header)
    for number, row in enumerate(make_rows(header, 20, bad_rows=[15])):
        writer.write(row)
        if number in (9, 19):
            writer.flush()
    writer._closing = True
    writer._lock.release()
    repair(path, tmp_path / "saved.h5")
    assert_same(path, tmp_path / "saved.h5")
    with open_run(tmp_path / "saved.h5") as run:
        assert run.status_names[run["status"][15]] == "a task's gradient is not finite"


def test_numbers_in_chunks_are_saved_one_by_one(tmp_path):
    """A large dataset is stored in chunks, and the last ones reach beyond its end."""
    path = make_run(tmp_path / "run.h5", rows=4500, layers=33)
    with open_run(path) as run:
        right = run["grad_norm"]
    with h5py.File(path) as file:
        dataset = file["grad_norm"]
        assert dataset.chunks == (4096, 8, 2)
        inner = dataset.id.get_chunk_info_by_coord((0, 8, 0)).byte_offset + 20_000
        last = dataset.id.get_chunk_info_by_coord((4096, 32, 0)).byte_offset + 10_000
    for place in (inner, last):
        flip(path, place)
    repair(path, tmp_path / "saved.h5")
    with open_run(tmp_path / "saved.h5") as run:
        lost = np.isnan(run["grad_norm"])
        np.testing.assert_array_equal(run["grad_norm"][~lost], right[~lost])
        assert set(np.flatnonzero(lost.any(axis=(0, 2)))) == {*range(8, 16), 32}
        assert lost[20_000 // 64, 8:16].any()  # 64 bytes are a row of a chunk
        assert lost.sum() <= 2 * 4096 // 4
        assert lost.any(axis=(1, 2)).sum() == sum(run.status_names[c] == REPAIRED for c in run["status"])


# ---- the command


def test_the_command_and_its_exit_codes(tmp_path, capsys):
    whole, broken = make_run(tmp_path / "run.h5"), killed(tmp_path / "killed.h5")
    assert command(["check", str(whole)]) == 0
    assert capsys.readouterr().out == f"{whole} is whole: 60 rows in 1 file\n"
    assert command(["check", str(broken)]) == 3
    assert f"Try: gradprobe check {broken} --repair OUT" in capsys.readouterr().out
    assert command(["check", str(broken), "--repair", str(tmp_path / "saved.h5")]) == 0
    assert "saved.h5 has 30 rows from 4 files; nothing was lost" in capsys.readouterr().out
    assert command(["check", str(broken), "--repair", str(tmp_path / "saved.h5")]) == 2
    assert command(["check", str(tmp_path / "none.h5")]) == 3
    flip(parts(broken)[0], 100)
    assert command(["check", str(broken), "--repair", str(tmp_path / "again.h5")]) == 3


def test_the_command_for_programs(tmp_path, capsys):
    path = killed(tmp_path / "run.h5")
    assert command(["check", str(path), "--json", "--repair", str(tmp_path / "saved.h5")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["whole"] is False
    assert said["findings"][0]["kind"] == "incomplete"
    assert said["repaired"]["rows"] == 30
