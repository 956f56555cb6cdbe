"""What the writer puts together is what every reader finds: parts that stand for many, sums, and checks."""

from __future__ import annotations

import numpy as np
import pytest
from writing import assert_rows, row, write

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.runfile.integrity import DAMAGED, check_run
from gradprobe.runfile.pieces import part_name, part_paths, part_span, parts_folder


@pytest.fixture
def killed(tmp_path):
    """A run with its first rows merged and the rest in parts, of which some stand for several; then a kill."""
    path = tmp_path / "run.h5"
    writer = write(path, [], flush_rows=10**9, flush_seconds=1000)
    writer._store._fan = 3
    for step in range(31):
        writer.write(row(step))
        assert writer.flush()
    spans = [part_span(p) for p in part_paths(path)]
    assert any(last > first for first, last in spans), spans  # else this test would look at nothing new
    writer._flusher.closing = True
    writer._flusher.stop()
    writer._lock.release()
    return path, spans


def test_combined_parts_are_read(killed):
    path, _ = killed
    with open_run(path) as run:
        assert_rows(run, list(range(31)))
        assert not run.complete
        assert run.sealed


def test_a_refresh_finds_rows_in_combined_parts(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, [], flush_rows=10**9, flush_seconds=1000)
    writer._store._fan = 3
    with open_run(path) as run:
        for step in range(25):
            writer.write(row(step))
            writer.flush()
            run.refresh()
            np.testing.assert_array_equal(run["step"], np.arange(step + 1))
    writer.close()


def test_combined_parts_are_checked_and_none_is_called_missing(killed):
    path, _ = killed
    findings = check_run(path).findings
    assert not [f for f in findings if f.kind == DAMAGED], findings


def test_a_part_missing_between_combined_ones_is_noticed(killed):
    path, spans = killed
    assert len(spans) >= 2
    (parts_folder(path) / part_name(spans[-2])).unlink()
    width = spans[-2][1] - spans[-2][0] + 1
    assert any(f"{width} parts between are missing" in f.what for f in check_run(path).findings)


def test_combined_parts_are_repaired_into_one_file(killed, tmp_path, capsys):
    path, _ = killed
    out = tmp_path / "whole.h5"
    assert command(["check", str(path), "--repair", str(out)]) in (0, 3)
    capsys.readouterr()
    with open_run(out) as run:
        assert_rows(run, list(range(31)))


def test_a_run_left_in_combined_parts_is_gone_on_with(killed):
    path, _ = killed
    writer = write(path, range(20, 40), rewind=(20, 99))
    writer.close()
    with open_run(path) as run:
        assert_rows(run, list(range(40)))
        assert run.sealed
