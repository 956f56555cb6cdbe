"""``gradprobe study``: what is fixed, what is run, and what a kill or a failure leaves."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time

import pytest
from run_factory import make_header, make_rows
from studies import InProcess, study, wait_for_an_epoch
from warm import Process

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.cli.study import Asked, prepare, run
from gradprobe.errors import UsageError
from gradprobe.runfile import RunWriter, lock
from gradprobe.runfile.integrity import check_run
from gradprobe.study import folder, plan
from gradprobe.study.arms import make_arms, make_runs, parse_seeds
from gradprobe.study.folder import SAME, differing
from gradprobe.study.runner import cores, cores_each, threads
from gradprobe.trainers.settings import resolve

SMALL = ["--data", "dial:size=32", "--epochs", "1", "--every", "1"]
FAST = ["--no-ledger", "--micro-batches", "1", "--probe-every", "1000", "--every", "64"]
"""For trainings that are to last, and not to cost."""


# ---- what it consists of


def test_single_is_one_arm_per_task():
    arms = make_arms(["single", "joint", "my.module:Mine"], ["light=joint --task-weights a=1,b=0.1"], ("a", "b"))
    assert [(arm.name, arm.trainer, arm.flags) for arm in arms] == [
        ("single-a", "single", ("--task", "a")),
        ("single-b", "single", ("--task", "b")),
        ("joint", "joint", ()),
        ("Mine", "my.module:Mine", ()),
        ("light", "joint", ("--task-weights", "a=1,b=0.1")),
    ]


def test_a_seed_is_whole_before_the_next_and_the_first_baseline_is_there_twice():
    arms = make_arms(["gradnorm-static", "joint", "gradnorm"], [], ("a", "b"))
    names = [run.name for run in make_runs(arms, (3, 5), arms[1])]
    assert names == [
        "joint-s3",
        "gradnorm-s3",
        "gradnorm-static-s3",
        "joint-s3-again",
        "joint-s5",
        "gradnorm-s5",
        "gradnorm-static-s5",
    ]


def test_seeds_are_a_number_or_a_list():
    assert parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("7, 2") == (7, 2)
    assert parse_seeds("9,") == (9,)
    assert parse_seeds(f"{2**63 - 1},") == (2**63 - 1,)
    for text in ("", "0", "-1", "a", "1,1", "1.5", "10001", "1000000000", "9" * 30, f"0,{2**63}"):
        with pytest.raises(UsageError, match="--seeds"):
            parse_seeds(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainers": "joint,joint"}, "arm 'joint' is there twice"),
        ({"trainers": ""}, "no arm: name at least one"),
        ({"trainers": "joint", "baseline": "jiont"}, "no arm is called so .*Did you mean 'joint'"),
        ({"trainers": "joint,gradnorm-static"}, "no arm has that. Add gradnorm"),
        ({"trainers": "joint", "arm": ["a b=joint"]}, "write NAME=TRAINER"),
        ({"trainers": "joint", "arm": ["../x=joint"]}, "write NAME=TRAINER"),
        ({"trainers": "joint,gradnrom"}, "unknown trainer 'gradnrom'"),
        ({"trainers": "joint", "record": ["--seed", "3"]}, "--seed is given to each run by the study; use --seeds"),
        ({"trainers": "joint", "record": ["--imgsz", "100"]}, "must be a multiple of 32"),
        ({"trainers": "joint", "window": "5"}, "write two steps"),
        ({"trainers": "joint", "window": "9:3"}, "is no span"),
        ({"trainers": "joint", "pairs": "det>cls"}, "there are: b>a, a>b"),
        ({"trainers": "joint", "margin": 0.0}, "--margin 0.0"),
        ({"trainers": "joint", "jobs": 0}, "--jobs 0"),
        ({"preset": "quikc"}, "there are: quick"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        study(tmp_path / "study", **options)
    assert not (tmp_path / "study").exists()


def test_the_quick_preset_is_four_trainers_and_three_seeds_and_can_be_changed(tmp_path):
    found = prepare(Asked(out=tmp_path / "quick", preset="quick"), check_extras=False)
    arms = ["single-det", "single-cls", "joint", "gradnorm", "dual"]
    assert found.plan["arms"] == arms
    assert found.plan["seeds"] == [0, 1, 2]
    assert len(found.runs) == 16
    assert (found.plan["settings"]["data"], found.plan["settings"]["imgsz"]) == ("phantom", 64)
    assert found.plan["window"] == [20, 96]
    other = prepare(Asked(out=tmp_path / "two", preset="quick", seeds="5", trainers="joint", record=["--epochs", "2"]))
    assert (len(other.runs), other.plan["settings"]["epochs"]) == (6, 2)


def test_what_is_measured_can_be_chosen(tmp_path):
    words = ["--data", "dial", "--no-ledger", "--micro-batches", "8"]
    found = prepare(Asked(out=tmp_path / "own", trainers="joint", record=words), check_extras=False)
    assert "--ledger" not in found.common
    assert found.plan["settings"]["micro_batches"] == 8
    assert found.plan["settings"]["ledger"] is False
    assert found.plan["probe_loader"] == {"split": "val"}
    usual = prepare(Asked(out=tmp_path / "usual", trainers="joint", record=["--data", "dial"]), check_extras=False)
    assert usual.common[-5:] == ("--micro-batches", "4", "--probe-loader", "val", "--ledger")


def test_a_flag_that_record_does_not_have_is_refused(tmp_path, capsys):
    assert command(["study", "--trainers", "joint", "--out", str(tmp_path / "s"), "--epocs", "3"]) == 2
    assert "--epocs" in capsys.readouterr().err


def test_the_cores_are_divided_among_jobs_unless_the_user_did():
    assert cores_each(1) == cores() >= 1
    assert cores_each(1000) == 1
    assert threads(3, {})["OMP_NUM_THREADS"] == "3"
    assert threads(3, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("text", "flags", "steps", "expected"),
    [
        ("", {}, 200, (20, 200)),
        ("", {"optimizer": "SGD"}, 200, (0, 200)),
        ("", {}, 30, (0, 30)),
        ("", {}, None, None),
        ("50:100", {}, None, (50, 100)),
        (":100", {}, 200, (20, 100)),
        ("50:", {}, 200, (50, 200)),
    ],
)
def test_the_window_leaves_out_the_first_steps_of_adam(text, flags, steps, expected):
    assert plan.parse_window(text, resolve(flags), steps) == expected


def test_a_window_that_no_file_can_hold_is_refused():
    with pytest.raises(UsageError, match="no span of a training"):
        plan.parse_window(f"0:{2**63}", resolve({}), 100)


# ---- what it leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two seeds of every control, with an arm that is made from another."""
    out = tmp_path_factory.mktemp("study") / "study"
    launch = InProcess()
    assert study(out, launch=launch, trainers="single,joint,gradnorm,gradnorm-static", seeds="2")
    return out, launch


