"""What is shared by effect, in new files and in old ones, whose zeros tell it; and rows that lack a task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import growing
import h5py
import numpy as np
import pytest
from growing import TASKS

from gradprobe import measures, open_run
from gradprobe.cli.app import run as command
from gradprobe.cli.replay import replay_run
from gradprobe.ledger.windows import window
from gradprobe.plots.figure import make
from gradprobe.report import bins, study_data
from gradprobe.rows import MISSING_GRADIENT, NONFINITE_GRADIENT, Header, ProbeLoaderRow, Row, absent
from gradprobe.runfile import RunWriter, reached_layers, schema
from gradprobe.runfile.exports import export_run
from gradprobe.runfile.integrity import check_run
from gradprobe.runfile.repair import repair
from gradprobe.runfile.thin import ThinRun
from gradprobe.sinks.scalars import scalars
from gradprobe.summary import sentences, shared_gram, summarise
from gradprobe.verdict import evidence

FIXTURES = Path(__file__).parent / "fixtures"
OLD = ("zero-heads", "layerdrop")


@pytest.fixture(params=OLD)
def old(request, tmp_path):
    """A copy of a file that the last version which went by graphs has made."""
    return Path(shutil.copy(FIXTURES / f"{request.param}.h5", tmp_path / "old.h5"))


def truth(run):
    """Cosines (n,) and norms (n, T) over what both reach, from a bare loop of autograd in float64."""
    told = run.provenance
    return np.array(told["truth.cosine"]), np.stack([told[f"truth.norm.{task}"] for task in run.tasks], axis=1)


def assert_true(run, rows=slice(None)):
    cosine, norm = (values[rows] for values in truth(run))
    for over in (None, list(run.layers)):
        np.testing.assert_allclose(run.cosine(over)[:, 0], cosine, atol=2e-7)
        np.testing.assert_allclose(run.norm(over), norm, rtol=2e-7)
    np.testing.assert_array_equal(run["shared_cosine"], run.cosine().astype(np.float32))
    np.testing.assert_array_equal(run["shared_grad_norm"], run.norm().astype(np.float32))
    assert not run["status"].any()


def test_old_files_are_read_by_effect(old):
    with open_run(old) as run:
        assert not run.by_effect
        assert_true(run)
        shared = run.reach.all(axis=1)
        assert [name for name, both in zip(run.layers, shared, strict=True) if both] == ["first", "second", "third"]
        np.testing.assert_array_equal(run["reach"], run.reach)
        cosine, norm = truth(run)
        for start, stride in ((0, 3), (1, 2), (-4, 1), (-5, 2)):
            chosen = run.read("shared_cosine", start=start, stride=stride)[:, 0]
            np.testing.assert_allclose(chosen, cosine[start:][::stride], atol=2e-7)
        for size, stride in ((3, 1), (4, 2), (4096, 3)):
            blocks = list(run.blocks(len(run), size, stride=stride))
            np.testing.assert_allclose(
                np.concatenate([b["shared_grad_norm"] for b in blocks]), norm[::stride], rtol=2e-7
            )
            assert not np.concatenate([b["status"] for b in blocks]).any()
        thin = ThinRun(run, 3)
        assert_true(thin, slice(None, None, 3))
        diagonal = np.sqrt(np.diagonal(shared_gram(run), axis1=1, axis2=2))
        np.testing.assert_allclose(diagonal, norm, rtol=1e-6)
    assert check_run(old).whole


def test_names_of_what_the_graph_alone_shares_are_told(old):
    with open_run(old) as run:
        found = summarise(run)
        said = "\n".join(sentences(run, found))
        cosine, norm = truth(run)
        assert found["pairs"]["a|b"]["cosine"]["median"] == pytest.approx(np.median(cosine), abs=1e-6)
        assert found["pairs"]["a|b"]["cosine"]["rows"] == 10
        assert found["tasks"]["b"]["grad_norm"]["median"] == pytest.approx(np.median(norm[:, 1]), rel=1e-6)
        assert found["layers"] == 3
        if run.graph_only:
            assert run.graph_only == ("a", "b")
            assert found["layers_by_graph_only"] == ["a", "b"]
            assert "2 layers left out of all sums" in said
            assert "(a, b)" in said
        else:
            assert run.lacking() == {"second": 3, "third": 3}
            assert "6 rows of 10 lack layers" in said
            assert "second in 3, third in 3" in said


def test_what_need_not_be_changed_is_as_it_was_stored():
    for path, changed in ((FIXTURES / "run-1.0.h5", []), (FIXTURES / "layerdrop.h5", [1, 2, 4, 5, 7, 8])):
        with open_run(path) as run, h5py.File(path) as file:
            assert not run.by_effect
            kept = ~np.isin(np.arange(len(run)), changed)
            for name in ("shared_grad_norm", "shared_cosine", "status"):
                np.testing.assert_array_equal(run[name][kept], file[name][()][kept])
            np.testing.assert_array_equal(run["reach"], file["reach"][()])


def test_old_files_are_gone_on_with_and_repaired_right(old, tmp_path):
    repaired = tmp_path / "repaired.h5"
    repair(old, repaired)
    with open_run(repaired) as run:
        assert_true(run)
    with open_run(old) as run:
        header = Header(run.tasks, run.layers, run.layer_size, np.ones((len(run.layers), 2), bool))
        told, gram = truth(run), run.gram()[6]
    writer = RunWriter(old, resume=True)
    writer.rewind(7, 0)
    writer.start(header)
    writer.write(Row(7, 0, 9.0, np.ones(2), np.ones(2), gram))
    writer.close()
    assert check_run(old).whole
    with open_run(old) as run:
        assert run.by_effect
        for over in (None, list(run.layers)):
            np.testing.assert_allclose(run.cosine(over)[:, 0], [*told[0][:7], told[0][6]], atol=2e-7)
        assert run.reach[:3].all()
        assert (run.reach.sum(axis=1)[3:] == 1).all()
        assert not run["status"].any()
    with h5py.File(old) as file:
        np.testing.assert_allclose(file["shared_cosine"][:7, 0], told[0][:7], atol=2e-7)
        assert file["reach"].attrs["basis"] == "gradients"


def test_every_reader_of_an_old_file_goes_by_effect(old, tmp_path, capsys):
    with open_run(old) as run:
        cosine, norm = truth(run)
        recorded = replay_run(run, ["pcgrad"])[0]
        inner = cosine * norm[:, 0] * norm[:, 1]
        weight = run["weight"].astype(float)
        own = np.square(norm)
        expected = (weight * own + weight[:, ::-1] * inner[:, None]) / own
        np.testing.assert_allclose(recorded.progress, expected, rtol=1e-5)
        out = export_run(run, "csv", tmp_path / "csv")
        lines = (out / "rows.csv").read_text().splitlines()
        column = lines[0].split(",").index("shared_cosine.a|b")
        np.testing.assert_allclose([float(line.split(",")[column]) for line in lines[1:]], cosine, atol=2e-7)
        for what in ("overview", "layers", "heatmap", "cosine", "norms"):
            figure, tables = make(run, what)
            assert tables
            figure.clear()
    read = evidence.read(old)
    assert evidence.shared_layers(read, TASKS) == {"first", "second", "third"}
    assert command(["advise", str(old), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {layer["layer"] for layer in said["layers"]} <= {"first", "second", "third"}
    assert said["dual_parameters"] == 200  # 6 x 8 + 8, twice 8 x 8 + 8
    share = np.square(norm) / np.square(norm).sum(axis=1, keepdims=True)
    assert said["dominance"]["a"] == pytest.approx(np.median(share[:, 0]), rel=1e-5)


def test_rows_of_old_files_that_lack_a_layer_are_measured_in_every_table():
    names, stored = ("measured", MISSING_GRADIENT, NONFINITE_GRADIENT), np.array([0, 1, 2, 1], np.uint8)
    for table, expected in ((schema.ROWS, [0, 0, 2, 0]), (schema.PROBE_LOADER, [0, 0, 2, 0]), (schema.UPDATES, stored)):
        np.testing.assert_array_equal(reached_layers.mended_status(names, table, stored), expected)


def test_only_rows_that_may_change_are_looked_at(monkeypatch):
    """Of a long file of an earlier version nearly all is read as it is stored."""
    looked: list[int] = []
    known = reached_layers.mended_rows

    def spy(found, names, table, block, place):
        looked.extend(place.tolist())
        return known(found, names, table, block, place)

    monkeypatch.setattr(reached_layers, "mended_rows", spy)
    with open_run(FIXTURES / "run-1.0.h5") as run:
        assert run["shared_cosine"].shape == (12, 3)
    assert looked == []
    with open_run(FIXTURES / "zero-heads.h5") as run:
        assert run.read("shared_cosine", start=-2).shape == (2, 1)
    assert looked == [8, 9]


def test_old_sums_over_parts_of_updates_go_by_effect(tmp_path):
    with open_run(FIXTURES / "zero-heads.h5") as run:
        trunk = measures.from_norms(run["update/update_norm"][:, :3], run["update/cosine"][:, :3]).sum(axis=1)
        np.testing.assert_allclose(run["update/shared_cosine"], measures.pair_cosine(trunk), atol=1e-6)
        np.testing.assert_allclose(run["update/shared_update_norm"], measures.norm(trunk), rtol=1e-6)
        assert np.isfinite(run["update/shared_cosine"]).all()


def test_a_head_is_no_part_of_what_others_can_cancel():
    """C over the trunk alone: the ledger's own default, and that of layers by name."""
    rng = np.random.default_rng(0)
    rows, term = 12, np.zeros((12, 2, 2, 4))
    term[:, 0, :, :2] = [[-1.0, 0.4], [0.2, -2.0]] + 0.01 * rng.normal(size=(rows, 2, 2))
    term[:, 1, 0, 0] = -9.0  # the head of the first task: the second has a gradient of exactly 0 there
    head = np.zeros((rows, 2))
    table = {
        "step": np.arange(rows),
        "burst": np.zeros(rows, int),
        "status": np.zeros(rows, np.uint8),
        "term": term,
        "head": head,
        "loss_change": term.sum(axis=(1, 3)) + head,
    }
    found, named = window(table, TASKS), window(table, TASKS, layers=[0])
    assert found.interference[0, 1] == pytest.approx(term[:, 0, 0, 1].sum() / -term[:, 0, 0, 0].sum())
    np.testing.assert_array_equal(found.interference, named.interference)
    assert found.passed(0)


