from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import typer
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from run_factory import make_header, make_rows, make_run, trunk_layers
from typer.testing import CliRunner

from gradprobe import plots
from gradprobe.cli.run_file import plot
from gradprobe.display import short
from gradprobe.errors import RunFileError, UsageError
from gradprobe.plots import WHAT, series, style
from gradprobe.plots.figures import heatmap, layers, losses, metrics
from gradprobe.runfile import Run, RunWriter

SINGLE = WHAT[1:]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("run") / "conflict.h5", rows=90, layers=trunk_layers(), epochs=5)
    with Run(path) as opened:
        yield opened


def table(run, what):
    _, tables = plots.make(run, what)
    return pd.read_csv(io.StringIO(tables[what].csv()))


def axes_titled(figure, start):
    return next(ax for ax in figure.get_axes() if ax.get_title(loc="left").startswith(start))


def texts(figure, gid):
    return [t.get_text() for ax in figure.get_axes() for t in ax.texts if t.get_gid() == gid]


# ---- what is drawn


@pytest.mark.parametrize("what", ["losses", "weights", "norms"])
def test_every_task_has_its_own_colour_the_same_in_every_figure(run, what):
    figure, _ = plots.make(run, what)
    lines = {line.get_label(): to_hex(line.get_color()) for line in figure.axes[0].lines}
    assert {task: lines[task] for task in run.tasks} == {
        "det": style.TASK_COLOURS[0].lower(),
        "cls": style.TASK_COLOURS[1].lower(),
    }
    legend = figure.legends[0]
    assert [t.get_text() for t in legend.get_texts()] == list(run.tasks)
    assert [to_hex(h.get_color()) for h in legend.legend_handles] == [lines[t] for t in run.tasks]


def test_metrics_take_the_colour_of_their_task(run):
    figure, _ = plots.make(run, "metrics")
    colours = {line.get_label(): to_hex(line.get_color()) for ax in figure.axes for line in ax.lines}
    det, cls = (to_hex(style.task_colour(run.tasks, t)) for t in run.tasks)
    assert colours["mAP50"] == colours["loss_det"] == det
    assert colours["accuracy"] == colours["loss_cls"] == cls
    assert style.metric_colour(["a", "b_a"], "loss_b_a") == style.TASK_COLOURS[1]
    assert style.metric_colour(["a"], "rmse") == style.GREY


def test_no_two_of_eight_tasks_or_three_pairs_look_the_same():
    assert len({*style.TASK_COLOURS, *style.PAIR_COLOURS, style.GREY}) == 12


def test_norms_stand_on_a_logarithmic_axis_with_their_unit(run):
    figure, _ = plots.make(run, "norms")
    (ax,) = figure.axes
    assert ax.get_yscale() == "log"
    assert "loss per unit of parameter" in ax.get_ylabel()
    assert ax.get_xlabel() == "training step"


def test_the_heatmap_is_fixed_to_minus_one_and_one_with_layers_downwards(run):
    figure, _ = plots.make(run, "heatmap")
    ax = axes_titled(figure, "Cosine by layer")
    (mesh,) = [c for c in ax.collections if c.get_array() is not None]
    assert mesh.get_clim() == (-1, 1)
    assert mesh.get_array().shape == (66, 90)
    bar = next(a for a in figure.axes if a is not ax)
    assert bar.get_ylim() == (-1, 1)
    assert [t.get_text() for t in ax.get_yticklabels()] == list(run.layers)
    assert ax.get_ylim() == (65.5, -0.5)
    assert ax.get_xlim() == (run["step"][0], run["step"][-1] + 10)


