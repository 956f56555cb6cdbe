"""A bare table of losses and weights: always inconclusive, and what in its numbers misleads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradprobe.cli.app import run as command
from gradprobe.errors import DataError
from gradprobe.verdict.answers import plain
from gradprobe.verdict.training_losses import judge_table, parse_table, partial_batches

REPORT = Path(__file__).parent / "fixtures" / "report.csv"
"""The numbers of a report that concluded "solved" from a falling loss."""


def said(text):
    return judge_table(parse_table(text))


def test_the_report():
    found = said(REPORT.read_text())
    assert found.verdict == "INCONCLUSIVE"
    misleading = "\n".join(map(str, found.misleading))
    for phrase in (
        "The weights sum to 4.00 = T^2 with T = 2 tasks",
        "Step 130 is a partial batch: it holds 2 of 8 samples",
        "at step 130 it is 1.014 for that alone, and about 4.06 when corrected (times 4)",
        "The fall of det by 82.4 % is then one of about 30 %, on one batch.",
        "cls did not learn: its loss went from 0.8239 to 0.8495 (+3 %).",
        "A falling training loss (det 5.775 to 1.014) is offered as evidence.",
    ):
        assert phrase in misleading
    assert "The loss of cls goes with" not in misleading
    missing = "\n".join(map(str, found.missing))
    for phrase in ("No gradient was measured", "no control run", "one run", "no metrics on held-out data", "no ledger"):
        assert phrase in missing
    assert found.tasks["det"]["fall"] == pytest.approx(0.824, abs=1e-3)
    assert found.tasks["det"]["fall_corrected"] == pytest.approx(0.298, abs=1e-3)


def test_samples_may_be_those_of_each_batch():
    text = REPORT.read_text().replace("8,1042", "8,8").replace("0.2487,8,8", "0.2487,8,2")
    assert said(text).misleading == said(REPORT.read_text()).misleading


def test_sizes_alone_are_enough_and_without_them_nothing_is_said_of_batches():
    lines = [line.rpartition(",")[0] for line in REPORT.read_text().splitlines()]
    sizes = "\n".join(lines).replace("0.2487,8", "0.2487,2")
    assert any("partial batch" in line for line in map(str, said(sizes).misleading))
    none = "\n".join(line.rpartition(",")[0] for line in lines)
    assert not any("batch" in line for line in map(str, said(none).misleading[1:]))
    assert said(none).verdict == "INCONCLUSIVE"


def test_a_good_looking_table_is_as_inconclusive():
    rows = "\n".join(f"{k},{3 - k / 10},{2 - k / 10},1,1,8,8" for k in range(10))
    found = said("step,loss_a,loss_b,weight_a,weight_b,batch_size,samples\n" + rows)
    assert found.verdict == "INCONCLUSIVE"
    assert len(found.missing) == 5
    assert not any("did not learn" in line or "partial" in line or "T^2" in line for line in map(str, found.misleading))


def test_one_row_does_not_show_that_nothing_was_learned():
    assert said("step,loss_a\n0,1").misleading == []
    assert "its loss went from 1 to 1 (+0 %)" in str(said("step,loss_a\n0,1\n9,1").misleading[0])


def test_weights_whose_sum_wanders_are_told():
    rows = "\n".join(f"{k},1,1,{1 + k},1" for k in range(5))
    found = said("step,loss_a,loss_b,weight_a,weight_b\n" + rows)
    assert any("sum to 3 at one step and 6 at another" in line for line in map(str, found.misleading))


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float64, (6, 4), elements=st.floats(1e-3, 1e3)), st.integers(1, 64))
def test_whatever_the_numbers_it_is_inconclusive_and_plain_json(values, size):
    lines = [",".join(map(str, (k, *row, size, size - k % 2))) for k, row in enumerate(values)]
    text = "step,loss_a,loss_b,weight_a,weight_b,batch_size,samples\n" + "\n".join(lines)
    found = judge_table(parse_table(text))
    assert found.verdict == "INCONCLUSIVE"
    json.dumps(plain(found), allow_nan=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no columns step"),
        ("a,b\n1,2\n", r"no columns step and loss_TASK \(it has: a, b\)"),
        ("step,loss_a\n", "holds no rows"),
        ("step,loss_a\n0,1\n1,much\n", "line 3: 'much' is not a number"),
    ],
)
def test_what_is_no_such_table_is_refused_by_line(text, message):
    with pytest.raises(DataError, match=message):
        parse_table(text)


@pytest.mark.parametrize("is_sum", [True, False])
@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_a_loss_that_goes_with_the_batch_size_is_told_from_one_that_does_not(is_sum, ratio):
    rng = np.random.default_rng(ratio)
    loss = 5 * np.exp(-np.arange(60) / 60) * rng.lognormal(0, 0.1, 60)
    size = np.full(60, 8)
    size[19::20] = 8 // ratio
    if is_sum:
        loss[19::20] /= ratio
    found = partial_batches(loss, size)
    assert found.is_sum == is_sum
    assert found.rows.tolist() == [19, 39, 59]
    if is_sum:
        np.testing.assert_allclose(found.corrected, found.usual, rtol=0.35)


def test_batches_that_are_all_alike_are_not_partial():
    assert partial_batches(np.ones(5), np.full(5, 8)) is None
    assert partial_batches(np.ones(5), np.zeros(5, int)) is None
    assert partial_batches(np.full(5, np.nan), [8, 8, 8, 8, 2]) is None


def test_the_command(capsys):
    assert command(["compare", "--csv", str(REPORT)]) == 11
    shown = capsys.readouterr().out
    assert shown.startswith("Inconclusive")
    assert "What is missing:" in shown
    assert "What in the numbers misleads:" in shown
    assert command(["compare", "--csv", str(REPORT), "--json"]) == 11
    assert json.loads(capsys.readouterr().out)["verdict"] == "INCONCLUSIVE"


def test_the_command_refuses_what_it_cannot_read(tmp_path, capsys):
    assert command(["compare", "--csv", str(tmp_path / "no.csv")]) == 3
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    assert command(["compare", "--csv", str(tmp_path / "odd.csv")]) == 1
    assert "odd.csv: no columns" in capsys.readouterr().err
    assert command(["compare", "some.h5", "--csv", str(REPORT)]) == 2