def test_rows_of_a_ledger_before_a_layer_joined_count():
    rng = np.random.default_rng(0)
    term = -1 + 0.01 * rng.normal(size=(20, 3, 2, 4))
    term[..., 3] = 0
    term[:9, 2] = np.nan  # not found yet
    term[4] = np.nan  # an end is not known
    table = {
        "step": np.arange(20),
        "burst": np.zeros(20, int),
        "status": np.zeros(20, np.uint8),
        "term": term,
        "head": np.zeros((20, 2)),
        "loss_change": np.nansum(term, axis=(1, 3)),
    }
    assert window(table, TASKS).rows.tolist() == [row for row in range(20) if row != 4]


def graph_says(layers=3):
    return Header(
        TASKS, ("trunk", "head.a", "head.b")[:layers], np.array([9, 4, 5])[:layers], np.ones((layers, 2), bool)
    )


def zero_heads(step):
    """(3, T, T): a trunk and two heads."""
    grads = np.random.default_rng([3, step]).normal(size=(3, 2, 6))
    grads[1, 1] = grads[2, 0] = 0
    return grads @ grads.transpose(0, 2, 1)


@pytest.fixture
def headed(tmp_path):
    """A new file of a run whose graph leads each task to both heads."""
    writer = RunWriter(tmp_path / "run.h5")
    writer.start(graph_says())
    for step in range(12):
        gram = zero_heads(step)
        writer.write(
            Row(step, 0, step, np.ones(2), np.ones(2), gram, batch_size=8, gram_noise=0.01 * gram, micro_batches=2)
        )
        writer.write(ProbeLoaderRow(step, 0, step, np.ones(2), gram, 0.01 * gram, 4, 32))
    writer.close()
    return tmp_path / "run.h5"


