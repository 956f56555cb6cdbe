"""Task gradients where the tasks part: right, nearly free, and no measurement of the parameters'."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from test_probes import WEIGHTS, Split, make
from test_probes_exact import detection_losses
from test_probes_exact import detector as _detector
from torch import nn
from zoo import ZOO, Collector, Heads

import gradprobe
from gradprobe import measures, plots
from gradprobe.errors import ProbeError, RunFileError
from gradprobe.probes import GradientProbe
from gradprobe.rows import FeatureHeader, FeatureRow, Header
from gradprobe.runfile import RunWriter
from gradprobe.runfile.exports import export_run
from gradprobe.runfile.integrity import check_run
from gradprobe.runfile.repair import repair
from gradprobe.summary import sentences, summarise

detector = _detector


def caught(module):
    """The outputs of a module, as its forward makes them."""
    outputs = []
    module.register_forward_hook(lambda *call: outputs.append(call[2]))
    return outputs


def naive(losses, feature):
    gradients = [torch.autograd.grad(loss, feature, retain_graph=True)[0].double().reshape(-1) for loss in losses]
    return np.array([[float(a @ b) for b in gradients] for a in gradients])


SHARED_OUTPUT = dict.fromkeys(ZOO, "trunk") | {"nested": "stages.2"}


@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("tasks", [2, 4])
@pytest.mark.parametrize("name", list(ZOO))
def test_it_is_the_gradient_at_the_output_that_the_heads_share(name, tasks, use):
    tasks = 2 if name == "nested" else tasks
    case, sink = make(name, tasks=tasks), Collector()
    outputs = caught(case.model.get_submodule(SHARED_OUTPUT[name]))
    names = [f"t{i}" for i in range(tasks)]
    with GradientProbe(case.model, names, [sink], level="features") as probe:
        for step in range(3):
            losses = case.losses(step)
            feature = outputs[-1].tanh() if name == "nested" else outputs[-1]
            if name == "nested":  # the feature is the tanh of the last stage; its gradient is taken by the chain rule
                slope = 1 - outputs[-1].detach().tanh() ** 2
                expected = [torch.autograd.grad(v, outputs[-1], retain_graph=True)[0] / slope for v in losses.values()]
                expected = np.array([[float((a * b).sum()) for b in expected] for a in expected])
            else:
                expected = naive(losses.values(), feature)
            getattr(probe, use)(losses, {t: WEIGHTS[t] for t in names})
            np.testing.assert_allclose(sink.feature_rows[-1].gram[0], expected, rtol=1e-9, atol=1e-12)
    assert sink.header.features.features == probe.features
    assert len(probe.features) == 1
    assert probe.features[0].startswith(SHARED_OUTPUT[name])
    assert [row.step for row in sink.feature_rows] == [0, 1, 2]
    assert sink.header.layers == ()
    assert [row.gram.shape for row in sink.rows] == [(0, tasks, tasks)] * 3


def test_it_costs_no_pass(monkeypatch):
    case = make("mlp")
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a pass of its own"))
    with GradientProbe(case.model, ("t0", "t1"), [sink := Collector()], level="features") as probe:
        for step in range(3):
            probe.backward(case.losses(step))
    assert np.isfinite([row.gram for row in sink.feature_rows]).all()


def test_at_both_levels_features_come_at_every_step():
    case, sink = make("mlp"), Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], level="both", every=3) as probe:
        for step in range(7):
            probe.backward(case.losses(step))
    assert [row.step for row in sink.rows] == [0, 3, 6]
    assert [row.step for row in sink.feature_rows] == list(range(7))


def test_features_are_taken_once_per_step_under_accumulation():
    case, sink = make("mlp"), Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], level="both", every=2, accumulate=2) as probe:
        for call in range(6):
            probe.backward(case.losses(call))
    assert [row.step for row in sink.rows] == [0, 2]
    assert [row.step for row in sink.feature_rows] == [0, 1, 2]


def test_a_task_counts_where_all_of_its_way_is_its_own():
    """a and b part after the second layer; c leaves after the first, where a and b come mixed: no feature of two."""
    torch.manual_seed(0)
    model, sink = Split().double(), Collector()
    with GradientProbe(model, ("a", "b", "c"), [sink], level="features") as probe:
        probe.backward(model.losses(torch.randn(5, 4, dtype=torch.float64)))
    assert sink.header.features.features == ("second",)
    gram = sink.feature_rows[0].gram[0]
    assert np.isfinite(gram[:2, :2]).all()
    assert np.isnan(gram[2]).all()


def test_a_feature_used_twice_by_a_task_counts_with_the_sum():
    torch.manual_seed(0)
    layer, sink = nn.Linear(3, 3).double(), Collector()
    outputs = caught(layer)
    with GradientProbe(layer, ("a", "b"), [sink], level="features") as probe:
        z = layer(torch.randn(4, 3, dtype=torch.float64))
        losses = {"a": (z * z).mean() + z.sin().sum(), "b": (z @ z.T).mean()}
        expected = naive(losses.values(), outputs[-1])
        probe.backward(losses, {"a": 2.0, "b": 0.5})
    np.testing.assert_allclose(sink.feature_rows[0].gram[0], expected, rtol=1e-12)


def test_several_outputs_of_one_layer_are_several_features():
    """As box, objectness and class losses share the maps of a detector."""
    torch.manual_seed(0)
    layer, sink = nn.Linear(3, 4), Collector()
    with GradientProbe(layer, ("a", "b"), [sink], level="features") as probe:
        one, other = layer(torch.randn(5, 3)).split(2, dim=1)
        probe.backward({"a": one.mean() + other.sum(), "b": one.pow(2).mean() + other.pow(2).mean()})
    assert len(set(sink.header.features.features)) == 2
    assert sink.header.features.features[1].endswith("#2")
    assert sink.header.features.feature_size.tolist() == [10, 10]


def test_a_feature_keeps_its_name_at_a_step_that_lacks_another_of_its_layer():
    torch.manual_seed(0)
    layer, sink = nn.Linear(3, 4), Collector()
    with GradientProbe(layer, ("a", "b"), [sink], level="features") as probe:
        for used in ({0, 1}, {1}, {0, 1}):
            parts = layer(torch.ones(5, 3)).split(2, dim=1)
            probe.backward({t: sum(k * parts[i].sum() for i in used) for t, k in (("a", 1.0), ("b", 2.0))})
    missing = [np.isnan(row.gram).all(axis=(1, 2)).tolist() for row in sink.feature_rows]
    assert missing == [[False, False], [True, False], [False, False]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_switched_off_or_not_finite_is_missing_and_alone(value):
    case, sink = make("mlp"), Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], level="features") as probe:
        probe.backward(case.losses(0), {"t0": 0.0, "t1": 1.0})
        losses = case.losses(1)
        probe.backward({**losses, "t0": losses["t0"] * value})
    for row in sink.feature_rows:
        assert np.isnan(row.gram[0, 0]).all()
        assert np.isfinite(row.gram[0, 1, 1])


@pytest.mark.parametrize("use", ["record", "backward"])
def test_a_step_at_which_a_task_lacks_the_feature_has_a_row_without_it(use):
    torch.manual_seed(0)
    layer, own, sink = nn.Linear(3, 4), nn.Linear(3, 4), Collector()
    with GradientProbe(nn.ModuleList([layer, own]), ("a", "b"), [sink], level="features") as probe:
        for step in range(3):
            z = layer(torch.randn(5, 3))
            b = own(torch.randn(5, 3)).sum() if step == 1 else z.sin().sum()
            getattr(probe, use)({"a": z.pow(2).mean(), "b": b})
    assert [bool(np.isfinite(row.gram).all()) for row in sink.feature_rows] == [True, False, True]


def test_where_tasks_never_part_it_is_said_once():
    """A forward per task: they share parameters and no feature."""
    case, sink = make("mlp"), Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], level="both", every=1) as probe:
        with pytest.warns(RuntimeWarning, match="no feature was found at which two tasks part"):
            probe.backward({"t0": case.losses(0)["t0"], "t1": case.losses(1)["t1"]})
        probe.backward({"t0": case.losses(2)["t0"], "t1": case.losses(3)["t1"]})
    assert sink.feature_rows == []
    assert len(sink.rows) == 2


def test_features_can_be_named():
    torch.manual_seed(0)
    model, sink = Split(), Collector()
    model.d = nn.Linear(6, 1)
    x = torch.randn(5, 4)

    def losses():
        one = model.first(x).tanh()
        return {"a": model.a(one).mean(), "b": model.b(one.relu()).mean()}

    with GradientProbe(model, ("a", "b"), [sink], level="features", features=["first"]) as probe:
        probe.backward(losses())
    assert sink.header.features.features == ("first",)
    with (
        GradientProbe(model, ("a", "b"), level="features", features="second") as probe,
        pytest.raises(ProbeError, match=r"features=\['second'\]: tasks part at no output.*outputs of: first"),
    ):
        probe.backward(losses())


def test_a_detectors_feature_is_its_pyramids_end(detector):
    outputs, sink = caught(detector.get_submodule(detector.trunk[-1])), Collector()
    with GradientProbe(detector, ("det", "cls"), [sink], level="features") as probe:
        losses = detection_losses(detector)
        expected = naive(losses.values(), outputs[-1])
        probe.backward(losses, {"det": 1.0, "cls": 0.1})
    assert sink.header.features.features == ("model.9.cv2.bn",)
    np.testing.assert_allclose(sink.feature_rows[0].gram[0], expected, rtol=1e-4)


# ---- against the parameters


def jacobian_norm(trunk, x):
    """Largest singular value of the Jacobian of the trunk's output with respect to its parameters."""
    names, values = zip(*trunk.named_parameters(), strict=True)
    rows = torch.autograd.functional.jacobian(
        lambda *p: torch.func.functional_call(trunk, dict(zip(names, p, strict=True)), (x,)).reshape(-1), values
    )
    return float(torch.linalg.matrix_norm(torch.cat([j.flatten(1) for j in rows], 1), ord=2))