def test_missing_and_zero_cells_are_hatched_each_in_its_way(tmp_path):
    reach = np.ones((5, 2), dtype=bool)
    reach[3, 1] = False
    path = make_run(tmp_path / "r.h5", rows=20, layers=5, reach=reach, zero=[(1, 0)], bad_rows=[4])
    with Run(path) as run:
        figure, tables = plots.make(run, "heatmap")
    ax = axes_titled(figure, "Cosine by layer")
    spans = {
        gid: [path.get_extents() for c in ax.collections if c.get_gid() == gid for path in c.get_paths()]
        for gid in ("missing or not finite", "a gradient is exactly zero")
    }
    zero = spans["a gradient is exactly zero"]
    assert [(b.x0, b.x1, b.y0, b.y1) for b in zero] == [(100, 200, 0.5, 1.5)]
    missing = {(b.x0, b.x1, b.y0) for b in spans["missing or not finite"]}
    assert missing == {(40, 50, y) for y in (-0.5, 0.5, 1.5, 3.5)} | {(0, 200, 2.5)}
    hatches = {c.get_gid(): c.get_hatch() for c in ax.collections if c.get_gid()}
    assert len(set(hatches.values())) == 2
    assert all(hatches.values())
    assert {t.get_text() for t in ax.get_legend().get_texts()} == set(hatches)
    frame = pd.read_csv(io.StringIO(tables["heatmap"].csv()))
    assert frame[frame.layer == "model.1.conv"].zero.sum() == 10
    assert frame[frame.layer == "model.3.conv"].cosine.isna().all()


@pytest.mark.parametrize("rows", [1, 2, 199, 200, 201, 3000, 5017])
def test_a_long_run_is_put_together_in_equal_bins(rows):
    edges = heatmap.bins(rows)
    sizes = np.diff(edges)
    assert edges[0] == 0
    assert edges[-1] == rows
    assert len(sizes) <= heatmap.COLUMNS
    assert (sizes[:-1] == sizes[0]).all()
    assert 0 < sizes[-1] <= sizes[0]


def test_binned_cells_are_medians_of_their_rows(tmp_path):
    with Run(make_run(tmp_path / "r.h5", rows=450, layers=2, epochs=0)) as run:
        frame, cosine = table(run, "heatmap"), run["cosine"][:, 1, 0]
    cells = frame[frame.layer == "model.1.conv"]
    assert list(cells.rows) == [3] * 150
    np.testing.assert_array_equal(
        cells.cosine.to_numpy(np.float32), np.median(cosine.reshape(150, 3).astype(float), axis=1).astype("f4")
    )


def test_conflict_per_layer_is_called_stochastic_and_stands_beside_chance(run):
    figure, _ = plots.make(run, "layers")
    (ax,) = figure.axes
    assert ax.get_title(loc="left").startswith("Stochastic conflict rate")
    assert ax.get_xlim() == (0, 1)
    frame = table(run, "layers")
    assert list(frame.layer) == list(run.layers)
    np.testing.assert_allclose(frame.stochastic_conflict_rate, (run["cosine"][:, :, 0] < 0).mean(axis=0))
    outside = (frame.stochastic_conflict_rate < frame.chance_low) | (frame.stochastic_conflict_rate > frame.chance_high)
    drawn = {line.get_gid(): len(line.get_xdata()) for line in ax.lines}
    assert drawn["outside chance"] == outside.sum()
    assert drawn["within chance"] == (~outside).sum()


def test_chance_is_the_binomial_interval():
    from scipy.stats import binom

    steps = np.array([1, 2, 5, 30, 312, 100_000])
    low, high = layers.chance(steps)
    np.testing.assert_allclose(low, binom.ppf(0.025, steps, 0.5) / steps)
    np.testing.assert_allclose(high, binom.ppf(0.975, steps, 0.5) / steps)
    assert np.isnan(layers.chance([0])).all()


def test_the_running_median_ignores_what_is_missing():
    values = np.array([5.0, np.nan, 1.0, np.inf, 3.0])
    low, middle, high = series.running(values, 3)
    np.testing.assert_array_equal(middle, [5, np.nan, 1, np.nan, 3])  # no line where nothing was measured
    known = np.isfinite(values)
    low, middle, high = low[known], middle[known], high[known]
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert np.isnan(series.running(np.full(4, np.nan), 5)).all()


