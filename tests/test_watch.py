"""A run followed from another process while it is recorded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from run_factory import make_header, make_rows, make_run

from gradprobe.cli.app import run as command
from gradprobe.cli.watch import line, render
from gradprobe.runfile import Run, RunWriter, files, lock, open_run
from gradprobe.runfile.pieces import Piece
from gradprobe.summary.latest import latest

needs_locks = pytest.mark.skipif(not lock.LOCKS.exists(), reason="needs Linux's list of locks")


def writing(path, rows=30, layers=4, tasks=("det", "cls"), **options):
    """A recording that goes on, with all its rows on the disk."""
    header = make_header(layers, tasks)
    writer = RunWriter(path, flush_rows=10**9, flush_seconds=1000, **options)
    writer.start(header)
    for row in make_rows(header, rows):
        writer.write(row)
    writer.flush()
    return writer


def test_the_last_rows_in_numbers(tmp_path):
    path = make_run(tmp_path / "run.h5", rows=300, epochs=3)
    with open_run(path) as run:
        seen = latest(run, window=100)
        cosines = run["shared_cosine"][-100:, 0]
        assert (seen["rows"], seen["step"], seen["epoch"], seen["window_rows"]) == (300, 2990, 2, 100)
        assert seen["tasks"]["cls"]["loss"] == run["loss"][-1, 1]
        assert seen["tasks"]["det"]["recent"]["weight"] == run["weight"][-40:, 0].tolist()
        assert seen["pairs"]["det|cls"]["stochastic_conflict_rate"] == (cosines < 0).mean()
        assert seen["pairs"]["det|cls"]["median"] == pytest.approx(np.median(cosines))
        assert seen["metrics"] == {"epoch": 2, **{k: v[2] for k, v in run.epochs.items() if k != "epoch"}}
        assert (seen["state"], seen["end"]) == ("ended", "finished")
        assert 0 <= seen["age_seconds"] < 60


def test_what_was_not_measured_is_no_number(tmp_path):
    with open_run(make_run(tmp_path / "run.h5", rows=5, bad_rows=[3, 4])) as run:
        pair = latest(run)["pairs"]["det|cls"]
    assert pair["cosine"] is None
    assert pair["measured_rows"] == 3
    assert pair["recent"][-2:] == [None, None]
    json.dumps(pair, allow_nan=False)


def bytes_read(monkeypatch) -> list[int]:
    read: list[int] = []
    real = files.SummedFile._read_at

    def counted(self, start, target):
        read.append(len(target))
        real(self, start, target)

    monkeypatch.setattr(files.SummedFile, "_read_at", counted)
    return read


def test_a_long_run_is_not_read_whole(tmp_path, monkeypatch):
    """Of what is added, less than a hundredth is read: the sums, and where the chunks lie."""
    used, sizes = [], []
    for rows in (300_000, 900_000):
        path = long_run(tmp_path / f"{rows}.h5", rows)
        read = bytes_read(monkeypatch)
        with open_run(path) as run:
            latest(run)
            used.append(sum(read))
        sizes.append(path.stat().st_size)
        monkeypatch.undo()
    assert used[1] - used[0] < (sizes[1] - sizes[0]) / 100
    assert used[1] < sizes[1] / 50


def long_run(path: Path, rows: int) -> Path:
    """Written as the merge writes it."""
    from gradprobe.rows import ROWS
    from gradprobe.runfile import content, files

    header = make_header(1)
    (row,) = make_rows(header, 1)
    state = content.State(end="finished")
    block = content.columns(ROWS, [row] * 10_000, header, state)
    blocks = [{**block, "step": np.arange(i, i + 10_000)} for i in range(0, rows, 10_000)]
    stretch = {"": content.Stretch(rows, blocks)}
    files.write_whole(path, lambda file: content.fill(file, header, state, stretch, {}), files.Disk())
    return path


def test_a_second_look_opens_only_what_is_new(tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    writer = writing(path, rows=5)
    rows = list(make_rows(make_header(4), 30))
    with open_run(path) as run:
        for row in rows[5:10]:  # five parts
            writer.write(row)
            writer.flush()
        assert run.refresh()
        assert len(run) == 10
        opened: list[Path] = []
        real = Piece.__init__
        monkeypatch.setattr(Piece, "__init__", lambda self, path, **o: (opened.append(path), real(self, path, **o))[1])
        assert not run.refresh()
        assert opened == []
        writer.write(rows[10])
        writer.flush()
        assert run.refresh()
        assert len(opened) == 1
        assert len(run) == 11
        writer.close()
        assert run.refresh()
        assert run.complete
        assert len(run._files) == 1
        np.testing.assert_array_equal(run["step"], [r.step for r in rows[:11]])


@needs_locks
def test_whether_somebody_records(tmp_path):
    path = tmp_path / "run.h5"
    assert lock.being_recorded(path) is False
    writer = writing(path)
    with open_run(path) as run:
        assert lock.recording_state(run) == "recording"
    writer._closing = True  # as a kill leaves it: no end, no lock
    writer._lock.release()
    with open_run(path) as run:
        assert lock.recording_state(run) == "stopped"


def test_where_the_system_does_not_tell_it_says_so(tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    writer = writing(path)
    monkeypatch.setattr(lock, "LOCKS", tmp_path / "none")
    with open_run(path) as run:
        assert lock.recording_state(run) == "unknown"
    writer.close()


@needs_locks
def test_looking_keeps_no_writer_out(tmp_path):
    """A writer can begin at any moment of a look: the lock is never taken by a reader."""
    path = tmp_path / "run.h5"
    writing(path).close()
    with open_run(path) as run:
        latest(run)
        second = RunWriter(path, resume=True)
        assert lock.being_recorded(path)
        second.close()


# ---- the command


RECORD = """
import sys, time
sys.path.insert(0, {tests!r})
from run_factory import make_header, make_rows
from gradprobe.runfile import RunWriter
header = make_header(4)
writer = RunWriter({path!r}, flush_rows=5, flush_seconds=0.05)
writer.start(header)
for row in make_rows(header, 60):
    writer.write(row); time.sleep(0.05)
    if row.step == 0: writer.flush(); print("going", flush=True)
