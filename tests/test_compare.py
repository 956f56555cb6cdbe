"""A comparison of runs whose truth is planted: the right answer, not the others, and everything that it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from verdict_factory import TASKS, Truth, again, alone, make, shortened, study

from gradprobe.errors import UsageError
from gradprobe.messages import Message
from gradprobe.verdict import gates
from gradprobe.verdict.answers import (
    EQUIVALENT,
    INCREASED,
    NO_VERDICT,
    NOT_APPLICABLE,
    QUESTIONS,
    REDUCED,
    UNDEFINED,
    plain,
)
from gradprobe.verdict.comparison import compare
from gradprobe.verdict.criteria import Criteria
from gradprobe.verdict.evidence import SplitScores

BASE = Truth()
CLAIMS = ("REDUCED", "REDUCED (size uncertain)", "INCREASED")


def answer(found, question, subject, arm="arm"):
    (one,) = (a for a in found.answers if (a.question, a.subject, a.arm) == (question, subject, arm))
    return one


def claimed(found, arm="arm"):
    """Question and subject of everything that is said to have fallen or risen."""
    return {(a.question, a.subject): a.verdict for a in found.answers if a.arm == arm and a.verdict in CLAIMS}


def but(run, **said):
    """The run with entries of its provenance replaced; None takes one away."""
    merged = {**run.provenance, **{name.replace("__", "."): value for name, value in said.items()}}
    return replace(run, provenance={name: value for name, value in merged.items() if value is not None})


METRIC_UP = {"mAP50": 0.7, "mAP50-95": 0.45, "accuracy": 0.8}


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ({}, {}),
        ({"cosine": 0.3}, {("direction", "det|cls"): REDUCED}),
        ({"cosine": -0.7}, {("direction", "det|cls"): INCREASED}),
        ({"cancelled": {"cls>det": 0.1, "det>cls": 0.2}}, {("interference", "cls>det"): REDUCED}),
        ({"cancelled": {"cls>det": 0.5, "det>cls": 0.6}}, {("interference", "det>cls"): INCREASED}),
        ({"weight": (3.0, 1.0)}, {("dominance", "largest share"): INCREASED}),
        (
            {"metrics": METRIC_UP},
            {("outcome", "mAP50"): REDUCED, ("outcome", "mAP50-95"): REDUCED, ("outcome", "Delta-m"): REDUCED},
        ),
    ],
    ids=["nothing", "direction", "worse direction", "interference", "the other pair", "dominance", "outcome"],
)
def test_a_planted_effect_is_attributed_to_the_right_answer_and_to_no_other(planted, expected):
    # Three seeds of each arm more than needed, so that it is not the luck of a draw that decides.
    base = BASE.but(spread=0.01)
    found = compare(study({"joint": base, "arm": base.but(**planted)}, range(8)))
    assert claimed(found) == expected
    assert {a.question for a in found.answers} == set(QUESTIONS)
    assert not found.refusals


def test_the_numbers_are_those_that_were_planted():
    base = BASE.but(spread=0.01)
    found = compare(study({"joint": base, "arm": base.but(cosine=0.1, cancelled={"cls>det": 0.2, "det>cls": 0.2})}))
    assert answer(found, "direction", "det|cls").effect == pytest.approx(-0.4, abs=0.05)
    one = answer(found, "interference", "cls>det")
    assert one.effect == pytest.approx(-0.3, abs=0.03)
    assert one.effect == pytest.approx(np.mean(np.subtract(one.arm_values, one.baseline_values)))
    level = next(x for x in found.levels if (x.arm, x.subject) == ("joint", "cls>det"))
    assert level.low95 < np.mean(one.baseline_values) < level.high95
    assert str(found.headline[0]) == "arm: interference against joint is REDUCED (cls>det), EQUIVALENT (det>cls)."
    assert "cls cancels (C) is 0." in str(found.headline[1])


def test_a_task_that_is_driven_backwards_is_told():
    found = compare(study({"joint": BASE.but(cancelled={"cls>det": 1.3, "det>cls": 0.2})}))
    level = next(x for x in found.levels if x.subject == "cls>det")
    assert str(level.sentence).endswith("more than all of it: on the shared layers the task is driven backwards.")


def test_what_is_worse_than_the_baseline_is_listed():
    base = BASE.but(spread=0.01)
    found = compare(study({"joint": base, "arm": base.but(cancelled={"cls>det": 0.8, "det>cls": 0.2})}))
    assert [(a.question, a.subject) for a in found.increased] == [("interference", "cls>det")]
    assert not found.open


def test_json_holds_everything_and_no_nan():
    found = plain(compare(study({"joint": BASE, "arm": BASE}, range(3))))
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text) == found
    assert found["arms"][0] == {
        "name": "joint",
        "role": "baseline",
        "files": ["joint-0.h5", "joint-1.h5", "joint-2.h5"],
        "seeds": [0, 1, 2],
    }
    first = found["answers"][0]
    assert {"question", "arm", "subject", "verdict", "rule", "p_zero", "p_zero_holm", "gates", "reason"} <= set(first)
    assert first["gates"][0].keys() == {"name", "passed", "value", "limit", "sentence"}


def test_the_order_of_the_files_changes_nothing():
    runs = study({"joint": BASE, "arm": BASE.but(cosine=0.2)}, range(4))
    left, right = (compare(order) for order in (runs, runs[::-1]))
    for question, subject in (("direction", "det|cls"), ("interference", "cls>det"), ("outcome", "accuracy")):
        one, other = (answer(found, question, subject) for found in (left, right))
        assert (one.verdict, one.effect, one.low95) == (other.verdict, other.effect, other.low95)


# ---- what it refuses


def test_without_a_baseline_there_is_no_conclusion():
    found = compare(study({"gradnorm": BASE}))
    assert str(found.headline[0]).startswith("No conclusion about interference: there is no control run")
    assert found.answers == []
    assert found.open


def test_an_arm_that_trains_more_tasks_is_compared_in_those_of_both():
    def and_more(run):
        wide = replace(run, tasks=(*TASKS, "seg"), reach=np.ones((3, 3), bool), ledger={}, probed=None)
        return replace(wide, loss=np.tile(run.loss[:, :1], 3), weight=np.ones((len(run.step), 3)))

    runs = study({"joint": BASE, "arm": BASE.but(metrics=METRIC_UP)}, range(3))
    found = compare([and_more(run) if run.arm == "arm" else run for run in runs])
    assert answer(found, "direction", "det|cls").verdict == NO_VERDICT
    assert answer(found, "interference", "cls>seg").verdict == NOT_APPLICABLE
    assert answer(found, "outcome", "mAP50").effect == pytest.approx(-0.1, abs=0.05)


def test_one_arm_alone_is_compared_with_nothing():
    found = compare(study({"joint": BASE}))
    assert str(found.headline[0]) == "No conclusion about interference: there is nothing to compare joint with."
    assert [level.arm for level in found.levels] == ["joint"] * 4


def test_without_a_task_alone_nothing_is_said_of_what_sharing_costs():
    found = compare(study({"joint": BASE, "arm": BASE}, controls=False))
    one = answer(found, "outcome", "accuracy")
    assert one.verdict == NO_VERDICT
    assert "no run of cls alone" in str(one.reason)
    assert "no conclusion about what sharing costs" in str(found.refusals[0])
    assert answer(found, "interference", "cls>det").verdict == EQUIVALENT


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_are_a_description(seeds):
    found = compare(study({"joint": BASE, "arm": BASE.but(cosine=0.5)}, range(seeds)))
    assert {a.verdict for a in found.answers} == {NO_VERDICT}
    one = answer(found, "direction", "det|cls")
    assert f"from {seeds} seed" in str(one.reason)
    assert "there is a description and no verdict" in str(one.reason)
    assert np.isfinite(one.effect)
    assert str(found.headline[0]).startswith("No conclusion about interference")
    assert found.open


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({"data__fingerprint": "another"}, "data"),
        ({"model__reference": "another"}, "initial weights"),
        ({"batches__hash": "another"}, "batches"),
        ({"batches__count": 60}, "budget"),
        ({"settings__epochs": 6}, "budget"),
        ({"settings__micro_batches": 4}, ""),  # of one side alone: nothing to compare it with
    ],
)
def test_other_data_weights_or_budget_are_refused_unless_unpaired(said, word):
    runs = study({"joint": BASE, "arm": BASE.but(cosine=0.3)})
    runs = [but(run, **said) if run.arm == "arm" else run for run in runs]
    found = compare(runs)
    if not word:
        assert not found.refusals
        return
    assert f"differ in {word}" in str(found.refusals[0])
    assert claimed(found) == {}
    assert {a.verdict for a in found.answers} == {NO_VERDICT}
    free = compare(runs, Criteria(paired=False))
    assert not free.refusals
    assert answer(free, "direction", "det|cls").verdict == REDUCED
    assert any(f"differ in {word}" in str(said) for said in free.warnings)


def test_a_run_that_ended_early_has_another_budget():
    runs = study({"joint": BASE, "arm": BASE})
    found = compare([replace(run, finished=False) if run.file == "arm-2.h5" else run for run in runs])
    assert "one of them did not come to its end" in str(found.refusals[0])


def test_unpaired_runs_are_compared_by_welch():
    runs = study({"joint": BASE, "arm": BASE.but(cancelled={"cls>det": 0.3, "det>cls": 0.2})}, range(6))
    paired_, free = compare(runs), compare(runs, Criteria(paired=False))
    one, other = (answer(found, "interference", "cls>det") for found in (paired_, free))
    assert one.effect == pytest.approx(other.effect)
    assert other.high95 - other.low95 > one.high95 - one.low95  # seeds differ more than the two runs of one
    assert np.isfinite(one.sign_flip)
    assert np.isnan(other.sign_flip)


def test_files_that_do_not_show_how_they_were_made_are_paired_only_on_demand():
    hidden = {"data__fingerprint": None, "model__reference": None, "batches__hash": None}
    runs = [but(run, **hidden) for run in study({"joint": BASE, "arm": BASE})]
    found = compare(runs)
    assert "do not show that they had the same data, initial weights, batches" in str(found.refusals[0])
    assert not compare(runs, Criteria(paired=True)).refusals


def test_files_without_seeds_are_taken_in_their_order_and_paired_only_on_demand():
    runs = [replace(run, seed=None) for run in study({"joint": BASE, "arm": BASE}, twice=False)]
    found = compare(runs)
    assert "do not name their seeds" in str(found.refusals[0])
    assert compare(runs, Criteria(paired=True)).arms[1].seeds == [0, 1, 2, 3, 4]


def test_seeds_of_one_arm_alone_are_left_out_and_told():
    runs = [run for run in study({"joint": BASE, "arm": BASE}, range(6)) if run.file != "arm-3.h5"]
    found = compare(runs)
    assert answer(found, "direction", "det|cls").n == 5
    assert any("seeds 3 are in one of them only" in str(said) for said in found.warnings)


def test_values_that_differ_stand_in_the_order_of_the_names_before_them():
    runs = [but(run, settings__epochs=6) if run.arm == "arm" else run for run in study({"joint": BASE, "arm": BASE})]
    said = str(compare(runs).refusals[0])
    assert said.startswith("arm-0.h5 and joint-0.h5 (seed 0) differ in budget (settings.epochs 6 and 3).")
    free = compare(runs, Criteria(paired=False))
    assert "arm and joint differ in budget (settings.epochs 6 and 3), and are compared all the same." in map(
        str, free.warnings
    )


def test_two_files_of_one_seed_with_other_settings_are_refused():
    runs = study({"joint": BASE, "arm": BASE})
    other = but(next(run for run in runs if run.file == "arm-1.h5"), settings__lr=0.5)
    with pytest.raises(UsageError, match=r"^two files named arm-1\.h5 are both of arm 'arm' and seed 1"):
        compare([*runs, other])
    with pytest.raises(UsageError, match=r"arm-1\.h5 and other\.h5 are both of arm 'arm' and seed 1"):
        compare([*runs, replace(other, file="other.h5")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Criteria(pairs=["det>seg"]), "--pairs 'det>seg'"),
        (Criteria(pairs=["det"]), "--pairs 'det'"),
        (Criteria(metrics=["loss_det"]), "loss_det is a loss"),
        (Criteria(margin=0.0), "margins are finite numbers above 0"),
        (Criteria(controls=["nobody"]), "--control nobody"),
    ],
)
def test_wrong_requests(options, message):
    with pytest.raises(UsageError, match=message):
        compare(study({"joint": BASE, "arm": BASE}, range(3)), options)


# ---- gates


def with_ledger(run, change):
    table = {name: np.array(value) for name, value in run.ledger.items()}
    change(table)
    return replace(run, ledger=table)


def spoil(runs, change, file="arm-1.h5"):
    return [change(run) if run.file == file else run for run in runs]


def off_by_a_third(table):
    table["loss_change"] *= 0.66


def much_from_before(table):
    table["term"][..., -1] = 0.05 * np.abs(table["term"][..., 0])


def no_progress(table):
    table["term"][:, :, 0, 0] = 0.01 * np.where(np.arange(len(table["term"])) % 2, 1.0, -1.0)[:, None]
    table["loss_change"] = table["term"].sum(axis=(1, 3)) + table["head"]


def without_progress(run):
    return with_ledger(run, no_progress)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("residual", lambda run: with_ledger(run, off_by_a_third)),
        ("rows", lambda run: with_ledger(run, much_from_before)),
        ("samples over noise scale", lambda run: but(run, data__train_images=20)),
        ("samples over noise scale", lambda run: but(run, data__train_images=None)),
        ("samples over noise scale", lambda run: replace(run, probed=None)),
        ("self-check", lambda run: but(run, self_check=None)),
        ("self-check", lambda run: but(run, self_check=np.array([0.97, -1.0]))),
    ],
)
def test_every_gate_closes_on_one_bad_run_of_many(name, change):
    truth = BASE.but(cancelled={"cls>det": 0.1, "det>cls": 0.2})
    found = compare(spoil(study({"joint": BASE, "arm": truth}), change))
    one = answer(found, "interference", "cls>det")
    assert one.verdict == UNDEFINED
    assert one.rule is None
    (closed, *_) = (gate for gate in one.gates if not gate.passed)
    assert closed.name == name
    assert "arm, seed 1" in str(closed.sentence)
    assert str(closed.sentence) in str(one.reason)
    assert np.isnan(one.effect)
    assert found.open


@pytest.mark.parametrize("file", ["joint-2.h5", "arm-1.h5"])
def test_a_run_without_own_progress_closes_nothing_where_the_others_have_enough_to_divide_by(file):
    less = BASE.but(cancelled={"cls>det": 0.1, "det>cls": 0.2})
    sound = compare(study({"joint": BASE, "arm": less}))
    found = compare(spoil(study({"joint": BASE, "arm": less}), without_progress, file))
    one = answer(found, "interference", "cls>det")
    assert one.verdict == REDUCED
    assert one.of_means
    assert not answer(sound, "interference", "cls>det").of_means
    assert not answer(found, "interference", "det>cls").of_means
    assert gates.passed(one.gates)
    together = next(gate for gate in one.gates if gate.name == "own progress")
    assert f"{file[:-5]}: over 5 runs together det's own progress is" in str(together.sentence)
    assert "in one of them 0.0" in str(together.sentence)
    assert one.effect == pytest.approx(np.mean(np.subtract(one.arm_values, one.baseline_values)))
    arm = 0.5 if file.startswith("joint") else 0.1  # of five runs four make progress, and all cancel
    assert one.effect == pytest.approx(-0.4 + (-1 if file.startswith("joint") else 1) * arm / 4, abs=0.05)
    assert one.low95 < one.effect < one.high95 < 0
    assert Message("remark.of_means", task="det", by="cls") in one.notes
    assert all(layer.subject != "cls>det" for layer in found.layers if layer.question == "interference")
    level = next(x for x in found.levels if (x.arm, x.subject) == (file[:-5], "cls>det"))
    assert level.mean == pytest.approx(np.mean(one.baseline_values if file.startswith("joint") else one.arm_values))
    assert level.low95 < level.mean < level.high95
    assert np.isfinite(level.values).all()


def test_where_no_run_makes_progress_what_is_cancelled_is_told_in_units_of_the_loss():
    runs = study({"joint": BASE, "arm": BASE.but(cancelled={"cls>det": 0.1, "det>cls": 0.2})})
    found = compare([without_progress(run) if run.arm == "arm" else run for run in runs])
    one = answer(found, "interference", "cls>det")
    assert one.verdict == UNDEFINED
    closed = [gate for gate in one.gates if not gate.passed]
    assert {gate.name for gate in closed} >= {"own progress"}
    assert "arm: over 5 runs together det's own progress is 0.0 of its standard errors above 0" in str(one.reason)
    (said,) = (note for note in one.notes if note.key == "remark.cancelled")
    effect, low, high = dict(said.values)["estimate"]
    assert effect == pytest.approx(-0.4 * 0.01, rel=0.1)  # a step's own progress of det is .01
    assert low < effect < high < 0
    assert not np.isfinite(next(x for x in found.levels if (x.arm, x.subject) == ("arm", "cls>det")).mean)


def test_own_progress_that_seeds_do_not_share_leaves_the_ratio_without_an_interval():
    """One run of three makes nearly all of the progress: rows tell the sum from 0, and seeds do not."""
    runs = study({"joint": BASE, "arm": BASE}, range(3))
    for file in ("arm-1.h5", "arm-2.h5"):
        runs = spoil(runs, without_progress, file)
    one = answer(compare(runs), "interference", "cls>det")
    assert one.verdict == UNDEFINED
    assert [gate.name for gate in one.gates if not gate.passed] == ["progress over seeds"]
    assert "det's mean own progress is" in str(one.reason)
    assert "4.3 are asked for" in str(one.reason)


def test_a_run_made_twice_is_held_against_itself_where_it_has_no_progress_of_its_own():
    *runs, last = study({"joint": BASE, "arm": BASE})
    runs = spoil(runs, without_progress, "joint-0.h5")
    twin = without_progress(replace(last, content="almost"))
    apart = with_ledger(twin, lambda table: table["term"].__setitem__((slice(None), slice(None), 0, 1), 0.02))
    for again_, passes in ((twin, True), (apart, False)):
        gate = twice(compare([*runs, again_]))
        assert np.isfinite(gate.value)
        assert gate.passed == passes


def test_unpaired_runs_need_progress_each():
    runs = spoil(study({"joint": BASE, "arm": BASE}), without_progress)
    one = answer(compare(runs, Criteria(paired=False)), "interference", "cls>det")
    assert (one.verdict, one.of_means) == (UNDEFINED, False)


# ---- how far it reaches


def test_what_a_study_of_one_data_set_can_claim_is_told_once():
    runs = study({"joint": BASE, "arm": BASE, "other": BASE}, range(4))
    found = compare(runs)
    assert [line.key for line in found.scope] == ["scope.seeds", "scope.data", "scope.test_images"]
    assert str(found.scope[0]).startswith("What happens in one seed of ten is absent from 4 seeds in 66 % of studies")
    assert str(found.scope[1]).startswith("All runs learned from 1 data set, and verdicts hold for that data")
    bare = [replace(run, tested=SplitScores(run.tested.values)) for run in runs]
    assert [line.key for line in compare(bare).scope] == ["scope.seeds", "scope.data"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda seed: f"of seed {seed}", ["scope.seeds"]),
        (lambda seed: f"{seed % 2}", ["scope.seeds", "scope.data", "scope.test_images"]),
        (lambda seed: None, ["scope.seeds", "scope.data_unknown", "scope.test_images"]),
    ],
    ids=["each its own", "two", "not shown"],
)
def test_seeds_with_data_of_their_own_are_not_said_to_share_it(data, said):
    runs = [but(run, data__fingerprint=data(run.seed)) for run in study({"joint": BASE, "arm": BASE})]
    assert [line.key for line in compare(runs, Criteria(paired=True)).scope] == said


def test_without_an_interval_nothing_is_said_of_how_far_it_reaches():
    assert compare(study({"joint": BASE, "arm": BASE}, range(1))).scope == []
    assert compare(study({"arm": BASE})).scope == []


def test_a_ledger_on_a_fixed_probe_batch_needs_no_large_training_set():
    few = [but(run, data__train_images=20) for run in study({"joint": BASE, "arm": BASE})]
    assert answer(compare(few), "interference", "cls>det").verdict == UNDEFINED
    for name in ("settings__ledger_ends", "probe__ledger__ends"):
        found = compare([but(run, **{name: "probe"}) for run in few])
        assert answer(found, "interference", "cls>det").verdict == EQUIVALENT
        assert found.levels[1].low95 > 0.4


def test_a_gate_of_one_task_does_not_close_the_others():
    def change(run):
        return with_ledger(run, lambda table: table["loss_change"].__setitem__((slice(None), 0), 0.1))

    found = compare(spoil(study({"joint": BASE, "arm": BASE}), change))
    assert answer(found, "interference", "cls>det").verdict == UNDEFINED
    assert answer(found, "interference", "det>cls").verdict == EQUIVALENT
    assert answer(found, "direction", "det|cls").verdict == EQUIVALENT


def test_a_gradient_that_cannot_be_told_from_noise_leaves_direction_undefined():
    def change(run):
        return replace(run, probed=replace(run.probed, noise=run.probed.gram * 1.0))

    found = compare(spoil(study({"joint": BASE, "arm": BASE}), change))
    one = answer(found, "direction", "det|cls")
    assert one.verdict == UNDEFINED
    assert [gate.name for gate in one.gates if not gate.passed] == ["gradients resolved"]


def all_noise(run):
    """Nothing is left of the gradient of det."""
    noise = run.probed.noise.copy()
    noise[..., 0, 0] = run.probed.gram[..., 0, 0]
    return replace(run, probed=replace(run.probed, noise=noise))


def test_the_direct_effect_divides_by_what_the_baselines_runs_have_together():
    runs = study({"joint": BASE, "arm": BASE.but(weight=(1.0, 3.0))})
    sound, found = compare(runs), compare(spoil(runs, all_noise, "joint-1.h5"))
    one, other = (answer(x, "interference", "cls>det").direct for x in (sound, found))
    assert one.effect > 0.3
    assert other.effect == pytest.approx(one.effect * 5 / 4, rel=0.1)  # four of five have something to divide by
    assert other.effect == pytest.approx(np.mean(np.subtract(other.arm_values, other.baseline_values)))
    assert other.low95 < other.effect < other.high95


def test_a_gradient_that_cannot_be_told_from_noise_has_no_direct_effect():
    runs = study({"joint": BASE, "arm": BASE.but(weight=(1.0, 3.0))})
    sound = compare(runs)
    found = compare([all_noise(run) if run.file in ("joint-1.h5", "joint-2.h5", "joint-3.h5") else run for run in runs])
    into_det, into_cls = (answer(found, "interference", subject).direct for subject in ("cls>det", "det>cls"))
    assert np.isnan([into_det.effect, into_det.low95, into_det.high95]).all()
    assert str(into_det.sentence) == (
        "At the baseline's checkpoints det's gradient cannot be distinguished from noise: there is no direct effect."
    )
    assert into_cls.effect == answer(sound, "interference", "det>cls").direct.effect


def twice(found, question="interference", subject="cls>det", arm="arm"):
    """The gate on a run made twice."""
    (gate,) = (g for g in answer(found, question, subject, arm).gates if g.name == "same run twice")
    return gate


ASKED = [("direction", "det|cls"), ("interference", "cls>det"), ("dominance", "largest share"), ("outcome", "accuracy")]
ASKED_AND = [*ASKED, ("interference", "det>cls"), ("outcome", "Delta-m"), ("outcome", "mAP50")]


@pytest.mark.parametrize("arm", ["joint", "arm"])
def test_a_run_made_twice_that_is_equal_to_the_bit_passes(arm):
    runs = study({"joint": BASE, "arm": BASE}, twice=False)
    found = compare([*runs, again(next(run for run in runs if run.arm == arm))])
    for question, subject in ASKED_AND:
        gate = twice(found, question, subject)
        assert (gate.passed, gate.value) == (True, 0.0)
        assert gate.limit == (0.01 if question == "outcome" else 0.05)
        assert (
            str(gate.sentence) == f"{arm}-0.h5 and {arm}-0-again.h5 are the same run made twice, and equal to the bit"
        )
        assert answer(found, question, subject).verdict in (EQUIVALENT, "NOT REDUCED", "INCONCLUSIVE")
        assert answer(found, question, subject).n == 5


def test_where_no_run_was_made_twice_the_gate_is_closed_and_says_what_to_record():
    found = compare(study({"joint": BASE, "arm": BASE.but(cosine=0.3)}, [3, 4, 5, 6, 7], twice=False))
    assert claimed(found) == {}
    assert {a.verdict for a in found.answers} == {UNDEFINED}
    for question, subject in ASKED_AND:
        gate = twice(found, question, subject)
        assert not gate.passed
        assert np.isnan(gate.value)
        assert gate.sentence == Message("gate.not_twice", file="joint-s3-again.h5")
        assert str(gate.sentence) in str(answer(found, question, subject).reason)
    assert found.open


def test_runs_of_other_arms_that_were_made_twice_say_nothing_of_these():
    runs = study({"joint": BASE, "arm": BASE, "other": BASE}, twice=False)
    found = compare([*runs, again(next(run for run in runs if run.arm == "other"))])
    assert not twice(found).passed
    assert twice(found, arm="other").passed


def shifted(run, question, by):
    """The second run with the judged quantity ``by`` higher; what is measured in it differs from the first one's."""
    rows, count = run.probed, len(run.layers)
    if question == "direction":
        square = rows.gram - rows.noise
        length = np.sqrt(square[..., 0, 0].sum() * square[..., 1, 1].sum()) / square[..., 0, 0].size
        gram = rows.gram.copy()
        gram[..., 0, 1] -= by * length
        gram[..., 1, 0] -= by * length
        run = replace(run, probed=replace(rows, gram=gram))
    elif question == "interference":
        table = {name: np.array(value, dtype=float) for name, value in run.ledger.items()}
        own = table["term"][20:, :, 0, 0].sum(axis=1)
        table["term"][20:, :, 0, 1] -= by * own[:, None] / count
        table["loss_change"][20:, 0] -= by * own
        run = replace(run, ledger=table)
    elif question == "dominance":
        share = twin_share(run)
        wanted = share + by
        weight = run.weight.copy()
        weight[:, 0] *= np.sqrt(wanted / (1 - wanted) * (1 - share) / share)
        run = replace(run, weight=weight)
    else:
        values = {**run.tested.values, "accuracy": run.tested.values["accuracy"] - by}
        run = replace(run, tested=replace(run.tested, values=values))
    return replace(run, content="not the same to the bit")