def test_cosines_have_a_symmetric_axis_that_holds_every_point(run):
    figure, _ = plots.make(run, "cosine")
    low, high = figure.axes[0].get_ylim()
    assert low == -high
    assert high >= np.nanmax(np.abs(run["shared_cosine"]))


def test_labels_are_moved_apart_in_order_and_stay_inside():
    places = np.array([0.99, 0.98, 0.5, 0.01, 0.0])
    moved = metrics.spread(places, 0.1)
    assert (np.diff(moved[::-1]) >= 0.1 - 1e-12).all()
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert moved[2] == 0.5


def test_long_layer_names_stay_apart():
    names = [f"backbone.encoder.layers.{i}.attention.self.query.projection" for i in range(30)]
    assert len(set(short(names))) == 30
    assert max(map(len, short(names))) <= 30


# ---- titles


def test_the_title_says_file_trainer_rows_and_unfinished(tmp_path):
    with Run(make_run(tmp_path / "dead.h5", rows=12, bad_rows=[3], end="")) as run:
        figure, _ = plots.make(run)
    title = figure.get_suptitle()
    for part in ("dead.h5", "trainer gradnorm", "12 rows", "steps 0 to 110", "1 not measured", "unfinished"):
        assert part in title


def test_a_finished_run_is_not_called_unfinished(run):
    assert "unfinished" not in style.headline(run)
    assert str(run.path.parent) not in style.headline(run)


# ---- tables


def test_csv_values_equal_those_of_the_run(run):
    for what, column, name in (
        ("losses", "loss", "loss"),
        ("weights", "weight", "weight"),
        ("norms", "grad_norm", "shared_grad_norm"),
    ):
        frame = table(run, what)
        assert list(frame.columns[:3]) == ["step", "epoch", "task"]
        for i, task in enumerate(run.tasks):
            part = frame[frame.task == task]
            np.testing.assert_array_equal(part.step, run["step"])
            np.testing.assert_array_equal(part[column].to_numpy(np.float32), run[name][:, i])
    cosine = table(run, "cosine")
    np.testing.assert_array_equal(cosine.cosine.to_numpy(np.float32), run["shared_cosine"][:, 0])
    cells = table(run, "heatmap").cosine.to_numpy(np.float32)
    np.testing.assert_array_equal(cells.reshape(90, 66), run["cosine"][:, :, 0])
    frame = table(run, "metrics").pivot(index="epoch", columns="metric", values="value")
    for name, values in run.epochs.items():
        if name != "epoch":
            np.testing.assert_array_equal(frame[name], values)


def test_the_overview_csv_is_long_and_holds_every_panel(run, tmp_path):
    _, path = plots.write(run, "overview", tmp_path / "o.png")
    frame = pd.read_csv(path, low_memory=False)
    assert list(frame.columns) == ["panel", "step", "epoch", "layer", "series", "quantity", "value"]
    assert set(frame.panel) == set(SINGLE) - {"features", "updates", "matrix"}
    loss = frame[(frame.panel == "losses") & (frame.quantity == "loss") & (frame.series == "cls")]
    np.testing.assert_array_equal(loss.value.to_numpy(np.float32), run["loss"][:, 1])
    rate = frame[frame.quantity == "stochastic_conflict_rate"]
    assert list(rate.layer) == list(run.layers)


def test_names_with_commas_and_quotes_survive_the_csv(tmp_path):
    with Run(make_run(tmp_path / "r.h5", rows=3, layers=2, tasks=['a,"b', "c\nd"], epochs=1)) as run:
        rows = list(csv.DictReader(io.StringIO(plots.make(run, "losses")[1]["losses"].csv())))
    assert [row["task"] for row in rows] == ['a,"b'] * 3 + ["c\nd"] * 3


# ---- runs that lack something