def test_every_run_is_there_and_whole(finished):
    out, launch = finished
    arms = ("single-a", "single-b", "joint", "gradnorm", "gradnorm-static")
    names = {f"{arm}-s{seed}.h5" for arm in arms for seed in (0, 1)} | {"joint-s0-again.h5"}
    assert {path.name for path in out.glob("*.h5")} == names
    assert len(launch.words) == 11
    for name in names:
        assert check_run(out / name).whole, name
        with open_run(out / name) as found:
            assert found.provenance["arm"] == name.rpartition("-s")[0]


def test_what_was_fixed_is_in_every_file_as_in_the_plan(finished):
    out, _ = finished
    fixed = json.loads((out / "plan.json").read_text())
    assert fixed["measure"] == "C"
    assert fixed["window"] == [0, 2]
    assert fixed["pairs"] == ["b>a", "a>b"]
    assert (fixed["margin"], fixed["outcome_margin"], fixed["baseline"]) == (0.1, 0.02, "joint")
    assert fixed["seeds"] == [0, 1]
    assert fixed["recorded_with"]["single-b"] == "single --task b"
    assert "task_weights" not in fixed["settings"]  # those of gradnorm-static are not known before
    for path in out.glob("*.h5"):
        with open_run(path) as found:
            told = found.provenance
        assert told["plan.arms"] == fixed["arms"]
        assert told["plan.pairs"] == fixed["pairs"]
        for name, value in fixed["settings"].items():
            assert told[f"plan.settings.{name}"] == told[f"settings.{name}"] == value, name