def twin_share(run):
    """The share of the first task, written again."""
    square = sum((run.probed.gram - run.probed.noise)[:, layer] for layer in range(len(run.layers)))
    first, second = (float((square[:, i, i] * run.weight[0, i] ** 2).sum()) for i in (0, 1))
    return first / (first + second)


BIG = BASE.but(weight=(3.0, 1.0))  # the first task has the largest share


@pytest.mark.parametrize(("question", "subject"), ASKED)
@pytest.mark.parametrize("margin", [0.1, 0.02])
def test_a_run_that_does_not_repeat_to_the_bit_is_held_against_half_the_margin(question, subject, margin):
    runs = study({"joint": BIG, "arm": BIG}, twice=False)
    for by, passes in ((0.4 * margin, True), (-0.4 * margin, True), (0.6 * margin, False), (-0.6 * margin, False)):
        found = compare([*runs, shifted(again(runs[0]), question, by)], Criteria(margin=margin, outcome_margin=margin))
        gate = twice(found, question, subject)
        assert gate.value == pytest.approx(abs(by), rel=1e-6)
        assert gate.limit == 0.5 * margin
        assert gate.passed == passes
        assert f"differ by {abs(by):.2g} in what is judged here" in str(gate.sentence)
        assert (answer(found, question, subject).verdict == UNDEFINED) == (not passes)
        for other, what in ASKED:  # what did not move between the two runs is judged all the same
            if other != question:
                assert twice(found, other, what).value == 0.0
                assert twice(found, other, what).passed