ODD = {
    "no rows": {"rows": 0, "epochs": 0},
    "no rows, unfinished": {"rows": 0, "epochs": 0, "end": ""},
    "nothing shared": {"layers": 0},
    "one task": {"tasks": ["det"]},
    "one row": {"rows": 1, "epochs": 1},
    "no epochs": {"epochs": 0},
    "all NaN": {"bad_rows": range(60), "epochs": 1},
    "no cosine in one pair": {"tasks": "abc", "reach": np.array([[1, 1, 0], [1, 0, 1]], dtype=bool), "layers": 2},
    "eight tasks": {"rows": 9, "tasks": list("abcdefgh"), "epochs": 2},
    "always zero": {"rows": 3, "layers": 1, "zero": [(0, 0), (0, 1)]},
    "odd names": {"rows": 9, "tasks": ["_a", "$x$ %"], "layers": ["_", "$", "a.b"]},
}


def every_figure(case):
    """Seconds to a minute: each as a file of its own. The overview has all of them in one."""
    return pytest.param(
        case, True, marks=() if case == "odd names" else pytest.mark.slow, id=f"{case}, figure by figure"
    )


@pytest.mark.parametrize(
    ("case", "rendered"),
    [*(pytest.param(case, False, id=case) for case in ODD if case != "odd names"), *map(every_figure, ODD)],
)
def test_every_run_can_be_drawn(tmp_path, case, rendered):
    with Run(make_run(tmp_path / "r.h5", **ODD[case])) as run:
        figure, _ = plots.make(run)
        assert plots.render(figure, "png").startswith(b"\x89PNG")
        for ax in figure.get_axes():  # no empty panels
            said = any(t.get_gid() == "unavailable" for t in ax.texts)
            assert said or ax.lines or ax.collections or ax.patches
        for what in SINGLE:
            draw_or_explain(run, what, rendered)


def draw_or_explain(run, what, rendered):
    try:
        figure, tables = plots.make(run, what)
    except RunFileError as error:
        message = str(error)
    else:
        assert len(tables[what]) > 0
        if rendered:
            assert plots.render(figure, "svg").startswith(b"<?xml")
        return
    assert re.search(r"r\.h5: .*it holds \d+ rows", message)


def test_nan_losses_weights_and_metrics_are_said_not_drawn(tmp_path):
    header = make_header(layers=2)
    with_nan = RunWriter(tmp_path / "r.h5")
    with_nan.start(header)
    for row in make_rows(header, 5):
        row.loss[1], row.weight[:] = np.inf, np.nan
        with_nan.write(row)
    with_nan.write_epoch(0, {"auroc": np.nan, "f1": 0.5})
    with_nan.close()
    with Run(tmp_path / "r.h5") as run:
        figure, _ = plots.make(run)
        plots.render(figure, "png")
        with pytest.raises(RunFileError, match=r"no task weights in this run.*probe.record"):
            plots.make(run, "weights")
    assert any("No task weights" in text for text in texts(figure, "unavailable"))
    notes = texts(figure, "note")
    assert any("no values: cls" in note for note in notes)
    assert any("no values: auroc" in note for note in notes)


def test_a_missing_panel_alone_is_an_error_that_says_what_to_do(tmp_path):
    with Run(make_run(tmp_path / "bare.h5", rows=7, epochs=0)) as run, pytest.raises(RunFileError) as caught:
        plots.write(run, "metrics", tmp_path / "m.png")
    message = str(caught.value)
    assert "bare.h5: no epoch metrics in this run" in message
    assert "7 rows of loss, weight, grad_norm, cosine" in message
    assert "log_metrics" in message
    assert not (tmp_path / "m.png").exists()


def test_rows_that_were_not_measured_give_their_reason(tmp_path):
    reason = pytest.raises(RunFileError, match=r"gradient is not finite \(5 rows\)")
    with Run(make_run(tmp_path / "r.h5", rows=5, bad_rows=range(5))) as run, reason:
        plots.make(run, "cosine")


