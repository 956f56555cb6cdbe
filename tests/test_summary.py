from __future__ import annotations

import json
import re

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from run_factory import make_header, make_rows, make_run, trunk_layers
from typer.testing import CliRunner

from gradprobe import measures
from gradprobe.cli.run_file import summary as command
from gradprobe.errors import RunFileError
from gradprobe.runfile import Run, RunWriter
from gradprobe.summary import CAUTION, conflict_rate, quantiles, sentences, shared_gram, summarise


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("run") / "conflict.h5", rows=90, layers=trunk_layers(), epochs=5)
    with Run(path) as opened:
        yield opened


# ---- numbers


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=30), st.floats(0, 1))
def test_quantiles_are_those_of_the_finite_values(values, probability):
    (found,) = quantiles(values, [probability])
    known = [v for v in values if np.isfinite(v)]
    if known:
        np.testing.assert_allclose(found, np.quantile(known, probability), atol=1e-6)
    else:
        assert np.isnan(found)


def test_quantiles_work_along_any_axis():
    data = np.arange(24.0).reshape(2, 3, 4)
    data[0, 1, 2] = np.nan
    for axis in range(3):
        expected = np.nanquantile(data, [0.25, 0.9], axis=axis)
        np.testing.assert_allclose(quantiles(data, [0.25, 0.9], axis), expected)


def test_the_conflict_rate_counts_measured_steps_only():
    assert conflict_rate([-0.1, np.nan, 0.2, -0.3]) == pytest.approx(2 / 3)
    assert conflict_rate([0.0, 0.0]) == 0
    assert np.isnan(conflict_rate([np.nan]))


def test_the_summary_agrees_with_the_file(run):
    found = summarise(run)
    assert found["file"] == "conflict.h5"
    assert (found["complete"], found["end"], found["trainer"]) == (True, "finished", "gradnorm")
    assert (found["rows"], found["steps"]) == (90, {"first": 0, "last": 890})
    assert (found["layers"], found["parameters"]) == (66, int(run.layer_size.sum()))
    det = found["tasks"]["det"]
    assert det["loss"]["first"] == pytest.approx(np.median(run["loss"][:9, 0]))
    assert det["loss"]["last"] == pytest.approx(np.median(run["loss"][-9:, 0]))
    weight = run["weight"][:, 0]
    assert det["weight"] == pytest.approx(
        {"first": weight[0], "last": weight[-1], "min": weight.min(), "max": weight.max()}
    )
    assert det["grad_norm"]["median"] == pytest.approx(np.median(run["shared_grad_norm"][:, 0]))
    pair = found["pairs"]["det|cls"]
    cosine = run["shared_cosine"][:, 0]
    assert pair["cosine"]["median"] == pytest.approx(np.median(cosine))
    assert pair["cosine"]["rows"] == 90
    assert pair["stochastic_conflict_rate"] == pytest.approx((cosine < 0).mean())
    by_layer = np.median(run["cosine"][:, :, 0], axis=0)
    lowest = np.argsort(by_layer)[:3]
    assert [layer["layer"] for layer in pair["lowest_layers"]] == [run.layers[i] for i in lowest]
    assert pair["lowest_layers"][0]["cosine_median"] == pytest.approx(by_layer.min())
    assert found["overhead"]["share"] == pytest.approx(90 * 0.02 / 18.0)


def test_dominance_and_effects_use_the_weights_in_force(run):
    found = summarise(run)
    norm, weight = run["shared_grad_norm"].astype(float), run["weight"].astype(float)
    part = (weight * norm) ** 2
    assert found["tasks"]["cls"]["dominance"]["median"] == pytest.approx(
        np.median(part[:, 1] / part.sum(axis=1)), rel=1e-6
    )
    effect = {(e["task"], e["by"]): e["median"] for e in found["effect"]}
    inner = run["shared_cosine"][:, 0] * norm[:, 0] * norm[:, 1]
    own = weight[:, 0] * norm[:, 0] ** 2
    assert effect["det", "cls"] == pytest.approx(np.median(weight[:, 1] * inner / own), rel=1e-6)
    assert set(effect) == {("det", "cls"), ("cls", "det")}
    assert found["renamed"] == {"interference": "effect"}  # the old name stays for one version
    assert found["interference"] == found["effect"]


def test_partly_shared_layers_enter_the_gramian_where_both_reach_them(tmp_path):
    reach = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1]], dtype=bool)
    header = make_header(3, list("abc"), reach)
    rows = list(make_rows(header, 6))
    writer = RunWriter(tmp_path / "r.h5")
    writer.start(header)
    for row in rows:
        writer.write(row)
    writer.close()
    with Run(tmp_path / "r.h5") as run:
        found = shared_gram(run)
    expected = np.nansum([row.gram for row in rows], axis=1)  # NaN only where a task does not reach the layer
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_tasks_that_never_meet_have_no_inner_product(tmp_path):
    reach = np.array([[1, 1, 0], [0, 1, 1]], dtype=bool)
    with Run(make_run(tmp_path / "r.h5", rows=5, layers=2, tasks="abc", reach=reach)) as run:
        assert np.isnan(shared_gram(run)[:, 0, 2]).all()
        assert np.isfinite(shared_gram(run)[:, 0, 1]).all()
        effect = {(e["task"], e["by"]): e["median"] for e in summarise(run)["effect"]}
    assert effect["a", "c"] is None
    assert effect["a", "b"] is not None


