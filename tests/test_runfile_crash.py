"""Whatever moment a recording is cut off at: the file is readable, and nothing that was flushed is missing."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from power import RecordingDisk, World, lay_out
from writing import assert_rows, row, write

from gradprobe import errors, open_run
from gradprobe.runfile import RunWriter, files
from gradprobe.runfile.integrity import check_run as verify
from gradprobe.runfile.pieces import parts_folder

FIRST, CUT, LAST = 22, 17, 27
NEVER = {"flush_rows": 10**9, "flush_seconds": 1e9}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """All operations of: a recording that is interrupted, gone on with from an earlier step, and finished."""
    root = tmp_path_factory.mktemp("recorded")
    disk, merge_at = RecordingDisk(root), RunWriter.merge_at
    RunWriter.merge_at = 3
    try:
        session(disk, range(FIRST), "interrupted")
        disk.mark(CUT)
        session(disk, range(CUT, LAST), "finished", rewind=(CUT, 1))
    finally:
        RunWriter.merge_at = merge_at
    return disk


def session(disk, steps, end, **options):
    writer = write(disk.root / "run.h5", [], disk=disk, **NEVER, **options)
    for step in steps:
        writer.write(row(step))
        if step % 2:
            writer.write_epoch(step // 10, {"mAP50": step / 100})
            assert writer.flush()
            disk.mark(step + 1)
    writer.close(end)
    disk.mark(steps[-1] + 1)


def check(folder, world):
    """What is left of the run is whole: a row for every step up to some, at least those that were flushed."""
    try:
        run = open_run(folder / "run.h5")
    except errors.RunFileError as error:
        if world.rows or "no such file" not in str(error):
            raise
        return None
    with run:
        rows = len(run)
        assert_rows(run, range(rows))
        assert rows >= world.rows
        assert run.end != "finished" or rows == LAST
        assert not run.end or verify(run.path).whole  # in pieces or with parts too many, nothing is missing
    return rows


def boundaries(log, every):
    """The world after each operation, and in the middle of each write; of the writes every so many."""
    world, writes = World(), 0
    for operation in log:
        writes += operation[0] == "write"
        chosen = operation[0] != "write" or writes % every == 0
        if chosen and operation[0] == "write":
            world.do(*operation[:3], operation[3][: len(operation[3]) // 2])
            yield operation, world
        world.do(*operation)
        if chosen:
            yield operation, world


def replay(log, folder, every, seed):
    """Check every folder that may be left; returns how many there were, and how many were gone on with."""
    rng, seen, resumed = random.Random(seed), set(), 0
    for operation, world in boundaries(log, every):
        for names, contents in [world.killed(), *world.power_lost(rng)]:
            # How a half-made file is called, and what it holds, makes no difference: nothing opens it.
            state = frozenset(
                (n, bytes(contents.get(i, b""))) if n.endswith((".h5", "lock", "parts")) else "half made"
                for n, i in names.items()
            )
            if (state, world.rows) in seen:
                continue
            seen.add((state, world.rows))
            lay_out(folder, names, contents)
            try:
                rows = check(folder, world)
                if rows is not None and rng.random() < 0.2:
                    resumed += 1
                    goes_on(folder, rows)
            except BaseException:
                print(f"seed {seed}, after {operation[:3]}")  # shown by pytest if the test fails
                raise
            finally:
                shutil.rmtree(folder)
                folder.mkdir()
    return len(seen), resumed


def goes_on(folder, rows):
    """The next session cuts, writes, and leaves one file and nothing else."""
    path = folder / "run.h5"
    write(path, range(rows // 2, rows + 2), rewind=(rows // 2, 0)).close()
    with open_run(path) as run:
        assert_rows(run, range(rows + 2))
        assert run.end == "finished"
    assert [p.name for p in folder.iterdir()] == ["run.h5"]


def test_cut_off_at_any_operation_by_a_kill_or_a_loss_of_power(recorded, tmp_path):
    log = recorded.log
    kinds = {operation[0] for operation in log}
    assert kinds >= {"create", "write", "sync", "replace", "unlink", "mkdir", "rmdir", "sync_folder"}
    assert sum(o[0] == "replace" and o[2] == "run.h5" for o in log) >= 5  # start, merges, close, cut, close
    assert any(o[0] == "replace" and "-" in o[2] for o in log)
    seen, resumed = replay(log, make(tmp_path / "left"), every=120, seed=0)
    assert seen > 150
    assert resumed > 10


def test_nothing_changes_but_by_what_was_logged(recorded, tmp_path):
    """Or the replay would miss something."""
    world = World()
    for operation in recorded.log:
        world.do(*operation)
    left = make(tmp_path / "left")
    lay_out(left, *world.killed())
    replayed, real = ({p.name: p.read_bytes() for p in folder.rglob("*.*")} for folder in (left, recorded.root))
    assert replayed == real


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_cut_off_at_every_single_write(recorded, tmp_path, seed):
    replay(recorded.log, make(tmp_path / "left"), every=1, seed=seed)


def make(folder):
    folder.mkdir()
    return folder


@pytest.mark.parametrize("forgotten", ["sync", "sync_folder"])
def test_the_harness_finds_a_writer_that_forgets_to_sync(tmp_path, forgotten, monkeypatch):
    """A check of the check: without fsync of the contents, or of the names, a loss of power loses flushed rows."""
    root = make(tmp_path / "recorded")
    disk = RecordingDisk(root)
    session(disk, range(6), "finished")
    log = [operation for operation in disk.log if operation[0] != forgotten]
    monkeypatch.setattr(sys.modules[__name__], "LAST", 6)
    with pytest.raises((AssertionError, errors.RunFileError)):
        replay(log, make(tmp_path / "left"), every=1000, seed=0)


# ---- real processes, really killed

PROCESS = """
import random, sys, time
sys.path.insert(0, {tests!r})
from writing import row, write
from gradprobe import open_run
from gradprobe.runfile import RunWriter
RunWriter.merge_at = 4
rng, path = random.Random({seed}), {path!r}

