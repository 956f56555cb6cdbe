"""The test split with one cluster of images left out: made, stored, read, checked, exported, repaired."""

from __future__ import annotations

import csv
import math

import h5py
import numpy as np
import pytest
from run_factory import make_header, make_rows

from gradprobe.cli.app import run as command
from gradprobe.errors import RunFileError
from gradprobe.rows import TestClusters
from gradprobe.runfile import RunWriter, open_run
from gradprobe.runfile.exports import export_run
from gradprobe.runfile.files import seal
from gradprobe.runfile.integrity import check_run
from gradprobe.runfile.repair import repair
from gradprobe.trainers.evaluation import FEWEST_GROUPS, MOST_GROUPS, MOST_IMAGES, leave_out

FOUND = TestClusters(
    ("patient001", "größe\x1b"), np.array([3, 1]), ("mAP50", "accuracy"), np.array([[0.5, math.nan], [0.25, 1.0]])
)


class Mean:
    """Scores whose only metric is a mean."""

    def __init__(self, names, values):
        self.names, self.values, self.asked = tuple(names), np.array(values, dtype=float), 0

    def metrics(self, keep=None):
        self.asked += 1
        chosen = self.values if keep is None else self.values[keep]
        return {"mean": float(chosen.mean())}


@pytest.fixture
def run(tmp_path):
    return written(tmp_path / "run.h5", FOUND)


def written(path, found):
    header = make_header(2)
    writer = RunWriter(path)
    writer.start(header)
    for row in make_rows(header, 4):
        writer.write(row)
    writer.write_test(found)
    writer.close()
    return path


# ---- made


def test_each_cluster_is_left_out_once():
    scores = Mean(["p1_1", "p2_1", "p1_2", "p3_1"], [1, 2, 3, 6])
    found = leave_out(scores, [name.split("_")[0] for name in scores.names])
    assert (found.clusters, found.size.tolist(), found.metrics) == (("p1", "p2", "p3"), [2, 1, 1], ("mean",))
    assert found.without[:, 0].tolist() == [4, 10 / 3, 2]


def test_one_cluster_alone_has_no_jackknife():
    assert leave_out(Mean(["a", "b"], [1, 2]), ["p", "p"]) is None
    assert leave_out(Mean([], []), []) is None


