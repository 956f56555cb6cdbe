"""A full disk, a lost mount, a folder turned read-only: training goes on, and what was kept back is written later."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from writing import FailingDisk, assert_rows, header, row, write

from gradprobe import errors, open_run
from gradprobe.cli.app import run as command
from gradprobe.runfile import RunWriter, files
from gradprobe.runfile.flusher import Backlog, size
from gradprobe.runfile.pieces import parts_folder
from gradprobe.trainers.data import loading

QUICK = {"flush_rows": 10**9, "flush_seconds": 0.02}


def told(caplog):
    return [record.message for record in caplog.records]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE, errno.EDQUOT])
def test_rows_wait_in_memory_it_is_said_once_and_recording_goes_on(tmp_path, caplog, number):
    path, disk = tmp_path / "run.h5", FailingDisk()
    disk.number = number
    writer = write(path, range(3), disk=disk, **QUICK)
    assert writer.flush()
    disk.full = True
    for step in range(3, 30):
        writer.write(row(step))
        assert not writer.flush()
    assert told(caplog) == [
        f"{path}: cannot be written now ([Errno {number}] {os.strerror(number)}); training goes on, rows are kept in "
        "memory and written when there is space again"
    ]
    assert not list(tmp_path.glob("**/*.tmp"))
    with open_run(path) as run:
        assert_rows(run, range(3))
    disk.full = False
    assert writer.flush()
    with open_run(path) as run:
        assert_rows(run, range(30))
    writer.write(row(30))
    writer.close()
    assert told(caplog)[1:] == [f"{path}: recording again"]
    with open_run(path) as run:
        assert_rows(run, range(31))
        assert run.rows_dropped == 0


def test_beyond_the_bound_rows_are_dropped_and_counted_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(RunWriter, "keep_bytes", 10 * size(row(0)))
    path, disk = tmp_path / "run.h5", FailingDisk()
    writer = write(path, range(5), disk=disk, **QUICK)
    assert writer.flush()
    disk.full = True
    for step in range(5, 30):
        writer.write(row(step))
        assert not writer.flush()
    disk.full = False
    writer.write(row(30))
    assert writer.flush()
    with open_run(path) as run:
        steps = [*range(5), *range(21, 31)]
        assert_rows(run, steps)
        assert run.rows_dropped == 31 - len(steps) == 16
    writer.close("interrupted")
    again = write(path, [31], rewind=(31, 0))
    again.close()
    with open_run(path) as run:  # the count of an earlier session stays
        assert_rows(run, [*steps, 31])
        assert run.rows_dropped == 16


def test_the_backlog_is_bounded_in_bytes_and_keeps_what_is_being_written():
    backlog = Backlog(5 * size(row(0)))
    for step in range(4):
        backlog.put(row(step))
    assert [r.step for r in backlog.take(3 * size(row(0)))] == [0, 1, 2]
    for step in range(4, 9):
        backlog.put(row(step))
    assert len(backlog) == 5
    assert backlog.dropped == 4
    backlog.back()
    assert [r.step for r in backlog.take(10**9)] == [0, 1, 2, 7, 8]
    backlog.done()
    assert len(backlog) == 0
    backlog.put(row(9))
    backlog.take(1)  # a row that is larger than a part goes alone
    backlog.back(before=9)
    assert len(backlog) == 0
    assert backlog._bytes == 0


def test_a_disk_that_stays_full_loses_only_what_was_not_flushed_and_says_how_much(tmp_path):
    path, disk = tmp_path / "run.h5", FailingDisk()
    writer = write(path, range(4), disk=disk, **QUICK)
    assert writer.flush()
    disk.full = True
    writer.write(row(4))
    with pytest.raises(errors.RunFileError, match="1 rows are lost"):
        writer.close()
    with open_run(path) as run:
        assert_rows(run, range(4))
    write(path, [4], rewind=(4, 0)).close()
    with open_run(path) as run:
        assert_rows(run, range(5))


def test_without_room_to_put_parts_together_nothing_is_lost(tmp_path, monkeypatch, caplog):
    """Merging takes as much space again; a disk that has room for the rows alone keeps them as parts."""
    monkeypatch.setattr(files.Disk, "free", lambda self, folder: 1000)
    monkeypatch.setattr(RunWriter, "merge_at", 3)
    path = tmp_path / "run.h5"
    writer = write(path, [], **QUICK)
    for step in range(12):
        writer.write(row(step))
        assert writer.flush()
    writer.close()
    (message,) = told(caplog)
    assert "complete, but in pieces: its rows stay in run.h5.parts/" in message
    with open_run(path) as run:
        assert_rows(run, range(12))
        assert run.end == "finished"
    monkeypatch.undo()
    write(path, [12], rewind=(12, 0)).close()
    with open_run(path) as run:
        assert_rows(run, range(13))
    assert not parts_folder(path).exists()


def test_an_error_of_any_kind_stops_no_training_and_no_writing(tmp_path, monkeypatch, caplog):
    path = tmp_path / "run.h5"
    writer = write(path, range(3), **QUICK)
    real = writer._store.append

    def broken(*_):
        raise RuntimeError("HDF5 is in a bad mood")

    monkeypatch.setattr(writer._store, "append", broken)
    assert not writer.flush()
    monkeypatch.setattr(writer._store, "append", real)
    assert writer.flush()
    assert len(told(caplog)) == 2
    writer.close()
    with open_run(path) as run:
        assert_rows(run, range(3))


def test_a_folder_that_cannot_be_written_says_so_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.RunFileError, match="Choose another place with --out"):
        RunWriter(tmp_path / "file" / "run.h5")
    disk = FailingDisk()
    writer = RunWriter(tmp_path / "run.h5", disk=disk)
    disk.full = True
    with pytest.raises(errors.RunFileError, match=r"No space left.*Choose another place with --out"):
        writer.start(header())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- real file systems

TRAINING = """
import logging, sys, time
sys.path.insert(0, {tests!r})
from writing import row, write
logging.basicConfig(format="%(message)s")
writer = write({path!r}, [], flush_seconds=0.02, flush_rows=20)
step = 0
for line in sys.stdin:
    if line.startswith("close"):
        break
    for _ in range(int(line)):
        writer.write(row(step)); step += 1
    print(step, writer.flush(), flush=True)