def test_of_two_runs_that_do_not_repeat_the_order_of_the_files_chooses_none():
    runs = study({"joint": BIG, "arm": BIG}, twice=False)
    second = shifted(again(runs[0]), "interference", 0.03)
    left, right = (compare(order) for order in ([*runs, second], [second, *runs]))
    assert left.arms[0].files == right.arms[0].files
    assert answer(left, "interference", "cls>det").effect == answer(right, "interference", "cls>det").effect


def test_a_second_run_without_the_number_closes_the_gate():
    runs = study({"joint": BASE, "arm": BASE}, twice=False)
    found = compare([*runs, replace(again(runs[0]), ledger={})])
    assert not twice(found).passed
    assert "not all of them give a number" in str(twice(found).sentence)
    assert twice(found, "direction", "det|cls").passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: replace(run, loss=run.loss + 1e-7), "differ in the losses of their first step"),
        (lambda run: replace(run, step=run.step + 1), "step 0 was not recorded in both"),
    ],
)
def test_who_vouches_for_the_pairs_needs_equal_first_losses_and_no_second_run(change, message):
    runs = study({"joint": BASE, "arm": BASE}, twice=False)
    found = compare(runs, Criteria(paired=True))
    assert twice(found).passed
    assert twice(found).sentence == Message("gate.first_equal")
    assert answer(found, "interference", "cls>det").verdict == EQUIVALENT
    spoiled = compare(spoil(runs, change), Criteria(paired=True))
    assert not twice(spoiled).passed
    assert "arm, seed 1" in str(twice(spoiled).sentence)
    assert message in str(twice(spoiled).sentence)
    assert answer(spoiled, "interference", "cls>det").verdict == UNDEFINED
    second = shifted(again(runs[0]), "interference", 0.09)
    assert not twice(compare([*runs, second], Criteria(paired=True))).passed  # what the files show counts for more


