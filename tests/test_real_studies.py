"""Real trainings of the dial problem, through files and the command line, to an answer that is known beforehand.

The conflict is dialled: 120 degrees, and task a's gradient ten times as long, so that a drives b backwards
(1 + 10 cos 120 < 0). What follows for each trainer is known: no reweighting turns the angle; GradNorm makes the
gradients equally long, which frees b and costs a; two trunks share nothing, so that both do as well as alone.
"""

from __future__ import annotations

import json

import pytest
from studies import study

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.trainers.settings import Settings

pytestmark = pytest.mark.skipif(
    "ledger" not in Settings.__dataclass_fields__, reason="there is no loss ledger to claim interference from"
)

DIAL = "dial:angle=120,ratio=10,noise=1"
SHORT = ["--data", DIAL, "--epochs", "3", "--lr", "8e-3", "--every", "4", "--probe-every", "8", "--ledger-images", "16"]
LONG = ["--data", DIAL, "--epochs", "12", "--probe-every", "8"]
CONTROLS = "single,joint,gradnorm,dual"
CALLED = {"REDUCED", "REDUCED (size uncertain)", "INCREASED"}


def compared(capsys, *words):
    """What ``compare --json`` says; answers by arm, question and subject."""
    capsys.readouterr()
    code = command(["compare", "--json", *map(str, words)])
    found = json.loads(capsys.readouterr().out)
    found["code"] = code
    found["by"] = {(a["arm"], a["question"], a["subject"]): a for a in found["answers"]}
    return found


def verdict(found, *place):
    return found["by"][place]["verdict"]


def check_planted(found):
    """Each of the three answers, of two remedies of which each removes something else."""
    assert found["disagreements"] == []
    assert found["refusals"] == []
    # direction: nothing turns it, and what is not shared has none
    assert verdict(found, "gradnorm", "direction", "a|b") == "EQUIVALENT"
    assert verdict(found, "dual", "direction", "a|b") == "NOT APPLICABLE"
    # interference: a lets go of b, at the cost of a
    assert verdict(found, "gradnorm", "interference", "a>b") == "REDUCED"
    assert verdict(found, "gradnorm", "interference", "b>a") == "INCREASED"
    assert verdict(found, "gradnorm", "dominance", "largest share") == "REDUCED"
    assert verdict(found, "dual", "interference", "a>b") == "NOT APPLICABLE"
    # outcome: two trunks give b back what sharing took, and take nothing from a
    assert verdict(found, "dual", "outcome", "solved_b") == "REDUCED"
    assert verdict(found, "dual", "outcome", "solved_a") not in CALLED
    assert verdict(found, "gradnorm", "outcome", "solved_a") in ("INCREASED", "NOT REDUCED")
    assert found["by"]["gradnorm", "outcome", "solved_a"]["effect"] > 0


def check_null(found):
    """The same trainer under two names, with other seeds: nothing is called, whatever the question."""
    assert {a["arm"] for a in found["answers"]} == {"other"}
    applicable = [a for a in found["answers"] if a["question"] in ("direction", "interference", "dominance")]
    assert all(a["effect"] is not None for a in applicable)
    assert [a["subject"] for a in found["answers"] if a["verdict"] in CALLED] == []


def null_words(one, other):
    files = [f"--arm=one={one}/joint-s*.h5", f"--arm=other={other}/joint-s*.h5"]
    return [*files, "--baseline", "one", "--unpaired"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "planted"
    assert study(out, trainers=CONTROLS, seeds="3", record=SHORT)
    return out


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "others"
    assert study(out, trainers="joint", seeds="11,12,13", record=SHORT)
    return out


def test_a_planted_conflict_and_its_remedies_are_called_in_the_right_answer(planted, capsys):
    assert len(list(planted.glob("*.h5"))) == 16
    check_planted(compared(capsys, *sorted(planted.glob("*.h5"))))


def test_the_same_trainer_with_other_seeds_is_called_nothing(planted, others, capsys):
    assert len(list(planted.glob("*.h5"))) + len(list(others.glob("*.h5"))) == 20
    check_null(compared(capsys, *null_words(planted, others)))


def test_the_angle_and_what_follows_from_it_are_measured(planted):
    """What a file holds, against the dials."""
    with open_run(planted / "joint-s0.h5") as run:
        found = run.estimate(source="probe_loader")
        assert found.low[0] - 0.05 < -0.5 < found.high[0] + 0.05
        assert run.provenance["self_check"] == pytest.approx([1, -1], abs=1e-3)


@pytest.mark.slow
def test_thirty_two_trainings_of_the_usual_length(tmp_path, capsys):
    """Five seeds of default trainings: 26 of the planted conflict, and 6 of the baseline with other seeds."""
    assert study(tmp_path / "planted", trainers=CONTROLS, seeds="5", record=LONG)
    assert study(tmp_path / "others", trainers="joint", seeds="11,12,13,14,15", record=LONG)
    check_planted(compared(capsys, *sorted((tmp_path / "planted").glob("*.h5"))))
    check_null(compared(capsys, *null_words(tmp_path / "planted", tmp_path / "others")))