writer.close()
print("closed", flush=True)
"""


class Training:
    """A process that records, and does as it is told; its disk can be spoiled meanwhile."""

    def __init__(self, path):
        code = TRAINING.format(tests=str(Path(__file__).parent), path=str(path))
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)

    def rows(self, count):
        """Write so many; whether they are on the disk."""
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        words = self.process.stdout.readline().split()
        assert words, self.process.stderr.read()
        self.steps = int(words[0])
        return words[1] == "True"

    def close(self):
        out, err = self.process.communicate("close\n", timeout=60)
        assert self.process.returncode == 0, err
        assert out == "closed\n"
        return err.splitlines()


def mount(*arguments):
    result = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"no file system can be mounted here: {result.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB of its own."""
    if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=3m", "none", folder)
    yield folder
    while subprocess.run(["umount", "-l", str(folder)], capture_output=True).returncode == 0:
        pass


def test_a_really_full_disk(small_disk):
    training = Training(small_disk / "run.h5")
    assert training.rows(50)
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    for _ in range(20):
        assert not training.rows(50)
    ballast.unlink()
    assert training.rows(1)
    training.rows(50)
    told_ = training.close()
    assert len(told_) == 2, told_
    assert "cannot be written now ([Errno 28] No space left on device)" in told_[0]
    with open_run(small_disk / "run.h5") as run:
        assert_rows(run, range(training.steps))
        assert run.end == "finished"
        assert run.rows_dropped == 0
    assert [p.name for p in small_disk.iterdir()] == ["run.h5"]


