"""Long runs: writing costs what it did at the start, and looking takes bounded time and memory."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_factory import make_run
from writing import assert_rows, row, write

from gradprobe import open_run, plots
from gradprobe.runfile import RunWriter, content, files, thin
from gradprobe.runfile.pieces import part_name, part_span, parts_due
from gradprobe.summary import sentences, summarise


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 6), st.integers(1, 600))
def test_parts_of_a_width_stay_few_and_a_row_is_rarely_written_again(fan, count):
    widths, moved = [], 0
    for _ in range(count):
        widths.append(1)
        taken = parts_due(widths, fan)
        if taken:
            moved += sum(widths[-taken:])
            widths[-taken:] = [sum(widths[-taken:])]
        assert max(map(widths.count, widths)) < fan
        assert widths == sorted(widths, reverse=True)
    assert sum(widths) == count
    digits = int(np.ceil(np.log(count + 1) / np.log(fan) - 1e-9))
    assert moved <= count * digits


def test_names_of_parts_lead_there_and_back():
    for span in ((1, 1), (7, 7), (1, 32), (10**8, 10**8 + 5)):
        assert part_span(Path(part_name(span))) == span
    for other in ("lock", "x.h5", "1-2-3.h5", "-1.h5", "00000001.h5.tmp", "\u0663.h5"):
        assert part_span(Path(other)) is None


def test_a_long_recording_writes_each_row_a_few_times_only(tmp_path, monkeypatch):
    """Whole files that grow by a part each time would write each row hundreds of times."""
    monkeypatch.setattr(RunWriter, "merge_at", 4)
    monkeypatch.setattr(files.Disk, "sync", lambda self, descriptor: None)
    rows_written = []
    real = content.whole_chunks

    def counting(blocks, *size):
        for block in real(blocks, *size):
            rows_written.append(len(block["step"]))
            yield block

    monkeypatch.setattr(content, "whole_chunks", counting)
    path = tmp_path / "run.h5"
    writer = write(path, [], flush_rows=10**9, flush_seconds=1e9)
    for step in range(450):
        writer.write(row(step))
        if step % 3 == 2:
            assert writer.flush()
    writer.close()
    with open_run(path) as run:
        assert_rows(run, range(450))
    assert sum(rows_written) < 9 * 450  # 150 parts: at most 4 digits of base 4, the main file doubling, the end


def test_pieces_are_put_together_into_whole_chunks():
    sizes, step = [3, 5, 1, 12, 2, 0, 4], iter(range(100))
    blocks = [{"step": np.array([next(step) for _ in range(size)], dtype=np.int64)} for size in sizes]
    found = list(content.whole_chunks(blocks, 5))
    assert [len(block["step"]) for block in found] == [5, 5, 5, 5, 5, 2]
    np.testing.assert_array_equal(np.concatenate([block["step"] for block in found]), np.arange(27))


@pytest.fixture
def long_run(tmp_path, monkeypatch):
    """83 rows seen through every 9th: at most 10."""
    monkeypatch.setattr(thin, "ROWS", 10)
    monkeypatch.setattr(thin, "_FEWEST_ROWS", 1)
    return make_run(tmp_path / "long.h5", rows=83, tasks=("a", "b", "c"), bad_rows=[4])


def test_a_long_run_is_seen_through_every_kth_row(long_run):
    with open_run(long_run) as run:
        seen = thin.thin(run)
        assert (seen.every, len(seen)) == (9, 10)
        for name in ("step", "cosine", "loss", "shared_cosine", "status"):
            np.testing.assert_array_equal(seen[name], run[name][::9])
        np.testing.assert_array_equal(seen.read("cosine", stride=2, layers=1), run["cosine"][::18, 1])
        np.testing.assert_array_equal(seen.cosine("model.2"), run.cosine("model.2")[::9])
        np.testing.assert_array_equal(np.concatenate([b["step"] for b in seen.blocks(10, 4)]), run["step"][::9])
        assert thin.thin(seen) is seen
        assert thin.whole(seen) is run
        seen.close()
        assert len(run["step"]) == 83  # it stays open


def test_a_short_run_is_seen_whole(tmp_path):
    with open_run(make_run(tmp_path / "short.h5", rows=20)) as run:
        seen = thin.thin(run)
        assert (seen.every, len(seen)) == (1, 20)
        assert summarise(run)["looked_at"] == {"every": 1, "rows": 20}
        assert not any("one row in" in said for said in sentences(run))


def test_what_is_exact_of_a_long_run_and_what_is_said_of_the_rest(long_run):
    with open_run(long_run) as run:
        found, said = summarise(run), sentences(run)
        assert found["rows"] == 83
        assert found["steps"] == {"first": 0, "last": 820}
        assert found["looked_at"] == {"every": 9, "rows": 10}
        assert sum(found["rows_not_measured"].values()) == 1  # row 4 is none of those looked at
        for i, task in enumerate(run.tasks):
            assert found["tasks"][task]["weight"]["last"] == run["weight"][-1, i]
            assert found["tasks"][task]["loss"]["last"] == pytest.approx(np.median(run["loss"][-8:, i]))
            norms = run["shared_grad_norm"][::9, i]
            assert found["tasks"][task]["grad_norm"]["median"] == pytest.approx(np.median(norms))
        assert found["pairs"]["a|b"]["cosine"]["rows"] == 10
        assert any("use one row in 9 (10 rows)" in text for text in said)


def test_a_figure_of_a_long_run_says_what_it_was_drawn_from(long_run):
    with open_run(long_run) as run:
        for what in ("overview", "losses", "weights", "norms", "cosine", "heatmap", "layers"):
            figure, _ = plots.make(run, what)
            assert "83 rows, steps 0 to 820, 1 not measured, drawn from every 9th row" in figure.get_suptitle()
        assert set(csv_steps(plots.make(run, "losses")[1]["losses"])) == set(range(0, 830, 90))
        assert any("dots: every 9th row" in text for text in notes(plots.make(run, "losses")[0]))


def csv_steps(table):
    return [int(line["step"]) for line in csv.DictReader(table.csv().splitlines())]


def notes(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]