def test_it_bounds_what_the_parameters_gradients_are_through_a_training():
    """|g_i| <= s |d_i| and |<g_i, g_j>| <= s^2 |d_i| |d_j|, s the largest singular value of the trunk's Jacobian."""
    torch.manual_seed(0)
    model, sink = Heads(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), 5).double(), Collector()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tightness, differences = [], []
    with GradientProbe(model, ("t0", "t1"), [sink], level="both", every=1, optimizer=optimizer) as probe:
        for step in range(40):
            x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            a, b = model(x)
            s = jacobian_norm(model.trunk, x)
            probe.backward({"t0": (a - x[:, :1]).pow(2).mean(), "t1": (b - x[:, 1:3].sin()).pow(2).mean()})
            optimizer.step()
            optimizer.zero_grad()
            norms, cosines = sink.rows[-1].shared(sink.header.reach)
            bound = s * measures.norm(sink.feature_rows[-1].gram[0])
            inner = cosines[0] * norms[0] * norms[1]
            assert (norms <= bound * (1 + 1e-9)).all()
            assert abs(inner) <= bound[0] * bound[1] * (1 + 1e-9)
            tightness.append(norms / bound)
            differences.append(measures.pair_cosine(sink.feature_rows[-1].gram)[0, 0] - cosines[0])
    assert np.median(tightness) > 0.2  # a bound that says something
    assert np.abs(differences).max() > 0.1  # and no measurement