def test_exact_zeros_are_counted_where_the_axis_cannot_show_them(tmp_path):
    with Run(make_run(tmp_path / "r.h5", rows=20, layers=1, zero=[(0, 1)])) as run:
        figure, tables = plots.make(run, "norms")
        assert texts(figure, "note") == [" exactly 0, not drawn: cls in 10 rows"]
        assert (tables["norms"].values["grad_norm"] == 0).sum() == 10


def test_a_run_that_is_being_written_can_be_drawn(tmp_path):
    header = make_header(layers=4)
    writer = RunWriter(tmp_path / "live.h5", flush_seconds=0.02, flush_rows=5)
    writer.start(header)
    try:
        for row in make_rows(header, 30):
            writer.write(row)
        for _ in range(500):
            with Run(tmp_path / "live.h5") as run:
                if len(run) == 30:
                    break
            threading.Event().wait(0.02)
        with Run(tmp_path / "live.h5") as run:
            figure, tables = plots.make(run)
            assert not run.complete
            assert len(tables["losses"]) == 60
        assert "unfinished" in figure.get_suptitle()
    finally:
        writer.close()


def test_with_many_pairs_the_overview_shows_the_lowest_and_single_figures_show_all(tmp_path):
    with Run(make_run(tmp_path / "r.h5", rows=12, layers=3, tasks=list("abcde"), epochs=0)) as run:
        lowest = run.pairs[int(np.argmin(np.median(run["shared_cosine"], axis=0)))]
        overview = plots.make(run)[1]
        assert set(overview["heatmap"].index["pair"]) == {lowest}
        assert len(set(overview["cosine"].index["pair"])) == 3
        assert overview["cosine"].index["pair"][0] == lowest
        for what in ("cosine", "heatmap", "layers"):
            figure, tables = plots.make(run, what)
            assert set(tables[what].index["pair"]) == set(run.pairs)
            panels = [ax for ax in figure.axes if " | " in ax.get_title(loc="left")]
            assert len(panels) == 10
            assert len({ax.get_ylim() for ax in panels}) == 1


# ---- the world around


def test_drawing_leaves_matplotlib_as_it_was(run):
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"lines.linewidth": 17, "axes.facecolor": "black"}):
        figure, _ = plots.make(run, "losses")
        assert matplotlib.rcParams["lines.linewidth"] == 17
        assert to_hex(figure.axes[0].get_facecolor()) == "#ffffff"
    assert dict(matplotlib.rcParams) == before