def test_arms_of_a_seed_have_the_same_batches_weights_and_data(finished):
    out, _ = finished
    for seed in (0, 1):
        told = []
        for path in out.glob(f"*-s{seed}.h5"):
            with open_run(path) as found:
                told.append([found.provenance[name] for name in SAME])
        assert len(told) == 5
        assert all(one == told[0] for one in told)


def test_the_same_run_twice_is_identical_and_that_is_kept(finished):
    out, _ = finished
    results = json.loads((out / "results.json").read_text())
    assert results["again"] == {"files": ["joint-s0.h5", "joint-s0-again.h5"], "identical": True, "differs": []}
    assert results["failed"] == []
    assert results["unequal"] == {}
    assert "weight" in differing(out / "joint-s0.h5", out / "gradnorm-s0.h5")
    assert "batches.hash" in differing(out / "joint-s0.h5", out / "joint-s1.h5")


def test_an_arm_that_is_made_from_another_has_its_run_of_the_same_seed(finished):
    out, _ = finished
    with open_run(out / "gradnorm-s1.h5") as source, open_run(out / "gradnorm-static-s1.h5") as made:
        assert made.provenance["settings.from_run"] == "gradnorm-s1.h5"
        assert made["weight"][0] == pytest.approx(source["weight"].mean(0), rel=1e-6)


def test_finished_runs_are_not_run_again(finished, capsys):
    out, _ = finished
    launch = InProcess()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    assert study(out, launch=launch, trainers="single,joint,gradnorm,gradnorm-static", seeds="2")
    assert launch.words == []
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.h5")} == before
    told = capsys.readouterr()
    assert "joint-s0: there already" in told.err
    assert f"gradprobe compare {out}/*.h5 --baseline joint" in told.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": "3"}, "seeds: 0, 1, now 0, 1, 2"),
        ({"margin": 0.2}, "margin: 0.1, now 0.2"),
        ({"record": ["--lr", "1e-3"]}, "settings.lr: 0.002, now 0.001"),
        ({"trainers": "joint"}, "arms: "),
        ({"window": "1:2"}, "window: 0, 2, now 1, 2"),
    ],
)
def test_another_plan_in_a_begun_folder_is_refused(finished, change, message):
    out, _ = finished
    before = (out / "plan.json").read_text()
    with pytest.raises(UsageError, match=message):
        study(out, **{"trainers": "single,joint,gradnorm,gradnorm-static", "seeds": "2", **change})
    assert (out / "plan.json").read_text() == before


def test_runs_that_were_there_before_the_plan_are_refused(tmp_path):
    (tmp_path / "joint-s0.h5").write_bytes(b"")
    with pytest.raises(UsageError, match="recorded before anything was fixed"):
        study(tmp_path, trainers="joint", seeds="1")


# ---- failures


def test_one_failure_does_not_stop_the_rest_and_is_listed(tmp_path, capsys):
    fails = InProcess(fails=["gradnorm --data"])
    assert not study(tmp_path / "s", launch=fails, trainers="gradnorm,gradnorm-static,joint", seeds="1")
    told = capsys.readouterr().err
    assert "failed: gradnorm-s0.h5: exit code 1; the machine is on fire (log: " in told
    assert "failed: gradnorm-static-s0.h5: not started: it is made from gradnorm-s0, which failed" in told
    assert "2 of 4 runs failed" in told
    results = json.loads((tmp_path / "s" / "results.json").read_text())
    assert results["failed"] == ["gradnorm-s0.h5", "gradnorm-static-s0.h5"]
    assert results["again"]["identical"]
    again = InProcess()
    assert study(tmp_path / "s", launch=again, trainers="gradnorm,gradnorm-static,joint", seeds="1")
    assert [words[2] for words in again.words] == ["gradnorm", "gradnorm-static"]


def test_a_run_that_says_it_is_done_and_is_not_has_failed(tmp_path):
    class Liar(InProcess):
        def __call__(self, words, log):
            ended = super().__call__(words, log)
            (tmp_path / "s" / "joint-s0.h5").unlink(missing_ok=True)
            return ended

    assert not study(tmp_path / "s", launch=Liar(), trainers="joint", seeds="1")


