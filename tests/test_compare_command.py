"""``gradprobe compare`` on run files: what it reads, what it prints, and with which code it leaves."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from run_factory import make_run
from verdict_factory import Truth, study, write

from gradprobe.cli.app import run as command
from gradprobe.cli.compare import gather, parse_window
from gradprobe.messages import Language
from gradprobe.verdict.comparison import compare as judge

BASE = Truth(spread=0.01)
STUDY = {
    "joint": BASE,
    "gradnorm": BASE.but(cosine=0.3),
    "worse": BASE.but(cosine=-0.7),
    "lighter": BASE.but(cancelled={"cls>det": 0.1, "det>cls": 0.2}),
    "better": BASE.but(metrics={**BASE.metrics, "accuracy": 0.95}),
    "lopsided": BASE.but(weight=(3.0, 1.0)),
}
SAME = "EQUIVALENT"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    for run in study(STUDY, range(4), rows=24):
        write(place, run)
    return place


def compare(capsys, *words):
    code = command(["compare", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def as_json(capsys, *words):
    code, out, _ = compare(capsys, *words, "--json")
    return code, json.loads(out)


def verdicts(said, question):
    return {answer["arm"]: answer["verdict"] for answer in said["answers"] if answer["question"] == question}


def test_arms_seeds_and_controls_come_from_the_files(folder, capsys):
    _, said = as_json(capsys, folder)
    roles = {arm["name"]: arm["role"] for arm in said["arms"]}
    assert roles == {
        **dict.fromkeys(STUDY, "arm"),
        "joint": "baseline",
        "single-det": "control",
        "single-cls": "control",
    }
    assert next(arm["seeds"] for arm in said["arms"] if arm["name"] == "joint") == [0, 1, 2, 3]
    assert not said["refusals"]


def test_what_is_planted_in_files_is_attributed_to_the_right_answer_and_to_no_other(folder, capsys):
    margins = ("--margin", "0.15", "--outcome-margin", "0.05")  # room for what five arms ask for more than one
    _, said = as_json(capsys, folder, "--pairs", "cls>det", "--metrics", "accuracy", *margins)
    same = dict.fromkeys(("gradnorm", "worse", "lighter", "better", "lopsided"), SAME)
    assert verdicts(said, "direction") == {**same, "gradnorm": "REDUCED", "worse": "INCREASED"}
    assert verdicts(said, "interference") == {**same, "lighter": "REDUCED"}
    assert verdicts(said, "dominance") == {**same, "lopsided": "INCREASED"}
    assert verdicts(said, "outcome") == {**same, "better": "REDUCED"}


def test_how_far_verdicts_reach_is_told_once_and_not_per_line(folder, capsys):
    _, shown, _ = compare(capsys, folder)
    assert shown.count("How far the verdicts reach:") == 1
    assert shown.count("All runs learned from 1 data set, and verdicts hold for that data") == 1
    assert shown.count("absent from 4 seeds in 66 % of studies") == 1
    _, said = as_json(capsys, folder)
    assert len(said["scope"]) == 3
    assert said["answers"][0]["of_means"] is False


def test_a_folder_is_all_its_files(folder, capsys):
    assert as_json(capsys, folder) == as_json(capsys, *sorted(folder.glob("*.h5")))


def test_what_is_read_is_what_was_written(folder):
    for run in study(STUDY, range(4), rows=24):
        (found,) = gather([folder / run.file], [])
        assert (found.arm, found.seed, found.single, found.tasks, found.layers) == (
            run.arm,
            run.seed,
            run.single,
            run.tasks,
            run.layers,
        )
        assert found.finished
        np.testing.assert_allclose(found.loss, run.loss, rtol=1e-6)
        assert found.tested.values == pytest.approx(run.tested.values)
        assert found.plan == run.plan
        assert found.training is None
        if run.probed is None:
            assert found.probed is None
            assert not found.ledger
            continue
        assert found.tested.clusters == run.tested.clusters
        for name, values in run.tested.without.items():
            np.testing.assert_allclose(found.tested.without[name], values)
        for name in ("step", "gram", "noise", "batch_size"):
            np.testing.assert_allclose(getattr(found.probed, name), getattr(run.probed, name), rtol=1e-5, atol=1e-6)
        for name in ("step", "burst", "term", "head", "loss_change", "status"):
            np.testing.assert_allclose(found.ledger[name], run.ledger[name], rtol=1e-5, atol=1e-8)


def test_files_give_the_answers_that_their_content_does(folder):
    """The same comparison from memory and from the disk, which holds single precision."""
    runs = study(STUDY, range(4), rows=24)
    left, right = judge(runs), judge(gather([folder], []))
    mine, theirs = ({(a.question, a.arm, a.subject): a for a in found.answers} for found in (left, right))
    assert mine.keys() == theirs.keys()
    for key, answer in mine.items():
        assert answer.verdict == theirs[key].verdict
        assert answer.effect == pytest.approx(theirs[key].effect, abs=1e-5, nan_ok=True)


def test_words_come_first_and_tables_after(folder, capsys):
    code, out, err = compare(capsys, folder)
    lines = out.splitlines()
    assert "lighter: interference against joint is REDUCED (cls>det), EQUIVALENT (det>cls)." in lines[0]
    assert out.index("point less against each other: gradnorm (det|cls)") < out.index("\nDirection")
    assert "Training loss is no part of any verdict." in lines[-1]
    assert err == ""
    assert code == 0


def test_tables_as_markdown(folder, capsys):
    _, out, _ = compare(capsys, folder, "--table-format", "md")
    assert "| Arm | Subject | Verdict |" in out
    assert r"| gradnorm | det\|cls | REDUCED |" in out


def test_the_magnitude_similarity_stands_beside_the_direct_effect(folder, capsys):
    _, said = as_json(capsys, folder)
    found = {x["arm"]: x for x in said["similarities"]}
    assert set(found) == set(STUDY)
    one = found["lopsided"]
    mean, _ = Language().estimate(one["mean"], one["low95"], one["high95"])
    assert one["mean"] == pytest.approx(found["joint"]["mean"], abs=0.05)  # weights do not enter
    text, md = (compare(capsys, folder, "--table-format", form)[1] for form in ("text", "md"))
    assert text.index("Direct effect") < text.index("Magnitude similarity") < text.index("Layers that changed most")
    row = next(line for line in md.splitlines() if line.startswith(rf"| lopsided | det\|cls | {mean} |"))
    assert row.count(" to ") == 1
    assert re.search(rf"lopsided +det\|cls +{re.escape(mean)}", text)


def test_a_gate_that_trips_comes_before_an_open_question(folder, capsys):
    assert compare(capsys, folder, "--fail-on", "increased")[0] == 10
    quiet = [path for path in folder.glob("*.h5") if path.name[:2] not in ("wo", "lo")]
    assert compare(capsys, *quiet, "--fail-on", "increased")[0] == 0
    two = [path for path in folder.glob("*.h5") if "-0" in path.name or "-1" in path.name]
    assert compare(capsys, *two, "--fail-on", "increased")[0] == 11


def test_arms_by_name_and_pattern(folder, capsys):
    _, said = as_json(
        capsys, "--arm", f"base={folder}/joint-*.h5", "--arm", f"new={folder}/gradnorm-*.h5", "--baseline", "base"
    )
    assert {arm["name"]: len(arm["files"]) for arm in said["arms"]} == {"base": 4, "new": 4}
    assert verdicts(said, "direction") == {"new": "REDUCED"}
    assert verdicts(said, "outcome") == {"new": "NO VERDICT"}


def test_a_named_baseline_and_margin(folder, capsys):
    _, said = as_json(capsys, folder, "--baseline", "gradnorm", "--margin", "0.9", "--pairs", "cls>det")
    assert said["baseline"] == "gradnorm"
    found = verdicts(said, "direction")
    # joint-0 was made twice; of gradnorm and worse, no run was
    assert (found["joint"], found["worse"]) == ("EQUIVALENT", "UNDEFINED")
    _, vouched = as_json(capsys, folder, "--baseline", "gradnorm", "--margin", "0.9", "--pairs", "cls>det", "--paired")
    assert verdicts(vouched, "direction")["worse"] == "INCREASED"
    assert {a["subject"] for a in said["answers"] if a["question"] == "interference"} == {"cls>det"}


def test_a_rule_that_was_changed_is_not_said_to_be_fixed_before(tmp_path, capsys):
    for run in study({"joint": BASE, "gradnorm": BASE}, range(3), rows=24, **{"plan.margin": 0.1}):
        write(tmp_path, run)
    planned, changed = (compare(capsys, tmp_path, *more)[1] for more in ((), ("--margin", "0.9")))
    assert "were fixed before the runs. Below" in planned
    assert "were fixed before the runs, but for what is not as planned. Below" in changed
    assert "margin was planned as 0.1, and this comparison uses 0.9." in changed


def test_without_the_baseline_it_says_so_and_is_inconclusive(folder, capsys):
    code, out, _ = compare(capsys, *folder.glob("gradnorm-*.h5"))
    assert code == 11
    assert out.startswith("No conclusion about interference: there is no control run: no arm 'joint' (arms: gradnorm)")


def test_files_recorded_by_attach(tmp_path, capsys):
    for name in ("a", "b"):
        for k in range(3):
            make_run(tmp_path / f"{name}{k}.h5", rows=8, seed=k, provenance={"trainer": "attach"})
    arms = ("--arm", f"joint={tmp_path}/a*.h5", "--arm", f"b={tmp_path}/b*.h5")
    _, said = as_json(capsys, *arms)
    assert said["arms"][1]["seeds"] == [0, 1, 2]
    assert "do not show that they had the same data" in said["refusals"][0]
    _, said = as_json(capsys, *arms, "--paired")
    assert not [line for line in said["refusals"] if "do not" in line]
    _, said = as_json(capsys, *arms, "--unpaired")
    assert said["paired"] is False
    assert verdicts(said, "direction") == {"b": "NO VERDICT"}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "no run files"),
        (("nowhere.h5",), 3, "nowhere.h5"),
        (("--arm", "joint"), 2, "write NAME=GLOB"),
        (("--arm", "joint=nowhere*.h5"), 2, "no file matches"),
        (("x.h5", "--window", "9:1"), 2, "--window '9:1'"),
        (("x.h5", "--fail-on", "anything"), 2, "--fail-on 'anything'"),
        (("x.h5", "--table-format", "html"), 2, "--table-format 'html'"),
    ],
)
def test_wrong_usage(words, code, message, capsys):
    found, out, err = compare(capsys, *words)
    assert (found, out) == (code, "")
    assert message in err


def test_an_empty_folder_and_a_file_in_two_arms(tmp_path, folder, capsys):
    assert compare(capsys, tmp_path)[0] == 3
    one = folder / "joint-0.h5"
    code, _, err = compare(capsys, "--arm", f"a={one}", "--arm", f"b={one}")
    assert code == 2
    assert "is in arm 'a' already" in err


@pytest.mark.parametrize(("text", "window"), [("", None), ("0:5", (0, 5)), ("100:900", (100, 900))])
def test_windows(text, window):
    assert parse_window(text) == window


def test_no_word_is_split_where_nobody_folds_the_table(folder, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    _, out, _ = compare(capsys, folder)
    assert "p (Holm, one-sided)" in out
    monkeypatch.setenv("COLUMNS", "60")
    _, narrow, _ = compare(capsys, folder)
    assert "p (Holm, one-sided)" not in narrow