writer.close()
"""


def recording(path: Path) -> subprocess.Popen[str]:
    code = RECORD.format(tests=str(Path(__file__).parent), path=str(path))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def watching(path: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gradprobe", "watch", str(path), "--interval", "0.1", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_locks
def test_two_follow_one_recording_to_its_end_from_before_its_file_is_there(tmp_path):
    path = tmp_path / "run.h5"
    watchers = [watching(path, "--json"), watching(path)]
    for watcher in watchers:  # each is there before the file is, however busy the machine
        assert watcher.stderr is not None
        assert "waiting for it" in watcher.stderr.readline()
    with recording(path) as recorder:
        said = [watcher.communicate(timeout=60) for watcher in watchers]
        assert [w.returncode for w in watchers] == [0, 0], said
        recorder.wait(timeout=60)
        assert recorder.returncode == 0
    seen = [json.loads(text) for text in said[0][0].splitlines()]
    assert seen[-1]["rows"] == 60
    assert seen[-1]["state"] == "ended"
    assert {s["state"] for s in seen[:-1]} == {"recording"}
    assert [s["rows"] for s in seen] == sorted(s["rows"] for s in seen)
    assert len(seen) > 3  # it was seen as it went
    lines = said[1][0].splitlines()
    assert lines[-1].startswith("finished: epoch 2, step 590, 60 rows")
    assert "\x1b" not in said[1][0]  # no terminal, no animation


@needs_locks
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_recording_ends_the_watch_with_what_to_do(tmp_path):
    path = tmp_path / "run.h5"
    with recording(path) as recorder:
        assert recorder.stdout is not None
        recorder.stdout.readline()
        watcher = watching(path)
        time.sleep(0.7)
        recorder.kill()
    _, errors = watcher.communicate(timeout=60)
    assert watcher.returncode == 3
    assert f"gradprobe record --resume {path}" in errors


def test_once_for_programs(tmp_path, capsys):
    path = tmp_path / "run.h5"
    writer = writing(path, rows=30)
    before = sorted(Path(tmp_path / "run.h5.parts").iterdir())
    assert command(["watch", str(path), "--once", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["rows"] == 30
    assert seen["end"] == ""
    assert sorted(Path(tmp_path / "run.h5.parts").iterdir()) == before
    writer.close()


def test_once_on_a_file_that_is_not_there(tmp_path, capsys):
    assert command(["watch", str(tmp_path / "none.h5"), "--once"]) == 3
    assert "no such file" in capsys.readouterr().err
    began = time.monotonic()
    assert command(["watch", str(tmp_path / "none.h5"), "--wait", "0.2"]) == 3
    assert time.monotonic() - began < 10


def test_a_run_without_rows_says_so(tmp_path):
    path = tmp_path / "run.h5"
    writer = writing(path, rows=0)
    with open_run(path) as run:
        assert line(latest(run)).endswith("no row yet")
        assert "no row yet" in drawn(latest(run))
    writer.close()


def drawn(seen) -> str:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(render(seen))
    console.file.close()
    return console.export_text()


def test_the_terminal_shows_it_all_and_takes_no_name_for_markup(tmp_path):
    path = make_run(tmp_path / "run.h5", rows=100, tasks=("det", "[red]", "seg"))
    with Run(path) as run:
        text = drawn(latest(run))
    for part in ("finished  epoch 2, step 990, 100 rows", "det|[red]", "stochastic conflict rate", "mAP50 0.95", "▁"):
        assert part in text, text
    assert "…" not in text  # the newest values are at the right, and would be cut off