def test_a_run_that_another_study_began_a_moment_before_is_waited_for(tmp_path, capsys):
    path = tmp_path / "s" / "joint-s0.h5"

    class Slower(InProcess):
        """The other one is done when the next run is started."""

        def __call__(self, words, log):
            ended = super().__call__(words, log)
            if len(self.words) == 1:
                ended.code = 3
                lock.lock_path(path).parent.mkdir()
                self.lock = lock.lock_path(path).open("w")
                fcntl.flock(self.lock, fcntl.LOCK_EX)
            else:
                self.lock.close()
            return ended

    launch = Slower()
    assert study(tmp_path / "s", launch=launch, trainers="joint", seeds="1"), capsys.readouterr().err
    assert len(launch.words) == 2
    results = json.loads((tmp_path / "s" / "results.json").read_text())
    assert [run["state"] for run in results["runs"]] == ["there already", "done"]


def test_arms_with_other_conditions_are_told(tmp_path, capsys):
    assert study(tmp_path / "s", trainers="joint", arm=["more=joint --epochs 2"], seeds="1")
    assert "warning: the arms of seed 0 differ in batches.hash, batches.count" in capsys.readouterr().err


# ---- the command line


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    """Killed with everything it started, in the middle of its second run."""
    record = [*FAST, "--data", "dial:size=2048", "--epochs", "4"]
    words = ["study", "--trainers", "joint", "--seeds", "1", "--out", str(tmp_path / "s"), *record]
    child = Process(words, start_new_session=True)
    checkpoint, log = tmp_path / "s" / "joint-s0-again.checkpoint.pt", tmp_path / "s" / "logs" / "joint-s0-again.log"
    deadline = time.monotonic() + 200
    while not (checkpoint.exists() and folder.progress(log) > 0) and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    assert time.monotonic() < deadline, log.read_text()
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    first = tmp_path / "s" / "joint-s0.h5"
    before = first.stat().st_mtime_ns
    assert folder.state(first) == "finished"
    second, deadline = tmp_path / "s" / "joint-s0-again.h5", time.monotonic() + 60
    while folder.state(second) == "recording" and time.monotonic() < deadline:  # killed, and not yet gone
        time.sleep(0.05)
    assert folder.state(second) == "resumable"
    launch = InProcess()
    asked = Asked(
        trainers="joint",
        seeds="1",
        out=tmp_path / "s",
        record=record,
    )
    assert run(prepare(asked, check_extras=False), launch)
    assert launch.words == [["record", "--resume", str(tmp_path / "s" / "joint-s0-again.h5")]]
    assert first.stat().st_mtime_ns == before
    results = json.loads((tmp_path / "s" / "results.json").read_text())
    assert results["again"]["identical"]
    assert results["unequal"] == {}


def test_a_checkpoint_of_no_use_means_recording_anew(tmp_path):
    out = tmp_path / "s"

    class Killed(InProcess):
        """The first run ends half done, with a checkpoint that is none."""

        def __call__(self, words, log):
            ended = super().__call__(words, log)
            if len(self.words) == 1:
                make_interrupted(out / "joint-s0.h5")
                (out / "joint-s0.checkpoint.pt").write_bytes(b"nonsense")
                ended.code = 1
            return ended

    assert not study(out, launch=Killed(), trainers="joint", seeds="1")
    launch = InProcess()
    assert study(out, launch=launch, trainers="joint", seeds="1")
    assert [words[1] for words in launch.words] == ["--resume", "--trainer"]
    assert "--overwrite" in launch.words[1]


def make_interrupted(path):
    """The run says that it was stopped."""
    with open_run(path) as found:
        header = make_header(2, provenance={k: v for k, v in found.provenance.items() if k != "sessions"})
    writer = RunWriter(path, overwrite=True)
    writer.start(header)
    for row in make_rows(header, 3):
        writer.write(row)
    writer.close("interrupted")


def test_stopping_a_study_stops_its_runs_with_their_files_closed(tmp_path):
    words = ["study", "--trainers", "joint", "--seeds", "1", "--out", tmp_path / "s", *FAST]
    child = Process([*words, "--data", "dial:size=8192", "--epochs", "50"])
    log = tmp_path / "s" / "logs" / "joint-s0.log"
    wait_for_an_epoch(child, log)
    child.send_signal(signal.SIGTERM)  # to the study alone
    child.communicate(timeout=100)
    assert child.returncode == 130
    with open_run(tmp_path / "s" / "joint-s0.h5") as found:
        assert found.end == "interrupted"
    assert folder.state(tmp_path / "s" / "joint-s0.h5") == "resumable"