def test_a_recording_that_fills_its_disk_by_itself(small_disk):
    """Until nothing fits any more; then it closes with what did fit readable."""
    training = Training(small_disk / "run.h5")
    while training.rows(500):
        assert training.steps < 10**5
    training.process.stdin.write("close\n")
    _, err = training.process.communicate(timeout=60)
    assert training.process.returncode == 1  # RunFileError, and no signal
    assert "rows are lost. What was flushed before" in err
    with open_run(small_disk / "run.h5") as run:
        assert_rows(run, range(len(run)))
        assert len(run) >= training.steps - 500


def test_a_mount_that_is_lost_and_comes_back(small_disk, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    mount("--bind", small_disk, place)
    try:
        training = Training(place / "run.h5")
        assert training.rows(50)
        subprocess.run(["umount", "-l", place], check=True)
        for _ in range(5):
            assert not training.rows(50)
        assert list(place.iterdir()) == []  # nothing goes to the disk beneath
        mount("--bind", small_disk, place)
        assert training.rows(1)
        assert len(training.close()) == 2
        with open_run(place / "run.h5") as run:
            assert_rows(run, range(training.steps))
    finally:
        subprocess.run(["umount", "-l", place], capture_output=True)


def test_a_folder_that_turns_read_only(small_disk):
    """A read-only view is mounted over it, as the files held open forbid to turn the mount itself."""
    training = Training(small_disk / "run.h5")
    assert training.rows(50)
    mount("--bind", small_disk, small_disk)
    mount("-o", "remount,bind,ro", small_disk)
    for _ in range(5):
        assert not training.rows(50)
    with pytest.raises(errors.RunFileError, match="Choose another place with --out"):
        RunWriter(small_disk / "other.h5")
    subprocess.run(["umount", small_disk], check=True)
    assert training.rows(1)
    told_ = training.close()
    assert "Read-only file system" in told_[0]
    assert len(told_) == 2
    with open_run(small_disk / "run.h5") as run:
        assert_rows(run, range(training.steps))


@pytest.mark.alone
def test_training_is_not_kept_waiting_by_a_disk_that_hangs(tmp_path):
    class Hanging(FailingDisk):
        def sync(self, descriptor):
            if self.full:
                time.sleep(1.5)
            super().sync(descriptor)

    disk = Hanging()
    disk._check = lambda: None
    writer = write(tmp_path / "run.h5", range(3), disk=disk, flush_seconds=0.01)
    assert writer.flush()
    disk.full = True
    started = time.monotonic()
    for step in range(3, 300):
        writer.write(row(step))
        time.sleep(0.001)
    assert time.monotonic() - started < 1.4
    disk.full = False
    writer.close()
    with open_run(tmp_path / "run.h5") as run:
        assert_rows(run, range(300))


def test_gradprobe_record_goes_on_where_its_weights_find_no_room(small_disk, monkeypatch, capsys):
    """Rows fit, weights of 7 MB do not."""
    small = {"--data": "phantom", "--imgsz": 64, "--batch-size": 8, "--bn-batches": 1, "--epochs": 1, "--every": 5}
    arguments = [str(word) for pair in small.items() for word in pair]
    few = functools.partial(loading.load_data, n_train=24, n_val=8, n_test=8)
    monkeypatch.setattr(loading, "load_data", few)
    assert command(["record", *arguments, "--out", str(small_disk / "run.h5")]) == 0
    assert (
        "run.checkpoint.pt of epoch 1 not saved, is the disk full? ([Errno 28] No space left on device)"
        in capsys.readouterr().err
    )
    with open_run(small_disk / "run.h5") as run:
        assert run.end == "finished"
        assert len(run) == 1
    assert [p.name for p in small_disk.iterdir()] == ["run.h5"]
