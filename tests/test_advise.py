"""``gradprobe advise`` on runs of which the answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from run_factory import make_header, make_run, trunk_layers

from gradprobe.cli.app import run as command
from gradprobe.rows import Row
from gradprobe.runfile import RunWriter
from gradprobe.verdict.advice import advise, equal_progress

SIZE = 400


def gramians(cosines, rows=60, lengths=(1.0, 1.0), noise=0.4, seed=0):
    """(n, L, 2, 2) of noisy gradients about true ones with these cosines."""
    rng = np.random.default_rng(seed)
    truth = []
    for c in cosines:
        a, b = np.linalg.qr(rng.normal(size=(SIZE, 2)))[0].T
        truth.append([lengths[0] * a, lengths[1] * (c * a + np.sqrt(1 - c * c) * b)])
    truth = np.array(truth)
    g = truth + noise / np.sqrt(SIZE) * rng.normal(size=(rows, *truth.shape)) * np.array(lengths)[:, None]
    return g @ g.transpose(0, 1, 3, 2)


def look(gram, weight=(1.0, 1.0), loss=(1.0, 1.0)):
    n, layers = gram.shape[:2]
    tile = [np.tile(v, (n, 1)) for v in (loss, weight)]
    return advise(gram, np.full(layers, SIZE), np.ones((layers, 2), bool), *tile)


def test_conflicting_layers_are_found_and_ranked_with_an_interval_that_holds_the_truth():
    found = look(gramians([0.3, -0.5, 0.3, -0.2, 0.3]))
    assert [layer for layer, _ in found.layers.ranked()][:2] == [1, 3]
    assert found.layers.conflicting[:, 0].tolist() == [False, True, False, True, False]
    true = -0.5 / (1 + 0.16)  # noise lengthens both
    assert found.layers.low[1, 0] < true < found.layers.high[1, 0]
    assert found.direction == []  # together they agree
    assert not found.nothing_to_do


def test_direction_is_told_from_dominance():
    direction = look(gramians([-0.4] * 4))
    assert (direction.direction, direction.dominant) == ([0], [])
    dominance = look(gramians([0.3] * 4, lengths=(10.0, 1.0)))
    assert (dominance.direction, dominance.dominant) == ([], [0])
    evened = look(gramians([0.3] * 4, lengths=(10.0, 1.0)), weight=(0.1, 1.0))
    assert evened.dominant == []


@pytest.mark.parametrize("seed", range(5))
def test_nothing_to_do_where_there_is_nothing(seed):
    assert look(gramians([0.3, 0.1, 0.2, 0.4], seed=seed)).nothing_to_do
    assert look(gramians([0.0] * 20, seed=seed)).nothing_to_do  # orthogonal, within noise


def test_the_weights_equalise_relative_progress():
    gram, loss = np.array([[100.0, 2.0], [2.0, 1.0]]), np.array([2.0, 0.5])
    weights = equal_progress(gram, loss)
    shares = gram @ weights / loss
    assert shares[0] == pytest.approx(shares[1])
    assert weights.sum() == pytest.approx(2)
    assert equal_progress(np.array([[100.0, 9.0], [9.0, 1.0]]), np.array([1.0, 1.0])) is None  # det would need < 0
    assert equal_progress(np.ones((2, 2)), loss) is None
    assert equal_progress(gram, np.array([np.nan, 1.0])) is None
    found = look(gramians([0.1] * 3, lengths=(10.0, 1.0)))
    assert found.weights[0] < 0.1 < 1.5 < found.weights[1]


def write(path, gram, **provenance):
    header = make_header([f"model.{i}.conv" for i in range(gram.shape[1])], provenance=provenance)
    header.layer_size[:] = SIZE
    writer = RunWriter(path)
    writer.start(header)
    for step, one in enumerate(gram):
        writer.write(Row(step, 0, step * 0.1, np.ones(2), np.ones(2), one))
    writer.close("finished")
    return path


def test_the_command_says_what_to_try(tmp_path, capsys):
    path = write(tmp_path / "run.h5", gramians([-0.4, -0.4, 0.5, -0.4]), model={"parameters": 8000})
    assert command(["advise", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "Direction: det and cls point against each other" in shown
    assert f"--trainer split --from {path} --top-k 3" in shown.replace("\n", "")
    assert "A dual backbone would take 1,600 parameters more, 20 % of the model's 8,000." in shown
    assert "Nothing to do" not in shown
    assert command(["advise", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in said["layers"] if not row["conflicting"]] == ["model.2.conv"]
    assert said["dual_parameters"] == 1600


def test_the_command_says_when_there_is_nothing_to_do(tmp_path, capsys):
    path = write(tmp_path / "run.h5", gramians([0.3, 0.2, 0.4]))
    assert command(["advise", str(path)]) == 0
    assert "Nothing to do" in capsys.readouterr().out


def test_real_shapes_and_empty_runs(tmp_path, capsys):
    assert command(["advise", str(make_run(tmp_path / "a.h5", layers=trunk_layers(), tasks=("a", "b", "c")))]) == 0
    for name, options, message in (
        ("b", {"bad_rows": range(60)}, "fewer than three measured rows"),
        ("c", {"layers": []}, "not applicable"),
        ("d", {"rows": 0, "epochs": 0}, "fewer than three measured rows"),
    ):
        assert command(["advise", str(make_run(tmp_path / f"{name}.h5", **options))]) == 3
        assert message in capsys.readouterr().err