def test_figures_are_drawn_in_threads_and_equal(tmp_path):
    path, found = make_run(tmp_path / "r.h5", rows=15, layers=3), []

    def work():
        with Run(path) as run:
            found.append(plots.render(plots.make(run, "cosine")[0], "png"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_every_format_is_written_and_replaces_what_was_there(run, tmp_path, kind, start):
    out = tmp_path / "new" / f"x.{kind}"
    out.parent.mkdir()
    out.write_text("old")
    assert plots.write(run, "weights", out) == [out, out.with_suffix(".csv")]
    assert out.read_bytes().startswith(start)
    assert sorted(p.name for p in out.parent.iterdir()) == sorted([f"x.{kind}", "x.csv"])


def test_a_place_that_cannot_be_written_is_an_error(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFileError, match=r"cannot be written.*--out"):
        plots.write(run, "weights", tmp_path / "file" / "x.png")


def test_an_unknown_figure_or_format_lists_the_known(run, tmp_path):
    with pytest.raises(UsageError, match=", ".join(WHAT)):
        plots.make(run, "gradients")
    with pytest.raises(UsageError, match="png, svg, pdf"):
        plots.write(run, "losses", tmp_path / "x.jpg")


# ---- the command

app = typer.Typer()
app.command()(plot)


def call(*arguments: str | Path):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_writes_beside_the_run_and_says_where_and_what(tmp_path):
    path = make_run(tmp_path / "conflict.h5", rows=12, layers=3)
    result = call(path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == [str(tmp_path / "conflict.png"), str(tmp_path / "conflict.csv")]
    assert "stochastic conflict rate" in result.stdout
    assert all(Path(line).stat().st_size > 100 for line in lines[:2])


def test_the_command_takes_what_format_out_and_no_data(tmp_path):
    path = make_run(tmp_path / "conflict.h5", rows=12, layers=3)
    call(path, "--what", "weights", "--format", "svg")
    assert (tmp_path / "conflict-weights.svg").exists()
    assert (tmp_path / "conflict-weights.csv").exists()
    call(path, "--what", "weights", "--out", tmp_path / "a" / "b.pdf", "--no-data")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.pdf"]
    call(path, "--what", "weights", "--out", tmp_path / "c", "--format", "pdf")
    assert (tmp_path / "c.pdf").exists()


def test_wrong_usage_of_the_command_is_our_error(tmp_path):
    path = make_run(tmp_path / "conflict.h5", rows=3, layers=3)
    assert isinstance(call(path, "--what", "nothing").exception, UsageError)
    assert isinstance(call(path, "--out", "x.png", "--format", "svg").exception, UsageError)
    assert isinstance(call(tmp_path / "none.h5").exception, RunFileError)
    help_text = call("--help").output
    assert all(what in help_text for what in WHAT)


def test_a_figure_belongs_to_no_window(run):
    figure, _ = plots.make(run, "losses")
    assert isinstance(figure, Figure)
    assert getattr(figure.canvas, "manager", None) is None


# ---- figures of one's own

OWN = """
import numpy as np


def counts(run, figure):
    ax = figure.add_subplot()
    ax.plot(run["step"], run["grad_norm"][:, 0])
    return {"step": run["step"], "norm": run["grad_norm"][:, 0, 0]}


def bare(run, figure):
    figure.add_subplot()


def broken(run, figure):
    raise KeyError("nothing")


def uneven(run, figure):
    return {"a": [1, 2], "b": [1]}
"""


def test_a_figure_of_one_s_own_is_drawn_with_its_numbers(tmp_path, monkeypatch):
    (tmp_path / "own_figures.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    path = make_run(tmp_path / "conflict.h5", rows=7, layers=3)
    assert call(path, "--what", "own_figures:counts").exit_code == 0
    assert (tmp_path / "conflict-counts.png").stat().st_size > 1000
    assert list(pd.read_csv(tmp_path / "conflict-counts.csv").columns) == ["step", "norm"]
    assert len(pd.read_csv(tmp_path / "conflict-counts.csv")) == 7

    assert call(path, "--what", "own_figures:bare").exit_code == 0
    assert (tmp_path / "conflict-bare.png").exists()
    assert not (tmp_path / "conflict-bare.csv").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("broken", "figure broken: KeyError: 'nothing'"), ("uneven", "differ in length: a 2, b 1"), ("none", "no attrib")],
)
def test_a_figure_of_one_s_own_that_fails_says_that_it_is_that(name, message, tmp_path, monkeypatch):
    (tmp_path / "own_figures.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    path = make_run(tmp_path / "conflict.h5", rows=7, layers=3)
    with pytest.raises(UsageError, match=message):
        raise call(path, "--what", f"own_figures:{name}").exception
    assert [file.name for file in tmp_path.glob("conflict*")] == ["conflict.h5"]


def test_a_new_figure_is_one_file(tmp_path):
    shutil.copytree(
        Path(plots.__file__).parents[1], tmp_path / "gradprobe", ignore=shutil.ignore_patterns("__pycache__")
    )
    source = Path(losses.__file__).read_text(encoding="utf-8")
    (tmp_path / "gradprobe/plots/figures/twice.py").write_text(source.replace('run["loss"]', '2 * run["loss"]'))
    path = make_run(tmp_path / "conflict.h5", rows=7, layers=3)
    words = [sys.executable, "-m", "gradprobe", "plot", str(path), "--what", "twice"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Run(path) as run:
        expected = 2 * run["loss"].T.ravel()  # task by task
    np.testing.assert_array_equal(pd.read_csv(tmp_path / "conflict-twice.csv")["loss"].astype(np.float32), expected)