def test_unpaired_runs_are_not_asked_for_a_second_one():
    found = compare(study({"joint": BASE, "arm": BASE}, twice=False), Criteria(paired=False))
    gates_ = [gate.name for a in found.answers for gate in a.gates]
    assert "same run twice" not in gates_
    assert answer(found, "interference", "cls>det").verdict == EQUIVALENT


def test_a_copy_of_a_file_is_no_second_run():
    runs = study({"joint": BASE, "arm": BASE}, twice=False)
    found = compare([*runs, replace(runs[0], file="copy.h5")])
    assert str(twice(found).sentence).startswith("no run was made twice")
    assert not twice(found).passed
    with pytest.raises(
        UsageError, match=r"joint-0\.h5 and copy\.h5 of arm 'joint' hold the same numbers under two seeds"
    ):
        compare([*runs, replace(runs[0], file="copy.h5", seed=9)])


def test_an_arm_that_mixes_settings_is_told():
    runs = spoil(study({"joint": BASE, "arm": BASE}), lambda run: but(run, settings__gradnorm_alpha=0.1))
    runs = [but(r, settings__gradnorm_alpha=1.5) if r.arm == "arm" and r.seed != 1 else r for r in runs]
    assert "arm mixes settings: gradnorm_alpha is 1.5 in arm-0.h5 and 0.1 in arm-1.h5." in map(
        str, compare(runs).warnings
    )