def test_a_new_file_says_what_gradients_say(headed):
    with h5py.File(headed) as file:
        assert file["reach"].attrs["basis"] == "gradients"
        assert "gradient other than 0" in file["reach"].attrs["long_name"]
        assert file["reach"][()].tolist() == [[1, 1], [1, 0], [0, 1]]
    trunk = np.stack([zero_heads(step)[0] for step in range(12)])
    with open_run(headed) as run:
        assert run.by_effect
        assert run.graph_only == ("head.a", "head.b")
        for over in (None, list(run.layers)):
            np.testing.assert_allclose(run.cosine(over), measures.pair_cosine(trunk), atol=1e-6)
            np.testing.assert_allclose(run.norm(over), measures.norm(trunk), rtol=1e-6)
        assert np.isnan(run.norm("head.a")).all()
        assert np.isnan(run.estimate("head.a").cosine).all()
        for source in ("training", "probe_loader"):
            whole, alone = run.estimate(source=source), run.estimate("trunk", source=source)
            np.testing.assert_array_equal(whole.cosine, alone.cosine)
        (probed,) = [study_data._probe(run, run.pairs)[:, 1]]
        true = 0.99 * trunk
        expected = bins.pooled_cosines(np.stack([true[:, 0, 1], true[:, 0, 0], true[:, 1, 1]], axis=-1))
        np.testing.assert_allclose(probed, expected, atol=1e-5)