def test_the_best_epoch_is_the_lowest_of_a_loss_and_the_highest_of_a_score(tmp_path):
    header = make_header(2)
    writer = RunWriter(tmp_path / "r.h5")
    writer.start(header)
    for epoch, value in enumerate([np.nan, 0.4, 0.2, 0.9, 0.5]):
        writer.write_epoch(epoch, {"mAP50": value, "loss_det": value, "empty": np.nan})
    writer.close()
    with Run(tmp_path / "r.h5") as run:
        found = summarise(run)["metrics"]
    assert found["mAP50"]["best"] == {"epoch": 3, "value": 0.9}
    assert found["loss_det"]["best"] == {"epoch": 2, "value": 0.2}
    assert found["mAP50"]["first"] == {"epoch": 1, "value": 0.4}
    assert found["mAP50"]["last"] == {"epoch": 4, "value": 0.5}
    assert found["empty"]["first"] is found["empty"]["best"] is None


def test_rows_without_a_measurement_are_counted_by_reason(tmp_path):
    with Run(make_run(tmp_path / "r.h5", rows=20, bad_rows=[1, 2, 3], end="")) as run:
        found, said = summarise(run), sentences(run)
    assert found["rows_not_measured"] == {"a task's gradient is not finite": 3}
    assert found["pairs"]["det|cls"]["cosine"]["rows"] == 17
    assert found["complete"] is False
    assert any("3 of 20 rows hold less than a full measurement" in s for s in said)
    assert "unfinished" in said[0]


ODD = {
    "no rows": {"rows": 0, "epochs": 0, "end": ""},
    "nothing shared": {"layers": 0},
    "one task": {"tasks": ["det"]},
    "one row": {"rows": 1, "epochs": 1},
    "all NaN": {"bad_rows": range(60)},
    "eight tasks": {"rows": 9, "tasks": list("abcdefgh"), "epochs": 0},
    "no provenance": {"rows": 4, "provenance": {}},
}


@pytest.mark.parametrize("case", ODD)
def test_every_run_has_a_summary_that_is_json_and_words(tmp_path, case):
    with Run(make_run(tmp_path / "r.h5", **ODD[case])) as run:
        found, said = summarise(run), sentences(run)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert said
    for sentence in said:
        assert not re.search(r"\bnan\b|\bNone\b", sentence)
        assert sentence[-1] in ".:"


# ---- words


@pytest.mark.parametrize("case", [{}, *ODD.values()])
def test_the_words_never_claim_that_interference_was_reduced(tmp_path, case):
    with Run(make_run(tmp_path / "r.h5", **case)) as run:
        text = " ".join(sentences(run)).replace(str(CAUTION), "")
    claims = r"solved|reduc|remov|resolv|eliminat|improv|conflict-free|no interference|prov(e|es|ed)\b"
    assert not re.search(claims, text, re.IGNORECASE)


def test_the_words_give_median_spread_rate_and_number_of_steps(run):
    cosine = run["shared_cosine"][:, 0]
    low, middle, high = np.quantile(cosine, [0.25, 0.5, 0.75])
    said = sentences(run)
    assert (
        f"det and cls: cosine over all shared layers has median {middle:+.2f} (middle half {low:+.2f} to "
        f"{high:+.2f}); {100 * (cosine < 0).mean():.0f} % of the 90 measured steps had it below 0 (the stochastic "
        "conflict rate)."
    ) in said
    assert str(CAUTION) in said
    assert "takes a control run" in str(CAUTION)


def test_the_words_tell_weights_that_moved_from_those_that_stayed(run, tmp_path):
    moved = " ".join(sentences(run))
    assert "weight of det went from 1.9 to 1" in moved
    assert "does not depend on the weights" in moved
    with Run(make_run(tmp_path / "r.h5", rows=5, tasks=["det"])) as single:
        assert "weight of det stayed at 1" in " ".join(sentences(single))


def test_without_shared_layers_the_words_speak_of_no_cosine(tmp_path):
    with Run(make_run(tmp_path / "r.h5", layers=0)) as run:
        text = " ".join(sentences(run))
    assert "share no layer" in text
    assert "conflict rate" not in text


def test_many_pairs_are_cut_to_the_lowest_in_words(tmp_path):
    with Run(make_run(tmp_path / "r.h5", rows=9, tasks=list("abcdefgh"))) as run:
        said = [s for s in sentences(run) if "cosine over all shared layers" in s]
        lowest = measures.pairs(run.tasks)[int(np.argmin(np.median(run["shared_cosine"], axis=0)))]
    assert len(said) == 3
    assert said[0].startswith(f"{lowest[0]} and {lowest[1]}:")


# ---- the command

app = typer.Typer()
app.command()(command)


def test_the_command_prints_json_for_programs(run):
    result = CliRunner().invoke(app, [str(run.path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == summarise(run)


def test_the_command_prints_tables_and_words_for_people(run):
    result = CliRunner().invoke(app, [str(run.path)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for text in ("det|cls", "dominance", "mAP50-95", "stochastic conflict rate", str(CAUTION)):
        assert text in result.stdout


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path):
    path = make_run(tmp_path / "r.h5", rows=3, tasks=["[red]a", "[/]b"], epochs=0)
    result = CliRunner().invoke(app, [str(path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "[red]a" in result.stdout
    assert "[/]b" in result.stdout


def test_a_file_that_is_not_there_is_our_error(tmp_path):
    result = CliRunner().invoke(app, [str(tmp_path / "none.h5"), "--json"])
    assert isinstance(result.exception, RunFileError)