def test_an_unknown_batch_size_gives_no_noise_scale():
    def change(run):
        return replace(run, probed=replace(run.probed, batch_size=0 * run.probed.batch_size))

    one = answer(compare(spoil(study({"joint": BASE, "arm": BASE}), change)), "interference", "cls>det")
    assert [gate.name for gate in one.gates if not gate.passed] == ["samples over noise scale"]


def test_runs_without_micro_batches_or_a_ledger_say_how_to_record_them():
    runs = [replace(run, probed=None, ledger={}) for run in study({"joint": BASE, "arm": BASE})]
    found = compare(runs)
    assert "--micro-batches 4" in str(answer(found, "direction", "det|cls").reason)
    assert "--ledger" in str(answer(found, "interference", "cls>det").reason)
    assert answer(found, "interference", "cls>det").verdict == NO_VERDICT
    assert found.open


def test_the_first_steps_of_adam_are_left_out():
    def early(table):
        table["term"][:20, :, 0, 1] = 10.0

    runs = [with_ledger(run, early) if run.arm == "arm" else run for run in study({"joint": BASE, "arm": BASE})]
    assert answer(compare(runs), "interference", "cls>det").verdict == EQUIVALENT
    plain = [but(run, settings__optimizer="SGD") for run in runs]
    assert answer(compare(plain), "interference", "cls>det").verdict != EQUIVALENT