def test_figures_put_what_the_graph_alone_shares_in_brackets(headed):
    with open_run(headed) as run:
        figure, _ = make(run, "layers")
        names = [label.get_text() for ax in figure.axes for label in ax.get_yticklabels()]
    assert "(head.a)" in names
    assert "trunk" in names


def test_a_row_whose_gradient_is_not_finite_has_no_sum(tmp_path):
    writer = RunWriter(tmp_path / "run.h5")
    writer.start(graph_says())
    for step in range(3):
        gram = zero_heads(step)
        gram[0, 0] = gram[0, :, 0] = np.nan if step == 1 else 1.0
        writer.write(
            Row(step, 0, step, np.ones(2), np.ones(2), gram, status=NONFINITE_GRADIENT if step == 1 else "measured")
        )
    writer.close()
    with open_run(tmp_path / "run.h5") as run:
        for over in (None, list(run.layers)):
            assert np.isnan(run.norm(over)[:, 0]).tolist() == [False, True, False]
            assert np.isnan(run.cosine(over)[:, 0]).tolist() == [False, True, False]


THREE = ("a", "b", "c")


@pytest.fixture
def lacking_tasks(tmp_path):
    """Three tasks; from every third row the last is absent."""
    writer = RunWriter(tmp_path / "run.h5")
    writer.start(Header(THREE, ("x", "y"), np.array([3, 4]), np.ones((2, 3), bool)))
    for step in range(30):
        grads = np.random.default_rng([5, step]).normal(size=(2, 3, 6))
        loss, reach, status = np.ones(3), np.ones((2, 3), bool), "measured"
        if step % 3 == 2:
            grads[:, 2] = np.nan
            loss[2], reach[:, 2], status = np.nan, False, absent(["c"])
        gram = grads @ grads.transpose(0, 2, 1)
        writer.write(Row(step, step // 10, step, loss, np.ones(3), gram, status=status, reach=reach))
    writer.close()
    return tmp_path / "run.h5"


def test_an_absent_task_is_in_no_median_and_no_sum(lacking_tasks):
    assert check_run(lacking_tasks).whole
    grads = np.stack([np.random.default_rng([5, step]).normal(size=(2, 3, 6)) for step in range(30)])
    gram = np.einsum("nlik,nljk->nij", grads, grads)
    gram[2::3, 2] = gram[2::3, :, 2] = np.nan
    cosine, norm = measures.pair_cosine(gram), measures.norm(gram)
    with open_run(lacking_tasks) as run:
        found = summarise(run)
        said = "\n".join(sentences(run, found))
        for i, pair in enumerate(run.pairs):
            about = found["pairs"][pair]
            assert about["cosine"]["median"] == pytest.approx(np.nanmedian(cosine[:, i]), abs=1e-6)
            assert about["cosine"]["rows"] == (30 if pair == "a|b" else 20)
        for i, task in enumerate(THREE):
            assert found["tasks"][task]["grad_norm"]["median"] == pytest.approx(np.nanmedian(norm[:, i]), rel=1e-6)
        for over in (None, list(run.layers)):
            assert run.cosine(over) == pytest.approx(cosine, abs=1e-6, nan_ok=True)
            assert run.norm(over) == pytest.approx(norm, rel=1e-6, nan_ok=True)
        assert found["rows_not_measured"] == {"absent at this step: c": 10}
        assert "10 rows with absent tasks" in said
        assert run.lacking() == {}
        assert len(make(run)[1]) > 0
        replayed = replay_run(run, ["pcgrad"])
        assert np.isfinite(replayed[0].progress).all(axis=1).sum() == 20


def test_loggers_follow_layers_that_join():
    from gradprobe.cli.progress import Display
    from gradprobe.rows import GrowingSink
    from gradprobe.sinks.tensorboard import TensorBoardSink
    from gradprobe.sinks.wandb import WandbSink

    assert all(issubclass(kind, GrowingSink) for kind in (Display, TensorBoardSink, WandbSink))

    class Kept:
        def __init__(self):
            self.values = {}

        def add_scalar(self, name, value, at):
            self.values[name, at] = value

    kept = Kept()
    sink = TensorBoardSink(kept)
    sink.start(growing.header(2))
    sink.write(growing.row(0, 2))
    sink.grow(growing.header(5))
    sink.write(growing.row(1, 5))
    sink.write(growing.row(2, 3))
    *_, norm, _ = growing.expected([2, 5, 3])
    for step in range(3):
        assert kept.values["gradprobe/shared_grad_norm/a", step] == pytest.approx(norm[step, 0])
    unsaid = Row(
        0, 0, 0.0, np.ones(2), np.ones(2), zero_heads(0)[:1]
    )  # fewer layers than the header, no reach of its own
    assert scalars(graph_says(), unsaid)["shared_grad_norm/a"] == pytest.approx(np.sqrt(zero_heads(0)[0, 0, 0]))


def test_reach_of_probe_loader_rows_goes_by_row(headed, tmp_path):
    writer = RunWriter(tmp_path / "lacks.h5")
    writer.start(graph_says(2))
    full = [np.random.default_rng([6, s]).normal(size=(2, 2, 4)) for s in range(10)]
    grams = [g @ g.transpose(0, 2, 1) for g in full]
    for step, gram in enumerate(grams):
        writer.write(Row(step, 0, step, np.ones(2), np.ones(2), gram))
        part = gram.copy()
        if step % 2:
            part[1, :, 1] = part[1, 1] = np.nan  # the second task does not reach the second layer at that row
        writer.write(ProbeLoaderRow(step, 0, step, np.ones(2), part, 0 * part, 4, 32))
    writer.close()
    pooled = sum(g[0] + (g[1] if step % 2 == 0 else 0) for step, g in enumerate(grams))
    expected = pooled[0, 1] / np.sqrt(pooled[0, 0] * pooled[1, 1])
    with open_run(tmp_path / "lacks.h5") as run:
        assert run.estimate().cosine[0] == pytest.approx(expected, abs=1e-6)
        assert run.counts(table=schema.PROBE_LOADER)[1].tolist() == [[True, True], [True, False]]
    read = evidence.read(tmp_path / "lacks.h5")
    assert evidence.estimate(read, list(read.layers), TASKS).cosine[0] == pytest.approx(expected, abs=1e-6)
