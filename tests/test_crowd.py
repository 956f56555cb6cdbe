"""Forty tasks in one run: T - 1 passes, pairs stored once, and figures and words that stay readable."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from run_factory import make_run
from torch import nn
from zoo import Collector, naive_gramian

from gradprobe import GradientProbe, measures, plots
from gradprobe.cli import run_file as summary_command
from gradprobe.cli.watch import line, render
from gradprobe.plots.figures import matrix
from gradprobe.runfile import Run, RunWriter
from gradprobe.summary import many_tasks, sentences, summarise
from gradprobe.summary.latest import latest

TASKS = [f"attribute_{i:02}" for i in range(40)]


class Attributes(nn.Module):
    """A trunk, and forty linear heads as of attributes of a face."""

    def __init__(self, tasks=40):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
        self.heads = nn.Linear(24, tasks)

    def losses(self, step, tasks=TASKS):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        wanted = (x @ torch.linspace(-1, 1, 12 * len(tasks)).reshape(12, -1) > 0).float()
        each = nn.functional.binary_cross_entropy_with_logits(self.heads(self.trunk(x)), wanted, reduction="none")
        return dict(zip(tasks, each.mean(0), strict=True))


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    with Run(make_run(tmp_path_factory.mktemp("forty") / "r.h5", rows=12, layers=3, tasks=TASKS, epochs=1)) as run:
        yield run


def texts(figure):
    return [t.get_text() for ax in figure.get_axes() for t in ax.texts]


# ---- measuring


def test_forty_tasks_take_thirty_nine_passes_and_the_joint_backward(monkeypatch):
    torch.manual_seed(0)
    model, sink, passes = Attributes(), Collector(), []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or real(*a, **k))
    with GradientProbe(model, TASKS, [sink], every=1, shared="trunk") as probe:
        for step in range(7):
            model.zero_grad()
            passes.clear()
            losses = model.losses(step)
            probe.backward(losses)
            counted = len(passes)
            expected = naive_gramian(probe.shared.layers, model.losses(step))
            scale = np.sqrt(np.einsum("lii->li", expected))
            apart = np.abs(sink.rows[-1].gram - expected) / scale[:, :, None] / scale[:, None, :]
            assert apart.max() < 1e-5
    assert counted == 39  # the 7th row: of the 1st, 2nd, 4th, ... the derived task is compared with a pass of its own


def test_pairs_are_stored_once(tmp_path):
    sizes = {}
    for rows in (40, 80):
        path = make_run(tmp_path / f"{rows}.h5", rows=rows, layers=3, tasks=TASKS, epochs=0)
        sizes[rows] = path.stat().st_size
        with Run(path) as run:
            assert run["cosine"].shape == (rows, 3, 780)
            expected = measures.pair_cosine(run.gram()[-1])
            np.testing.assert_allclose(run["cosine"][-1], expected, atol=2e-6)
    numbers = (3 + 1) * (780 + 40) + 2 * 40
    per_row = (sizes[80] - sizes[40]) / 40
    assert per_row < 4 * numbers * 1.05  # float32, and little else


def test_the_file_of_a_probe_with_forty_tasks_reads_back(tmp_path):
    torch.manual_seed(0)
    model, kept = Attributes(), Collector()
    with GradientProbe(model, TASKS, [RunWriter(tmp_path / "r.h5"), kept], every=1, shared="trunk") as probe:
        probe.record(model.losses(0))
    with Run(tmp_path / "r.h5") as run:
        assert len(run.pairs) == 780
        np.testing.assert_allclose(run.gram()[0], kept.rows[0].gram, rtol=1e-4, atol=1e-6 * kept.rows[0].gram.max())


# ---- the order of the tasks


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 14), st.integers(0, 2**16))
def test_every_task_stands_once_whatever_is_missing(count, seed):
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, (count, count))
    values = (values + values.T) / 2
    values[rng.random((count, count)) < 0.2] = np.nan
    assert sorted(many_tasks.clustered(values)) == list(range(count))


def test_tasks_that_pull_together_stand_together_whatever_their_order():
    rng = np.random.default_rng(1)
    groups = rng.permutation(np.repeat(np.arange(4), 10))
    directions = rng.normal(size=(4, 30))
    gradients = directions[groups] + 0.5 * rng.normal(size=(40, 30))
    order = many_tasks.clustered(measures.cosine(gradients @ gradients.T))
    assert np.count_nonzero(np.diff(groups[order])) == 3


def test_the_matrix_holds_every_pair_at_both_of_its_places():
    values = np.arange(6.0)
    found = many_tasks.matrix(values, 4)
    for value, (a, b) in zip(values, measures.pairs(range(4)), strict=True):
        assert found[a, b] == found[b, a] == value
    assert np.isnan(np.diagonal(found)).all()


# ---- figures


def test_the_matrix_shows_the_medians_under_their_names(forty):
    figure, tables = plots.make(forty, "matrix")
    ax = figure.axes[0]
    shown = ax.images[0].get_array()
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == [t.get_text() for t in ax.get_xticklabels()]
    assert sorted(names) == TASKS
    middle = np.median(forty["shared_cosine"].astype(float), axis=0)
    for pair, value in zip(forty.pairs, middle, strict=True):
        a, b = (names.index(task) for task in pair.split("|"))
        assert shown[a, b] == shown[b, a] == pytest.approx(value)
    assert ax.images[0].get_clim() == (-1, 1)
    frame = pd.read_csv(io.StringIO(tables["matrix"].csv()))
    assert list(frame.pair) == list(forty.pairs)
    np.testing.assert_allclose(frame.cosine, middle)


def test_a_pair_that_was_never_measured_is_hatched(tmp_path):
    reach = np.ones((2, 12), dtype=bool)
    reach[0, 3], reach[1, 5] = False, False
    reach[1, 3] = reach[0, 5] = False  # tasks 3 and 5 reach nothing
    with Run(make_run(tmp_path / "r.h5", rows=3, layers=2, tasks=TASKS[:12], reach=reach)) as run:
        figure, _ = plots.make(run, "matrix")
        assert "never" not in " ".join(sentences(run))
    assert sum(c.get_gid() == "never measured" for c in figure.axes[0].collections) == 2 * (11 + 10)


@pytest.mark.parametrize(("what", "panels"), [("cosine", 2), ("matrix", 1), ("heatmap", 6), ("layers", 6)])
def test_no_figure_has_a_panel_for_each_of_780_pairs(forty, what, panels):
    figure, _ = plots.make(forty, what)
    assert len([ax for ax in figure.axes if ax.get_title(loc="left")]) == panels
    if panels == 6:
        assert "lowest 6 of 780 pairs" in figure.get_suptitle()


@pytest.mark.parametrize("what", ["losses", "weights", "norms"])
def test_of_forty_tasks_the_outermost_are_named_and_none_is_left_out(forty, what):
    figure, tables = plots.make(forty, what)
    (ax,) = figure.axes
    assert len([ln for ln in ax.lines if ln.get_gid() == "every task"]) == 40
    named = [t.get_text() for t in ax.get_legend().get_texts()]
    assert len(named) == 5
    column = {"losses": "loss", "weights": "weight", "norms": "shared_grad_norm"}[what]
    middle = np.median(forty[column], axis=0)
    assert {named[1], named[2]} <= {TASKS[i] for i in np.flatnonzero(middle >= np.sort(middle)[-2])}
    assert not figure.legends  # forty names with eight colours
    assert len(set(tables[what].index["task"])) == 40


def test_the_overview_of_forty_tasks_has_the_matrix_and_all_its_names(forty):
    figure, tables = plots.make(forty)
    assert plots.render(figure, "png").startswith(b"\x89PNG")
    ax = next(ax for ax in figure.get_axes() if ax.get_title(loc="left").startswith(matrix.TITLE))
    assert len(ax.get_yticklabels()) == 40
    assert len(set(tables["matrix"].index["pair"])) == 780
    heights = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert all(lower.y1 <= upper.y0 + 1.5 for upper, lower in pairwise(heights))


def test_of_forty_metrics_the_outermost_are_named(forty):
    figure, tables = plots.make(forty, "metrics")
    ax = next(ax for ax in figure.axes if ax.get_title(loc="left").startswith("Losses"))
    assert len(ax.lines) == 40
    named = {text.get_text().split()[1] for text in ax.texts if text.get_gid() != "note"}
    assert named == {f"loss_{TASKS[i]}" for i in (0, 1, 2, 37, 38, 39)}
    assert len(set(tables["metrics"].index["metric"])) == 48


def test_up_to_eight_tasks_look_as_before(tmp_path):
    with Run(make_run(tmp_path / "r.h5", rows=4, layers=2, tasks=TASKS[:8])) as run:
        assert "matrix" not in plots.make(run)[1]
        assert len(plots.make(run, "losses")[0].legends[0].get_texts()) == 8
        figure, _ = plots.make(run, "matrix")
    assert sum(len(text) == 5 for text in texts(figure)) == 8 * 7  # "+0.12" in each cell


# ---- in words and in a terminal


def shown(thing, width=200):
    console = Console(width=width, file=io.StringIO())
    console.print(thing)
    return console.file.getvalue()


def test_the_summary_keeps_all_pairs_for_programs_and_few_for_people(forty):
    found = summarise(forty)
    assert len(found["pairs"]) == 780
    printed = "".join(shown(part) for part in summary_command._tables(found))
    named = [pair for pair in forty.pairs if pair in printed]
    assert len(named) == many_tasks.LOWEST
    limit = sorted(pair["cosine"]["median"] for pair in found["pairs"].values())[many_tasks.LOWEST]
    assert all(found["pairs"][pair]["cosine"]["median"] < limit for pair in named)
    said = sentences(forty, found)
    assert max(len(text) for text in said if not text.startswith("Metrics")) < 300
    assert "32 more" in next(text for text in said if text.startswith("Metrics"))
    assert any("40 tasks (attribute_00, attribute_01, attribute_02, ...)" in text for text in said)
    assert any("fell for 40 of 40 tasks" in text for text in said)


def test_the_matrix_of_a_terminal_has_a_line_per_task(forty):
    found = summarise(forty)
    printed = "".join(shown(part) for part in summary_command._tables(found)).splitlines()
    rows = [text.split() for text in printed if text.startswith("attribute_") and "\\" in text]
    assert sorted(name for name, _ in rows) == TASKS
    assert all(len(cells) == 40 for _, cells in rows)
    for place, (name, cells) in enumerate(rows):
        assert cells[place] == "\\"
        for other, mark in zip(rows, cells, strict=True):
            if other[0] != name:
                pair = "|".join(sorted((name, other[0])))
                value = found["pairs"][pair]["cosine"]["median"]
                assert mark == ("█" if value < -0.5 else "-" if value < -0.1 else "·" if value < 0.1 else mark)
                assert (mark in "+#") == (value >= 0.1)


def test_watching_forty_tasks_fits_a_screen(forty):
    seen = latest(forty)
    assert len(seen["pairs"]) == 780
    text = line(seen)
    assert len(text) < 700
    assert "lowest median cosines of 780 pairs" in text
    drawn = shown(render(seen), 120).splitlines()
    assert len(drawn) < 52
    assert sum(text.startswith("attribute_") and "|" not in text for text in drawn) == 40


def test_changes_of_many_are_counted():
    ends = {f"t{i}": (1.0, 1.0 + (i - 3)) for i in range(10)} | {"x": (None, 1.0)}
    assert str(many_tasks.moved(ends)) == "fell for 3 of 10 tasks, rose for 6 (t9, t8, t7, ...), stayed for 1"
    assert str(many_tasks.moved({"a": (1.0, 1.0), "b": (2.0, 2.0)})) == "stayed for all 2 tasks"
    assert many_tasks.spread({"a": None}) is None