def say(*words):
    print(*words, time.monotonic(), flush=True)

while True:
    try:
        with open_run(path) as run:
            rows = len(run)
    except Exception as error:
        assert "no such file" in str(error), error
        rows = 0
    step = max(0, rows - rng.randrange(8)) if rows < 400 else 50
    say("from", step)
    writer = write(path, [], rewind=(step, step // 10), flush_rows=7, flush_seconds=0.03)
    for _ in range(rng.randrange(5, 120)):
        writer.write(row(step))
        step += 1
        if rng.random() < 0.2:
            assert writer.flush()
            say("flushed", step)
        if rng.random() < 0.3:
            time.sleep(0.002)
    writer.close()
    say("flushed", step)
"""


def kill_at_random(path, seed):
    """Let a process record, and close, and go on, over and over; kill it somewhere. Returns what it had promised."""
    code = PROCESS.format(tests=str(Path(__file__).parent), path=str(path), seed=seed)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        said = first + process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    promised = 0
    for line in said.splitlines(keepends=True):
        if line.endswith("\n"):
            kind, step, _ = line.split()
            promised = min(promised, int(step)) if kind == "from" else int(step)
    return promised


def kills(path, count):
    for seed in range(count):
        promised = kill_at_random(path, seed)
        if promised == 0 and not path.exists():
            continue
        with open_run(path) as run:
            assert_rows(run, range(len(run)))
            assert len(run) >= promised, f"kill {seed}"


needs_kill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")


@needs_kill
def test_killed_processes_lose_no_flushed_row_and_the_next_goes_on(tmp_path):
    kills(tmp_path / "run.h5", 10)


@needs_kill
@pytest.mark.slow
def test_300_killed_processes(tmp_path):
    kills(tmp_path / "run.h5", 300)


@pytest.mark.alone
@needs_kill
def test_a_kill_loses_no_more_than_the_flush_interval(tmp_path):
    """At 0.2 s an interval, with a second for a busy machine to write in."""
    path, tests = tmp_path / "run.h5", str(Path(__file__).parent)
    code = (
        f"import sys, time; sys.path.insert(0, {tests!r})\n"
        "from writing import row, write\n"
        f"writer = write({str(path)!r}, [], flush_seconds=0.2)\n"
        "for step in range(10**6):\n"
        "    writer.write(row(step)); print(time.monotonic(), flush=True); time.sleep(0.01)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(2.0)
        killed = time.monotonic()
        process.send_signal(signal.SIGKILL)
        written = [0.0, *map(float, process.stdout.read().split()[:-1])]
    old = sum(at < killed - 1.2 for at in written)
    assert old > 20
    with open_run(path) as run:
        assert_rows(run, range(len(run)))
        assert len(run) >= old
        assert not run.complete


def test_the_promise_is_five_seconds_or_256_rows(tmp_path):
    writer = RunWriter(tmp_path / "run.h5")
    assert (writer._flusher.seconds, writer._flusher.rows) == (5.0, 256)
    writer.close()


def test_parts_that_a_kill_left_beside_what_was_made_of_them_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(RunWriter, "merge_at", 3)
    monkeypatch.setattr(files.Disk, "unlink", lambda self, path: None)
    path = tmp_path / "run.h5"
    writer = write(path, [], **NEVER)
    for step in range(20):
        writer.write(row(step))
        assert writer.flush()
        with open_run(path) as run:
            np.testing.assert_array_equal(run["step"], np.arange(step + 1))
    assert len(list(parts_folder(path).glob("*.h5"))) > 20
    writer.close()


def test_a_stray_temporary_file_is_swept_up(tmp_path):
    path = tmp_path / "run.h5"
    write(path, range(4)).close()
    parts_folder(path).mkdir()
    (parts_folder(path) / ".run.h5.tmp").write_bytes(b"half a file")
    write(path, range(4, 6), rewind=(4, 0)).close()
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]
