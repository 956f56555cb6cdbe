"""What the run file costs: the training thread per row, and a run of a million rows to write, keep and read.

    python benchmarks/runfile.py [--rows 1000000] [--folder DIR]

Times are of this machine at this moment; beside each stands what issue and docs promise. The million rows take some
minutes and 2 GB of disk while they are merged.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from gradprobe.rows import Header, Row
from gradprobe.runfile import RunWriter, files, open_run

POOL = 500

PEAK = """
def peak():
    # Not getrusage: on Linux a child begins with the peak of its parent.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
"""


class CountingDisk(files.Disk):
    """Counts the bytes that it writes."""

    written = 0

    def write(self, descriptor, data, offset):
        done = super().write(descriptor, data, offset)
        self.written += done
        return done


def header(layers: int, tasks: int) -> Header:
    names = [f"model.{i}.conv" for i in range(layers)]
    reach = np.ones((layers, tasks), dtype=bool)
    return Header([f"task{i}" for i in range(tasks)], names, np.full(layers, 1000), reach, {"trainer": "benchmark"})


def grams(layers: int, tasks: int) -> list:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(POOL, layers, tasks, 16))
    return list(gradients @ gradients.transpose(0, 1, 3, 2))


def make_rows(count: int, layers: int, tasks: int):
    pool, loss, weight = grams(layers, tasks), np.linspace(1, 2, tasks), np.ones(tasks)
    for step in range(count):
        # A gram of its own for every row, as a probe makes it.
        yield Row(step, step // 1000, step * 0.1, loss, weight, pool[step % POOL].copy(), 1e-3, 0.01, 16)


def main_thread(layers: int, tasks: int, pause: float, count: int, folder: Path) -> dict[str, float]:
    """Microseconds per row as the training thread sees them, its waiting for the writer thread included."""
    path = folder / f"main{layers}x{tasks}.h5"
    loop(make_rows(count // 4, layers, tasks), lambda row: None, 0.0)  # warm
    bare = loop(make_rows(count, layers, tasks), lambda row: None, pause)[1]
    writer = RunWriter(path, overwrite=True)
    writer.start(header(layers, tasks))
    times, whole = loop(make_rows(count, layers, tasks), writer.write, pause)
    writer.close()
    with open_run(path) as run:
        dropped = run.rows_dropped
    micro = np.array(times) * 1e6
    return {
        "mean": micro.mean(),
        "p99": np.quantile(micro, 0.99),
        "max": micro.max(),
        "slower": (whole - bare) / count * 1e6,
        "dropped": dropped,
    }


def loop(rows, write, pause: float) -> tuple[list[float], float]:
    """Seconds in each call of ``write``, and of the whole loop but its pauses: making the rows is Python that the
    writer thread may hold up."""
    times, began, paused = [], time.perf_counter(), 0.0
    for row in rows:
        if pause:
            started = time.perf_counter()
            time.sleep(pause)
            paused += time.perf_counter() - started
        started = time.perf_counter()
        write(row)
        times.append(time.perf_counter() - started)
    return times, time.perf_counter() - began - paused


def write_long(path: Path, count: int) -> None:
    disk = CountingDisk()
    started = time.perf_counter()
    writer = RunWriter(path, overwrite=True, disk=disk)
    writer.start(header(60, 2))
    for row in make_rows(count, 60, 2):
        writer.write(row)
        if row.step % 20_000 == 19_999:
            assert writer.flush(600)  # faster than any training: wait for the disk now and then, to lose none
    writing = time.perf_counter() - started
    writer.close()
    closing = time.perf_counter() - started - writing
    size = path.stat().st_size
    print(
        f"{count:,} rows of 60 x 2 x 2: {size / 1e6:.0f} MB (promised: 1,000 per million rows); "
        f"{count / writing:,.0f} rows/s; closing {closing:.1f} s; written {disk.written / size:.1f} times its size"
    )


WRITE = (
    PEAK
    + """
import runpy, sys
bench = runpy.run_path(sys.argv[1])
bench["write_long"](bench["Path"](sys.argv[2]), int(sys.argv[3]))
print(f"  peak memory of the writing process {peak():.0f} MB")
"""
)


MEASURE = (
    PEAK
    + """
import os, sys, time
started = time.perf_counter()
from gradprobe.__main__ import main
sys.argv = ["gradprobe", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(f"{time.perf_counter() - started} {peak()}", file=sys.stderr)
"""
)


def command(*words: str) -> tuple[float, float]:
    """Seconds and peak MB of a command, its imports included."""
    result = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True)
    seconds, peak = map(float, result.stderr.split()[-2:])
    return seconds, peak


def read_long(path: Path) -> None:
    for words, promised in ((["summary"], 2), (["plot"], 5)):
        best = min(command(*words, str(path)) for _ in range(3))
        print(f"gradprobe {words[0]}: {best[0]:.2f} s, peak {best[1]:.0f} MB (promised: {promised} s, bounded memory)")
    for name in ("cosine", "grad_norm"):
        started = time.perf_counter()
        with open_run(path) as run:
            run.read(name, layers=30)
        print(f"{name} of one layer, all rows: {time.perf_counter() - started:.3f} s (promised: 0.5 s)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, h5py {h5py.__version__} (HDF5 {h5py.version.hdf5_version})"
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print("microseconds of the training thread per row (promised: mean 50 and 250)")
        for layers, tasks, count in ((60, 2, 20_000), (100, 10, 2_000)):
            for pause, how in ((0.001, "a row per ms"), (0.0, "without a pause")):
                found = main_thread(layers, tasks, pause, count // (4 if pause else 1), Path(folder))
                print(
                    f"  {layers:3} layers, {tasks:2} tasks, {how:20}: in write: mean {found['mean']:.1f}, 99 % "
                    f"{found['p99']:.1f}, longest {found['max']:,.0f}; the whole loop is slower by "
                    f"{found['slower']:.1f}; {found['dropped']:.0f} rows dropped"
                )
        path = Path(folder) / "long.h5"
        subprocess.run([sys.executable, "-c", WRITE, __file__, path, str(arguments.rows)], check=True)
        read_long(path)


if __name__ == "__main__":
    main()