def test_the_window_says_which_steps_count():
    def late(table):
        table["term"][60:, :, 0, 1] *= 0.2
        table["loss_change"][60:, 0] -= 0.8 * 0.01 * 0.5

    runs = [with_ledger(run, late) if run.arm == "arm" else run for run in study({"joint": BASE, "arm": BASE})]
    early, after = (compare(runs, Criteria(window=w)) for w in ((20, 60), (60, 120)))
    assert answer(early, "interference", "cls>det").verdict == EQUIVALENT
    assert answer(after, "interference", "cls>det").verdict == REDUCED


def test_the_worst_gate_is_the_closed_one_or_the_nearest_to_its_limit():
    open_, near, shut = (gates.Gate("x", p, v, 0.1, "") for p, v in ((True, 0.001), (True, 0.09), (False, 0.5)))
    assert gates.worst([open_, shut, near]) is shut
    assert gates.worst([open_, near]) is near


# ---- layers


def thinned(run, keep):
    """The run as if only some layers were shared."""
    places = [run.layers.index(name) for name in keep]
    ledger = dict(run.ledger, term=run.ledger["term"][:, places])
    probed = replace(run.probed, gram=run.probed.gram[:, places], noise=run.probed.noise[:, places])
    return replace(run, layers=tuple(keep), reach=run.reach[places], ledger=ledger, probed=probed)


def test_only_common_layers_are_compared_and_it_says_so():
    runs = study({"joint": BASE, "split": BASE, "arm": BASE})
    keep = ("model.2.conv", "model.0.conv")  # in another order too
    runs = [thinned(run, keep) if run.arm == "split" else run for run in runs]
    found = compare(runs)
    assert found.common_layers == ["model.0.conv", "model.2.conv"]
    assert found.left_out_layers == ["model.1.conv"]
    note = Message("remark.layers", n=2, left_out=1)
    assert note in answer(found, "direction", "det|cls", "split").notes
    assert note not in answer(found, "direction", "det|cls", "arm").notes
    seen = [x.layer for x in found.layers if (x.arm, x.question) == ("split", "direction")]
    assert seen == ["model.0.conv", "model.2.conv"]


def test_layers_are_matched_by_name_and_not_by_place():
    """One layer with another cosine, which stands elsewhere in the other arm."""

    def odd(run):
        gram = run.probed.gram.copy()
        place = run.layers.index("model.2.conv")
        gram[:, place, 0, 1] += 0.5
        gram[:, place, 1, 0] += 0.5
        return replace(run, probed=replace(run.probed, gram=gram))

    runs = [odd(run) for run in study({"joint": BASE.but(spread=1e-3), "arm": BASE.but(spread=1e-3)}, controls=False)]
    order = ("model.2.conv", "model.0.conv", "model.1.conv")
    found = compare([thinned(run, order) if run.arm == "arm" else run for run in runs])
    assert max(abs(x.effect) for x in found.layers) < 0.1


def test_arms_that_share_nothing_are_not_applicable_and_no_zero():
    runs = study({"joint": BASE, "dual": BASE, "detach": BASE, "arm": BASE})
    runs = [
        thinned(run, ())
        if run.arm == "dual"
        else replace(run, reach=run.reach & [True, False])
        if run.arm == "detach"
        else run
        for run in runs
    ]
    found = compare(runs)
    for arm in ("dual", "detach"):
        verdicts = {a.question: a.verdict for a in found.answers if a.arm == arm}
        assert [verdicts[q] for q in ("direction", "interference", "dominance")] == [NOT_APPLICABLE] * 3
        assert verdicts["outcome"] != NOT_APPLICABLE
        assert np.isnan(answer(found, "direction", "det|cls", arm).effect)
    # what is not applicable is no comparison, and makes no other one harder
    alone_ = compare([run for run in runs if run.arm not in ("dual", "detach")])
    one, other = (answer(x, "interference", "cls>det").p_zero_holm for x in (found, alone_))
    assert one == other
    assert found.common_layers == list(runs[0].layers)
    only = compare([run for run in runs if run.arm != "arm" and run.arm != "detach"])
    assert str(only.headline[0]).startswith("No gradient can interfere: in dual det and cls share no layer")
    assert not only.open


def test_layers_are_looked_at_after_the_trunk_and_only_where_it_was_judged():
    base = BASE.but(spread=0.01)
    runs = study({"joint": base, "arm": base.but(cancelled={"cls>det": 0.1, "det>cls": 0.2})})
    found = compare(runs)
    mine = [x for x in found.layers if (x.question, x.subject) == ("interference", "cls>det")]
    assert [x.layer for x in mine] == list(runs[0].layers)
    assert sum(x.effect for x in mine) == pytest.approx(answer(found, "interference", "cls>det").effect)
    assert all(x.discovery for x in mine)
    spoiled = compare([but(run, self_check=None) for run in runs])
    assert spoiled.layers == []


# ---- direct and total


def test_the_direct_effect_of_weights_is_told_from_the_total_one():
    """The weight of cls is cut to a tenth, and the trainings interfere as before."""
    found = compare(study({"joint": BASE, "arm": BASE.but(weight=(1.0, 0.1))}))
    one = answer(found, "interference", "cls>det")
    assert one.verdict == EQUIVALENT
    assert one.direct.effect == pytest.approx(-0.9 * 0.3, abs=0.05)  # R was .3 at cosine -.3 and equal lengths
    assert one.direct.high95 < 0
    other = answer(found, "interference", "det>cls")
    assert other.direct.effect == pytest.approx(9 * 0.3, rel=0.2)
    even = BASE.but(spread=0.0)
    same = compare(study({"joint": even, "arm": even}))
    assert answer(same, "interference", "cls>det").direct.effect == 0
    note = Message("remark.same_weights")
    assert note in answer(same, "interference", "cls>det").notes
    assert note not in one.notes


# ---- magnitude similarity