def test_on_a_real_run_the_two_differ_and_the_file_holds_both(detector, tmp_path):
    path = tmp_path / "run.h5"
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3, momentum=0.9)
    with gradprobe.attach(detector, ("det", "cls"), path, level="both", every=2, optimizer=optimizer) as probe:
        for step in range(12):
            probe.backward(detection_losses(detector, step % 3), {"det": 1.0, "cls": 0.1})
            optimizer.step()
            optimizer.zero_grad()
    with gradprobe.open_run(path) as run:
        features = run.features
        assert features["step"].tolist() == list(range(12))
        assert features["feature"].tolist() == ["model.9.cv2.bn"]
        assert run["step"].tolist() == list(range(0, 12, 2))
        below = run.cosine()[:, 0]
        above = features["cosine"][::2, 0, 0]
        assert np.isfinite(below).all()
        assert np.isfinite(features["grad_norm"]).all()
        assert (features["overhead"] > 0).all()
        assert np.abs(below - above).max() > 0.05
    optimizer.zero_grad()


# ---- the file

TASKS = ("a", "b")


def feature_rows(steps, seed=0):
    stream = np.random.default_rng(seed)
    for step in steps:
        g = stream.normal(size=(2, 2, 5))
        yield FeatureRow(step, step // 10, float(step), np.einsum("fik,fjk->fij", g, g), overhead=0.001)


def header(features=None):
    return Header(TASKS, (), np.zeros(0, np.int64), np.zeros((0, 2), bool), features=features)


def writer(path, **options):
    made = RunWriter(path, flush_seconds=1000.0, flush_rows=10**9, **options)
    made.start(header())
    return made


FEATURE_BYTES = 2 * 2 * 2 * 8
HEADER = FeatureHeader(TASKS, ("p4", "p5"), np.array([640, 320]))


def rows_written(path, steps, **options):
    made = writer(path, **options)
    made.grow(header(HEADER))
    for row in feature_rows(steps):
        made.write(row)
    return made


def test_feature_rows_survive_parts_and_merges(tmp_path):
    path, rows = tmp_path / "run.h5", list(feature_rows(range(30)))
    made = writer(path)
    made.grow(header(HEADER))
    for start in range(0, 30, 10):
        for row in rows[start : start + 10]:
            made.write(row)
        made.flush()
        with gradprobe.open_run(path) as run:  # in its parts
            assert run.features["step"].tolist() == list(range(start + 10))
    made.close()
    with gradprobe.open_run(path) as run:
        found = run.features
        assert run["features/step"].tolist() == list(range(30))
        assert run.read("features/step", stride=7, start=3).tolist() == list(range(3, 30, 7))
        assert run.read("features/step", start=-4).tolist() == [26, 27, 28, 29]
    assert found["step"].tolist() == list(range(30))
    assert found["epoch"].tolist() == [s // 10 for s in range(30)]
    gram = np.array([row.gram for row in rows])
    np.testing.assert_allclose(found["grad_norm"], measures.norm(gram), rtol=1e-6)
    np.testing.assert_allclose(found["cosine"], measures.pair_cosine(gram), atol=1e-6)
    assert found["feature_size"].tolist() == [640, 320]
    with h5py.File(path) as file:
        assert [d.label for d in file["features/cosine"].dims] == ["step", "feature", "pair"]
        assert file["features/grad_norm"].dims[2][0].name == "/task"
        assert "bound" in file["features/grad_norm"].attrs["long_name"]


def test_many_parts_of_features_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(RunWriter, "merge_at", 4)
    path = tmp_path / "run.h5"
    made = writer(path)
    made.grow(header(HEADER))
    for row in feature_rows(range(40)):
        made.write(row)
        made.flush()
        with gradprobe.open_run(path) as run:
            assert run["features/step"].tolist() == list(range(row.step + 1))
    assert len(list(path.with_name("run.h5.parts").glob("*.h5"))) < 12
    made.close()
    with gradprobe.open_run(path) as run:
        assert run["features/step"].tolist() == list(range(40))


def test_a_resumed_run_goes_on_behind_its_cut_features(tmp_path):
    path = tmp_path / "run.h5"
    rows_written(path, range(20)).close()
    made = RunWriter(path, resume=True)
    made.rewind(12, -1)
    made.start(header())
    with gradprobe.open_run(path) as run:
        assert run.features["step"].tolist() == list(range(12))
    made.grow(header(FeatureHeader(TASKS, ("p4", "p5"), np.array([64, 32]))))  # of a smaller batch
    for row in feature_rows(range(12, 15), seed=1):
        made.write(row)
    made.rewind(14, -1)  # and the training goes back once more
    made.close()
    with gradprobe.open_run(path) as run:
        assert run.features["step"].tolist() == list(range(14))
        assert run["features/feature_size"].tolist() == [640, 320]


def test_a_resumed_run_with_other_features_is_refused_and_one_without_keeps_them(tmp_path):
    path = tmp_path / "run.h5"
    rows_written(path, range(6)).close()
    made = RunWriter(path, resume=True)
    made.rewind(5, -1)
    made.start(header())
    with pytest.raises(RunFileError, match=r"holds rows of the features \['p4', 'p5'\].*has \['p3'\]"):
        made.grow(header(FeatureHeader(TASKS, ("p3",), np.array([64]))))
    made.close()
    with gradprobe.open_run(path) as run:
        assert run["features/step"].tolist() == list(range(5))


def test_feature_rows_that_the_disk_does_not_take_are_dropped_with_a_count(tmp_path, monkeypatch):
    monkeypatch.setattr(RunWriter, "keep_bytes", 10 * (FEATURE_BYTES + 1000))
    path = tmp_path / "run.h5"
    made = writer(path)
    made.grow(header(HEADER))
    with monkeypatch.context() as broken:
        broken.setattr("gradprobe.runfile.content.columns", lambda *_: 1 / 0)
        for row in feature_rows(range(25)):
            made.write(row)
        assert not made.flush()
    made.close()
    with gradprobe.open_run(path) as run:
        assert run["features/step"].tolist() == list(range(15, 25))
        assert run.rows_dropped == 15


def test_features_go_into_every_format(tmp_path):
    path = tmp_path / "run.h5"
    rows_written(path, range(8)).close()
    with gradprobe.open_run(path) as run:
        table = run.to_pandas("features/cosine")
        data = run.to_xarray()
        expected = run["features/cosine"]
        folder = export_run(run, "csv", tmp_path / "csv")
        export_run(run, "netcdf", tmp_path / "run.nc")
    assert list(table) == ["step", "feature", "pair", "cosine"]
    assert table["step"].tolist() == [s for s in range(8) for _ in range(2)]
    assert table["feature"].tolist() == ["p4", "p5"] * 8
    np.testing.assert_array_equal(table["cosine"], expected.ravel())
    assert data["features.cosine"].sel({"features.step": 3, "feature": "p5", "pair": "a|b"}) == expected[3, 1, 0]
    lines = (folder / "feature_cosines.csv").read_text().splitlines()
    assert lines[0] == "step,feature,pair,cosine"
    assert lines[2].startswith("0,p5,a|b,")
    assert len((folder / "features.csv").read_text().splitlines()) == 1 + 8 * 2 * 2


def test_damage_in_the_features_is_found_and_the_rest_saved(tmp_path):
    path = tmp_path / "run.h5"
    rows_written(path, range(5000)).close()
    with h5py.File(path) as file:
        dataset = file["features/cosine"]
        right = {name: file["features"][name][()] for name in ("grad_norm", "cosine")}
        place = dataset.id.get_offset() if dataset.chunks is None else dataset.id.get_chunk_info(0).byte_offset
    raw = bytearray(path.read_bytes())
    raw[place + 40 : place + 48] = b"\xff" * 8  # the two features at step 5
    path.write_bytes(raw)
    with gradprobe.open_run(path) as run, pytest.raises(RunFileError, match="damaged"):
        run.features  # noqa: B018
    assert any("features/cosine cannot be read" in finding.what for finding in check_run(path).findings)
    report = repair(path, tmp_path / "new.h5")
    assert any("features/cosine could not be read" in finding.what for finding in report.findings)
    assert not [finding for finding in check_run(tmp_path / "new.h5").findings if finding.kind != "note"]
    with gradprobe.open_run(tmp_path / "new.h5") as run:
        assert run["features/step"].tolist() == list(range(5000))
        assert np.isnan(run["features/cosine"][5]).all()
        for name, values in right.items():  # a damaged block holds more than the bytes that changed
            found = run[f"features/{name}"]
            known = np.isfinite(found)
            assert known.mean() > 0.4
            np.testing.assert_array_equal(found[known], values[known])
        assert run.feature_names == ("p4", "p5")


def test_impossible_feature_rows_are_found(tmp_path):
    path = tmp_path / "run.h5"
    rows_written(path, [0, 1, 2]).close()
    with h5py.File(path, "r+") as file:
        file["features/step"][2] = 1
        file["features/cosine"][1] = 7.0
    words = [finding.what for finding in check_run(path).findings]
    assert "features/step does not increase in 1 rows, first in row 2" in words
    assert "features/cosine is beyond -1 to 1 in 1 rows, first in row 1" in words


def test_a_run_of_features_alone_is_told_and_drawn_as_such(tmp_path):
    case = make("mlp")
    path = tmp_path / "run.h5"
    with gradprobe.attach(case.model, ("t0", "t1"), path, level="features") as probe:
        for step in range(30):
            probe.backward(case.losses(step))
    with gradprobe.open_run(path) as run:
        found = summarise(run)
        cosine, names = run["features/cosine"], run.feature_names
        (feature,) = found["features"]
        assert feature["pairs"]["t0|t1"]["cosine"]["median"] == pytest.approx(float(np.median(cosine)))
        assert feature["pairs"]["t0|t1"]["cosine"]["rows"] == 30
        seconds = run["overhead"].sum(dtype=float) + run["features/overhead"].sum(dtype=float)
        assert found["overhead"]["seconds"] == pytest.approx(seconds)
        said = " ".join(sentences(run))
        figure, tables = plots.make(run, "features")
        assert set(plots.make(run)[1]) == {"losses", "weights", "features"}
        with pytest.raises(RunFileError, match="level='features', which measures no parameters"):
            plots.make(run, "norms")
    assert "tasks t0 and t1, 1 feature, trainer attach" in said
    assert "do not measure it" in said
    assert "share no layer" not in said
    np.testing.assert_array_equal(tables["features"].values["cosine"], cosine[:, 0, 0])
    (ax,) = figure.axes
    line = next(line for line in ax.lines if line.get_gid() == f"raw {names[0]}: t0 | t1")
    np.testing.assert_array_equal(line.get_ydata(), cosine[:, 0, 0])


def test_a_run_without_features_lacks_that_figure(tmp_path):
    case = make("mlp")
    with gradprobe.attach(case.model, ("t0", "t1"), tmp_path / "run.h5") as probe:
        probe.backward(case.losses(0))
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert summarise(run)["features"] == []
        with pytest.raises(RunFileError, match="no features in this run: it was recorded without level='features'"):
            plots.make(run, "features")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("feature"), "no dataset 'features/feature'"),
        (lambda g: g.pop("step"), "no dataset 'features/step'"),
        (lambda g: (g.pop("time"), g.create_dataset("time", data=np.zeros(2))), "'features/time' has shape"),
        (lambda g: (g.pop("step"), g.create_dataset("step", data=np.zeros(3, "<i4"))), "'features/step' holds int32"),
    ],
    ids=["no names", "no steps", "short", "of another type"],
)
def test_a_group_of_features_that_is_not_one_is_refused(change, message, tmp_path):
    path = tmp_path / "run.h5"
    rows_written(path, [0, 1, 2]).close()
    with h5py.File(path, "r+") as file:
        change(file["features"])
    with pytest.raises(RunFileError, match=message):
        gradprobe.open_run(path)


def test_a_run_without_features_has_none(tmp_path):
    writer(tmp_path / "run.h5").close()
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run.features == {}
        assert "features" not in run