def test_its_standard_error_is_that_of_clusters_and_not_of_images():
    """Against the textbook's: of K clusters of equal size, the mean has the variance of the cluster means over K."""
    draw = np.random.default_rng(0)
    values = np.repeat(draw.normal(size=20), 5) + 0.1 * draw.normal(size=100)
    found = leave_out(Mean(map(str, range(100)), values), [str(index // 5) for index in range(100)])
    k = len(found.clusters)
    error = math.sqrt((k - 1) / k * np.square(found.without - found.without.mean(0)).sum())
    means = values.reshape(20, 5).mean(1)
    assert error == pytest.approx(means.std(ddof=1) / math.sqrt(20), rel=1e-9)
    assert error > 2 * values.std(ddof=1) / math.sqrt(100)


@pytest.mark.parametrize(("images", "groups"), [(96, MOST_GROUPS), (500, 20), (MOST_IMAGES, FEWEST_GROUPS), (30, 30)])
def test_what_it_costs_is_bounded(images, groups):
    scores = Mean(map(str, range(images)), np.arange(images))
    found = leave_out(scores, scores.names)
    assert len(found.clusters) == scores.asked == groups
    assert found.size.sum() == images
    assert found.size.max() - found.size.min() <= 1
    if groups < images:
        assert found.clusters[0] == f"0 and {found.size[0] - 1} more"


def test_detection_and_classification_metrics_are_those_of_the_images_that_are_left():
    """Against an evaluation of the other images alone."""
    from training import make

    from gradprobe.trainers.evaluation import METRIC_NAMES, score

    training = make("joint")
    scores = training.problem.score(training.model, training.test_loader, device="cpu")
    found = leave_out(scores, training.problem.clusters(training.test_loader.dataset))
    training.probe.close()
    assert found.clusters == training.test_loader.dataset.names
    (whole,) = training.test_loader
    others = score(training.model, [whole.part(1, 8)]).metrics()
    for name, value in zip(found.metrics, found.without[0], strict=True):
        expected = math.nan if name.startswith("loss") else others[name]
        assert value == pytest.approx(expected, nan_ok=True, abs=1e-6), name
    assert found.metrics == METRIC_NAMES


# ---- stored


def test_they_come_back(run):
    with open_run(run) as found:
        assert found.test_clusters["cluster"].tolist() == ["patient001", "größe\ufffd"]
        assert found.test_clusters["size"].tolist() == [3, 1]
        assert found.test_clusters["metric"].tolist() == ["mAP50", "accuracy"]
        np.testing.assert_array_equal(found.test_clusters["without"], FOUND.without)
        np.testing.assert_array_equal(found.to_xarray()["test.without"], FOUND.without)
    assert check_run(run).whole


def test_a_run_without_them_has_none(tmp_path):
    path = written(tmp_path / "none.h5", None)
    with open_run(path) as found:
        assert found.test_clusters == {}
    assert check_run(path).whole


def test_they_are_exported(run, tmp_path):
    with open_run(run) as found:
        out = export_run(found, "csv", tmp_path / "csv")
    with (out / "test_clusters.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["cluster", "size", "mAP50", "accuracy"],
        ["patient001", "3", "0.5", ""],
        [rows[2][0], "1", "0.25", "1.0"],
    ]


def test_they_are_repaired(run, tmp_path):
    with h5py.File(run, "r+"):  # cuts the sums off
        pass
    assert not check_run(run).whole
    repair(run, tmp_path / "repaired.h5")
    with open_run(tmp_path / "repaired.h5") as found:
        np.testing.assert_array_equal(found.test_clusters["without"], FOUND.without)


def test_what_cannot_be_is_found(tmp_path):
    path = written(tmp_path / "run.h5", FOUND)
    with h5py.File(path, "r+", libver=("v108", "v110")) as file:
        file["test/size"][0] = 0
        file["test/without"][0, 0] = math.inf
    with path.open("rb+") as raw:
        seal(raw)
    found = [finding.what for finding in check_run(path).findings]
    assert found == ["test/size is below 1", "test/without is infinite"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda group: group.__delitem__("size"), "has no dataset 'test/size'"),
        (
            lambda group: replaced(group, "without", np.zeros((2, 3))),
            r"'test/without' has shape \(2, 3\), not \(2, 2\)",
        ),
        (lambda group: replaced(group, "size", np.zeros(2, "<f4")), "'test/size' holds float32, not int64"),
    ],
)
def test_a_table_of_another_form_is_refused(run, change, message):
    with h5py.File(run, "r+") as file:
        change(file["test"])
    with pytest.raises(RunFileError, match=message):
        open_run(run)


def replaced(group, name, values):
    del group[name]
    group[name] = values


# ---- from the command line


def test_a_recording_of_clips_leaves_each_out(tmp_path):
    out = tmp_path / "run.h5"
    assert command(["record", "--data", "dial:size=64", "--trainer", "joint", "--epochs", "1", "--out", str(out)]) == 0
    with open_run(out) as run:
        found = run.test_clusters
        full = {str(name): run.provenance[f"test.{name}"] for name in found["metric"]}
        assert found["cluster"].tolist() == [f"clip{index:02d}" for index in range(24)]
        assert found["size"].tolist() == [8] * 24
        # equal clusters: the mean of the means without each is the mean
        np.testing.assert_allclose(found["without"].mean(0), list(full.values()), rtol=1e-9)
        assert found["without"][:, 2:].std(0).min() > 0
    assert check_run(out).whole