def longer(run, factor=2.0):
    """The run with the gradient of cls so many times as long, noise and all."""
    scale = np.array([1.0, factor])
    gram, noise = (one * scale[:, None] * scale for one in (run.probed.gram, run.probed.noise))
    return replace(run, probed=replace(run.probed, gram=gram, noise=noise))


def alike(found, arm):
    (one,) = (x for x in found.similarities if x.arm == arm)
    return one


def test_a_loss_by_shorter_steps_is_told_beside_c_and_named_dominance_where_it_is_larger():
    runs = study({"joint": BASE, "arm": BASE}, range(4))
    found = compare([shortened(run) if run.arm == "arm" else shortened(run, 0.0) for run in runs])
    told = answer(found, "interference", "cls>det")
    np.testing.assert_allclose(told.alone.baseline_shrunk, 0, atol=1e-12)
    np.testing.assert_allclose(told.alone.arm_shrunk, 0.8)
    c = np.array(told.arm_values)
    np.testing.assert_allclose(told.alone.arm_lost, 1 - 0.2 * (1 - c))
    (note,) = (str(one) for one in told.notes if one.key == "remark.alone")
    assert note.startswith("Of the progress that det's own gradients would have made without those of others")
    assert "in baseline 0 % is lost as its steps are shorter, and" in note
    assert "in arm 80 % is lost as its steps are shorter, and" in note
    (named,) = (one for one in told.notes if one.key == "remark.shortened")
    assert dict(named.values)["arms"] == ("arm",)  # the baseline's loss is cancellation
    assert json.loads(json.dumps(plain(found)))["answers"][0].keys() >= {"alone", "direct"}
    other = answer(found, "interference", "det>cls")
    assert not [one for one in other.notes if one.key == "remark.shortened"]
    assert answer(found, "direction", "det|cls").alone is None


def test_runs_that_do_not_know_whether_steps_were_shortened_say_so():
    found = compare(study({"joint": BASE, "arm": BASE}, range(3)))
    told = answer(found, "interference", "cls>det")
    assert np.isnan(told.alone.arm_shrunk).all()
    assert "remark.alone_unknown" in [one.key for one in told.notes]


def test_the_magnitude_similarity_of_each_arm_is_that_of_the_window_over_its_seeds():
    runs = study({"joint": BASE, "arm": BASE}, range(4))
    runs = [longer(run) if run.arm == "arm" else run for run in runs]
    found = compare(runs, Criteria(window=(10, 60), pairs=["cls>det"]))
    for arm in ("joint", "arm"):
        each = []
        for run in (r for r in runs if r.arm == arm and not r.file.endswith("-again.h5")):
            square = {0: 0.0, 1: 0.0}
            for row, step in enumerate(run.probed.step):
                for layer in range(len(run.layers)):
                    for task in square:
                        true = run.probed.gram[row, layer, task, task] - run.probed.noise[row, layer, task, task]
                        square[task] += true if 10 <= step < 60 else 0.0
            each.append(2 * math.sqrt(square[0] * square[1]) / (square[0] + square[1]))
        one = alike(found, arm)
        assert (one.subject, one.seeds) == ("det|cls", [0, 1, 2, 3])
        assert one.values == pytest.approx(each, rel=1e-12)
        assert one.mean == pytest.approx(np.mean(each))
        half = scipy.stats.t.ppf(0.975, 3) * np.std(each, ddof=1) / 2
        assert (one.low95, one.high95) == pytest.approx((one.mean - half, one.mean + half))
    assert alike(found, "joint").mean > 0.99  # equally long
    assert alike(found, "arm").mean == pytest.approx(2 * 2 / (1 + 4), abs=0.03)
    assert answer(found, "direction", "det|cls").verdict == EQUIVALENT  # lengths turn no gradient


def test_a_gradient_that_one_run_does_not_resolve_leaves_the_magnitude_similarity_unknown():
    def change(run):
        return replace(run, probed=replace(run.probed, noise=run.probed.gram * 1.0))

    found = compare(spoil(study({"joint": BASE, "arm": BASE}), change))
    one = alike(found, "arm")
    assert np.isnan(one.values).tolist() == [False, True, False, False, False]
    assert np.isnan([one.mean, one.low95, one.high95]).all()
    assert np.isfinite(alike(found, "joint").mean)
    assert next(x for x in plain(found)["similarities"] if x["arm"] == "arm")["mean"] is None


def test_arms_without_shared_layers_or_noise_have_no_magnitude_similarity():
    runs = study({"joint": BASE, "dual": BASE, "bare": BASE})
    runs = [thinned(r, ()) if r.arm == "dual" else replace(r, probed=None) if r.arm == "bare" else r for r in runs]
    assert [x.arm for x in compare(runs).similarities] == ["joint"]


# ---- the plan, and what misleads


PLAN = {
    "plan.margin": 0.2,
    "plan.baseline": "joint",
    "plan.pairs": ["cls>det"],
    "plan.window": [20, 100],
    "plan.seeds": list(range(5)),
    "plan.arms": ["joint", "arm", "single-det", "single-cls"],
    "plan.settings.epochs": 3,
}


def planned(runs, **changes):
    return [replace(run, provenance={**run.provenance, **PLAN, **changes}) for run in runs]


def test_what_was_planned_is_what_counts():
    found = compare(planned(study({"joint": BASE, "arm": BASE})))
    assert found.disagreements == []
    assert found.window == (20, 100)
    assert [(a.subject, a.margin) for a in found.of("interference")] == [("cls>det", 0.2)]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda runs: runs, Criteria(margin=0.05), "margin was planned as 0.2, and this comparison uses 0.05"),
        (lambda runs: runs, Criteria(window=(0, 50)), "window was planned as 20, 100"),
        (lambda runs: runs, Criteria(pairs=["det>cls"]), "pairs was planned as cls>det"),
        (lambda runs: [r for r in runs if r.seed != 4], None, "joint: seeds 4 were planned and are not there"),
        (lambda runs: [r for r in runs if r.single != "cls"], None, "arm single-cls was planned and is not there"),
        (
            lambda runs: spoil(runs, lambda run: but(run, plan__margin=0.3)),
            None,
            "arm-1.h5 was recorded under another plan: margin",
        ),
        (
            lambda runs: spoil(runs, lambda run: but(run, settings__epochs=9)),
            Criteria(paired=False),
            "arm-1.h5: settings.epochs was planned as 3, and was 9",
        ),
    ],
)
def test_what_differs_from_the_plan_is_said(change, options, message):
    found = compare(change(planned(study({"joint": BASE, "arm": BASE}))), options)
    assert any(message in said for said in map(str, found.disagreements)), found.disagreements


