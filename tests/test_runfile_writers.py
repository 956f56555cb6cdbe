"""More than one who could write: a second process, a forked child, threads."""

from __future__ import annotations

import multiprocessing
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from writing import assert_rows, row, write

from gradprobe import errors, open_run
from gradprobe.runfile import RunWriter
from gradprobe.runfile.pieces import parts_folder

pytest.importorskip("fcntl")

TESTS = str(Path(__file__).parent)
PRELUDE = f"import sys, os, time, signal, multiprocessing; sys.path.insert(0, {TESTS!r}); from writing import *\n"


def run_code(code, **options):
    return subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=60, **options)


HOLDER = """
writer = write({path!r}, range(5), flush_seconds=0.01)
writer.flush()
{then}
print("holding", flush=True)
sys.stdin.read()
"""


def hold(path, then="pass"):
    code = PRELUDE + HOLDER.format(path=str(path), then=then)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holding\n"
    return process


def contents(folder):
    return {p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_second_process_is_refused_before_it_touches_anything(tmp_path):
    path = tmp_path / "run.h5"
    process = hold(path)
    before = contents(tmp_path)
    assert len(before) > 2
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(errors.RunFileError, match="is being recorded into already"):
            RunWriter(path, **options)
    assert contents(tmp_path) == before
    process.communicate()
    with open_run(path) as run:  # closed at exit
        assert_rows(run, range(5))


def test_a_second_writer_in_the_same_process_is_refused_too(tmp_path):
    writer = write(tmp_path / "run.h5", range(3))
    with pytest.raises(errors.RunFileError, match="is being recorded into already"):
        RunWriter(tmp_path / "run.h5", overwrite=True)
    writer.close()
    with open_run(tmp_path / "run.h5") as run:
        assert_rows(run, range(3))


def test_a_lock_whose_holder_died_is_free_even_if_its_children_live(tmp_path):
    path = tmp_path / "run.h5"
    process = hold(path, "if os.fork() == 0: print('holding', flush=True); time.sleep(30); os._exit(0)\ntime.sleep(30)")
    process.send_signal(signal.SIGKILL)
    process.wait()
    writer = write(path, range(5, 8), rewind=(5, 0))
    writer.close()
    process.stdin.close()
    process.stdout.close()
    with open_run(path) as run:
        assert_rows(run, range(8))


def test_of_many_processes_that_start_at_once_one_records(tmp_path):
    path = tmp_path / "run.h5"
    code = f"""
sys.stdin.read(1)
try:
    writer = write({str(path)!r}, range(20), overwrite=True)
except Exception as error:
    print(type(error).__name__, error)
else:
    time.sleep(0.5)
    writer.close()
    print("recorded")
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.write("x")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert any("recorded" in text for text in said)
    assert all("recorded" in text or "is being recorded into already" in text for text in said)
    with open_run(path) as run:
        assert_rows(run, range(20))
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]


# ---- forks

ENDS = {
    "normally": "pass",
    "by sys.exit": "sys.exit(0)",
    "by closing": "writer.close('failed: in a child')",
    "by an error": "raise SystemError('in the child')",
    "after writing": "writer.write(row(99)); writer.write_epoch(9, {'a': 1}); writer.rewind(3, 0); writer.flush()",
}


@pytest.mark.parametrize("end", ENDS, ids=str)
def test_a_forked_child_changes_nothing(tmp_path, end):
    """The child goes through exit handlers, garbage collection and HDF5's own closing, with a writer that is live."""
    path = tmp_path / "run.h5"
    result = run_code(f"""
writer = write({str(path)!r}, range(10), flush_rows=10**9, flush_seconds=1e9)
writer.flush()
for step in range(10, 14): writer.write(row(step))
if os.fork() == 0:
    {ENDS[end]}
    del writer
    sys.exit(0)
os.wait()
assert sorted(p.name for p in writer._store.folder.iterdir()) == ["00000001.h5", "lock"]
for step in range(14, 20): writer.write(row(step))
writer.close()
""")
    assert result.returncode == 0, result.stderr
    with open_run(path) as run:
        assert_rows(run, range(20))
        assert run.end == "finished"
        assert "a" not in run.epochs


def test_a_fork_while_a_file_is_half_written(tmp_path):
    """HDF5 in the child closes the file it inherited; none of that may reach the parent's."""
    path = tmp_path / "run.h5"
    result = run_code(f"""
import threading
from gradprobe.runfile import files
half = threading.Event()
class Slow(files.Disk):
    count, at = 0, 0
    def write(self, descriptor, data, offset):
        self.count += 1
        if self.count == self.at:
            half.set()
            time.sleep(0.01)  # the main thread forks now, or as soon as HDF5 lets it
        return super().write(descriptor, data, offset)
disk = Slow()
writer = write({str(path)!r}, [], disk=disk, flush_rows=1, flush_seconds=1e9)
for step in range(30):
    half.clear()
    disk.at = disk.count + 1 + 2 * step
    writer.write(row(step))
    assert half.wait(30)
    if os.fork() == 0: sys.exit(0)
    assert os.wait()[1] == 0
    assert writer.flush()
writer.close()
""")
    assert result.returncode == 0, result.stderr
    with open_run(path) as run:
        assert_rows(run, range(30))


def test_forked_data_loader_workers_leave_the_run_alone(tmp_path):
    path = tmp_path / "run.h5"
    result = run_code(f"""
def work(queue):
    import h5py
    queue.put(os.getpid())
context = multiprocessing.get_context("fork")
writer = write({str(path)!r}, [], flush_rows=3, flush_seconds=0.001)
queue, step = context.Queue(), 0
for _ in range(8):
    workers = [context.Process(target=work, args=(queue,)) for _ in range(2)]
    for worker in workers: worker.start()
    for _ in range(10): writer.write(row(step)); step += 1
    for worker in workers: queue.get(timeout=30); worker.join(30); assert worker.exitcode == 0, worker.exitcode
writer.close()
""")
    assert result.returncode == 0, result.stderr
    with open_run(path) as run:
        assert_rows(run, range(80))


def test_a_child_that_outlives_its_parents_run_keeps_no_lock(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, range(3))
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    child = context.Process(target=stop.wait, args=(30,))
    child.start()
    try:
        writer.close("interrupted")
        write(path, range(3, 5), rewind=(3, 0)).close()
        with open_run(path) as run:
            assert_rows(run, range(5))
    finally:
        stop.set()
        child.join()


# ---- threads


def test_threads_write_flush_and_read_at_once(tmp_path):
    path, count = tmp_path / "run.h5", 400
    writer = write(path, [], flush_rows=5, flush_seconds=0.001)
    steps, problems = iter(range(count)), []

    def work():
        try:
            for step in steps:
                writer.write(row(step))
                if step % 50 == 0:
                    writer.write_epoch(step // 50, {"a": step})
                    assert writer.flush()
                    with open_run(path) as run:
                        assert len(run["step"]) == len(run["loss"])
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    closers = [threading.Thread(target=writer.close) for _ in range(3)]
    for thread in closers:
        thread.start()
    for thread in closers:
        thread.join()
    assert not problems
    with open_run(path) as run:
        order = np.argsort(run["step"])
        np.testing.assert_array_equal(run["step"][order], np.arange(count))
        losses = np.array([row(step).loss for step in range(count)])
        np.testing.assert_allclose(run["loss"][order], losses, rtol=1e-6)
        assert run.epochs["epoch"].tolist() == list(range(8))


def test_a_program_that_ends_without_closing_has_a_complete_file(tmp_path):
    path = tmp_path / "run.h5"
    result = run_code(f"writer = write({str(path)!r}, range(7), flush_rows=10**9, flush_seconds=1e9)")
    assert result.returncode == 0, result.stderr
    with open_run(path) as run:
        assert_rows(run, range(7))
        assert run.end == "failed: the program ended without closing it"
    assert not parts_folder(path).exists()


@pytest.mark.slow
def test_forks_at_random_moments(tmp_path):
    path = tmp_path / "run.h5"
    for seed in range(20):
        rng = random.Random(seed)
        delays = [rng.uniform(0, 0.01) for _ in range(30)]
        result = run_code(f"""
writer = write({str(path)!r}, [], overwrite=True, flush_rows=3, flush_seconds=0.001)
writer._store._fan = 3
for step, delay in enumerate({delays}):
    for k in range(5): writer.write(row(5 * step + k))
    time.sleep(delay)
    if os.fork() == 0: sys.exit(0)
while True:
    try: os.wait()
    except ChildProcessError: break
writer.close()
""")
        assert result.returncode == 0, result.stderr
        with open_run(path) as run:
            assert_rows(run, range(150))