def test_a_file_without_the_plan_of_the_others_is_told():
    runs = planned(study({"joint": BASE, "arm": BASE}))
    bare = {name: value for name, value in runs[0].provenance.items() if not name.startswith("plan.")}
    found = compare([*runs[1:], replace(runs[0], provenance=bare)])
    assert "joint-0.h5 holds no plan, and others do." in map(str, found.disagreements)


def test_partial_batches_and_scaled_losses_are_warned_of_by_name():
    def last_of_epoch(run):
        size, loss = run.batch_size.copy(), run.loss.copy()
        size[19::20] = 4
        loss[19::20, 0] /= 4
        return replace(run, batch_size=size, loss=loss)

    found = compare(spoil(study({"joint": BASE, "arm": BASE}), last_of_epoch))
    said = [x for x in map(str, found.warnings) if "arm-1.h5" in x]
    assert "3 recorded steps are partial batches (4 of 16 samples)" in said[0]
    assert "the loss of det is scaled by batch size" in said[1]
    assert len(said) == 2


def test_a_lower_training_loss_is_named_and_changes_nothing():
    runs = study({"joint": BASE, "arm": BASE})

    def lower(run):
        loss = run.loss.copy()
        loss[1:] *= 0.3
        return replace(run, loss=loss)

    plain, found = compare(runs), compare([lower(run) if run.arm == "arm" else run for run in runs])
    assert any("arm: the training loss of det ends 70 % lower than in joint" in str(said) for said in found.warnings)
    assert [(a.verdict, a.effect) for a in found.answers] == [(a.verdict, a.effect) for a in plain.answers]


def test_an_arm_with_another_learning_rate_is_told():
    runs = [but(run, settings__lr=0.5) if run.arm == "arm" else run for run in study({"joint": BASE, "arm": BASE})]
    found = compare(runs)
    said = list(map(str, found.warnings))
    assert "arm differs from joint also in lr 0.5 and 0.01: a difference may come from that." in said
    assert not found.refusals


# ---- outcome


def test_an_outcome_is_a_deficit_against_the_task_alone():
    base = BASE.but(spread=1e-4)
    found = compare(study({"joint": base, "arm": base.but(metrics={**base.metrics, "accuracy": 0.85})}, range(4)))
    one = answer(found, "outcome", "accuracy")
    assert one.task == "cls"
    assert np.mean(one.baseline_values) == pytest.approx(0.1, abs=1e-2)
    assert np.mean(one.arm_values) == pytest.approx(0.05, abs=1e-2)
    assert answer(found, "outcome", "Delta-m").effect == pytest.approx(-0.5 * 0.05 / 0.9, rel=0.1)


def test_a_seed_at_which_a_task_alone_reached_nothing_is_in_the_relative_deficit_too():
    base = BASE.but(spread=1e-4)
    runs = study({"joint": base, "arm": base}, range(4))
    nothing = {"accuracy": 0.0}

    def failed(run):
        none = {name: np.zeros_like(column) for name, column in run.tested.without.items()}
        return replace(run, tested=replace(run.tested, values=nothing, without=none))

    found = compare([failed(run) if run.file == "single-cls-2.h5" else run for run in runs])
    one = answer(found, "outcome", "Delta-m")
    assert one.n == 4
    assert np.isfinite(one.baseline_values).all()
    sound = answer(compare(runs), "outcome", "Delta-m")
    mean = 0.9 * 3 / 4  # of what cls alone reaches: in one seed of four nothing
    lost = 0.5 * (0.1 - 0.9) / mean - 0.5 * 0.1 / 0.9
    assert one.baseline_values[2] - sound.baseline_values[2] == pytest.approx(lost, rel=0.15)


def test_a_run_without_a_test_split_is_named():
    runs = study({"joint": BASE, "arm": BASE})
    bare = [replace(run, tested=SplitScores({})) for run in runs]
    one = compare(bare).of("outcome")[0]
    assert (one.verdict, one.subject) == (NO_VERDICT, "test split")
    found = compare([bare[k] if run.file == "arm-1.h5" else run for k, run in enumerate(runs)])
    assert {a.verdict for a in found.of("outcome")} == {NO_VERDICT}
    assert "arm-1.h5 holds no accuracy of the test split." in {str(a.reason) for a in found.of("outcome")}
    with pytest.raises(UsageError, match="--metrics speed: whose is it"):
        compare(runs, Criteria(metrics=["speed"]))


def test_clusters_of_the_test_split_widen_the_interval():
    rng = np.random.default_rng(0)
    shift = 0.05 * rng.normal(size=12)

    def clustered(run):
        moved = {name: run.tested.values[name] + shift / 11 * 3 for name in run.tested.without}
        return replace(run, tested=replace(run.tested, without=moved))

    runs = study({"joint": BASE, "arm": BASE}, range(5))
    plain = answer(compare(runs), "outcome", "accuracy")
    wide = answer(compare([clustered(run) if run.arm == "arm" else run for run in runs]), "outcome", "accuracy")
    assert wide.high95 - wide.low95 > 1.3 * (plain.high95 - plain.low95)
    assert wide.effect == plain.effect
    assert "12 independent clusters" in str(wide.notes[0])
    both = answer(compare([clustered(run) for run in runs]), "outcome", "accuracy")
    assert both.high95 - both.low95 == pytest.approx(plain.high95 - plain.low95, rel=0.1)  # the same images: paired
    none = [replace(run, tested=replace(run.tested, clusters=(), without={})) for run in runs]
    assert "over seeds alone" in str(answer(compare(none), "outcome", "accuracy").notes[0])


def test_metrics_of_tasks_with_other_names_are_found_by_the_tasks_name():
    rng = np.random.default_rng(0)

    def renamed(run):
        values = {
            f"solved_{task}": run.tested.values.get(name, 0.5)
            for task, name in zip(TASKS, ("mAP50", "accuracy"), strict=True)
        }
        if run.single:
            values = {f"solved_{run.single}": values[f"solved_{run.single}"]}
        return replace(run, tested=replace(run.tested, values={**values, "loss_det": 1.0}, without={}, clusters=()))

    runs = [make("joint", s, BASE, rng) for s in range(3)] + [make("arm", s, BASE, rng) for s in range(3)]
    runs += [alone(task, s, rng) for task in TASKS for s in range(3)]
    found = compare([renamed(run) for run in runs])
    assert [a.subject for a in found.of("outcome")] == ["solved_det", "solved_cls", "Delta-m"]
