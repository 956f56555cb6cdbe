"""A study that is stopped, killed or begun twice; and what a folder may hold that is not its own."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from run_factory import make_header, make_rows, make_run
from studies import InProcess, study
from warm import Process, of_session

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.cli.study import Asked, prepare, run
from gradprobe.errors import RunFileError, UsageError
from gradprobe.runfile import RunWriter
from gradprobe.runfile.integrity import check_run
from gradprobe.study import folder, plan, runner
from gradprobe.study.arms import make_arms, make_runs
from gradprobe.study.folder import differing

RECORD = [
    *("--data", "dial:size=64", "--epochs", "6", "--every", "1", "--no-ledger"),
    *("--micro-batches", "1", "--probe-every", "1000"),
]
ASK = ["study", "--trainers", "joint", "--seeds", "1", "--jobs", "2", *RECORD]
NAMES = ["joint-s0", "joint-s0-again"]


def start(out):
    return subprocess.Popen(
        [sys.executable, "-m", "gradprobe", *ASK, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def warm(out):
    """The same, but for the imports."""
    return Process([*ASK, "--out", out], start_new_session=True)


def finish(out, begin=start) -> str:
    """The same command again, to its end; what it said."""
    child = begin(out)
    told, err = child.communicate(timeout=300)
    assert child.returncode == 0, (told, err)
    return err


def wait_for(sign, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := sign()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the study is where nothing comes between."""
    out = tmp_path_factory.mktemp("undisturbed") / "s"
    assert run(prepare(Asked(out=out, trainers="joint", seeds="1", record=RECORD), check_extras=False), InProcess())
    return out


def assert_whole(out, undisturbed):
    """Every run once, as it would have been; nothing beside."""
    assert sorted(path.stem for path in out.glob("*.h5")) == NAMES
    for name in NAMES:
        assert check_run(out / f"{name}.h5").whole
        assert differing(out / f"{name}.h5", undisturbed / f"{name}.h5") == []
    results = json.loads((out / "results.json").read_text())
    assert [entry["file"] for entry in results["runs"]] == [f"{name}.h5" for name in NAMES]
    assert (results["failed"], results["unequal"], results["again"]["identical"]) == ([], {}, True)
    assert not list(out.glob("*.parts"))


# ---- stopped


def stop_at_random(out, moments, seed, begin, seconds):
    """Stop the study again and again, each time in one of the ways, at any moment of the first seconds."""
    dice, begun = random.Random(seed), []
    for moment in range(moments):
        child = begin(out)
        begun.append(child.pid)
        time.sleep(dice.uniform(0.0, seconds))
        way = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)[moment % 3]
        child.send_signal(way)
        _, err = child.communicate(timeout=100)
        assert "Traceback" not in err, err
        deadline = time.monotonic() + 60  # what an earlier kill left over comes to its own end
        while way != signal.SIGKILL and any(map(of_session, begun)):
            assert time.monotonic() < deadline, [of_session(pid) for pid in begun]
            time.sleep(0.1)


@pytest.mark.timeout(900)
def test_a_study_that_is_stopped_or_killed_at_any_moment_goes_on_right(tmp_path, undisturbed):
    stop_at_random(tmp_path / "s", 6, 20, warm, 2.0)
    finish(tmp_path / "s", warm)
    assert_whole(tmp_path / "s", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [*range(6), 20])
def test_a_study_is_stopped_at_many_moments(tmp_path, undisturbed, seed):
    stop_at_random(tmp_path / "s", 15, seed, start, 9.0)
    finish(tmp_path / "s")
    assert_whole(tmp_path / "s", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_has_only_begun_to_start_when_its_study_is_killed_is_recorded_once(tmp_path, undisturbed):
    """It has no file yet, and imports torch: the study that is started then has to see it all the same."""
    out = tmp_path / "s"
    child = start(out)
    wait_for(lambda: len(list(out.glob("logs/*.log"))) == 2)
    child.kill()
    child.communicate(timeout=60)
    assert not list(out.glob("*.h5"))
    err = finish(out)
    told = re.findall(r"(\S+): is being recorded already \(process \d+\); waiting for that", err)
    assert sorted(told) == NAMES
    assert "started" not in err
    assert_whole(out, undisturbed)
    for name in NAMES:
        with open_run(out / f"{name}.h5") as found:
            assert len(found.sessions) == 1
        assert (out / "logs" / f"{name}.log").read_text().count("recorded: ") == 1


@pytest.mark.timeout(900)
@pytest.mark.parametrize("begin", [warm, pytest.param(start, marks=pytest.mark.slow)])
def test_two_studies_in_one_folder_share_the_work(begin, tmp_path, undisturbed):
    out = tmp_path / "s"
    both = [begin(out), begin(out)]
    told = [child.communicate(timeout=300) for child in both]
    assert [child.returncode for child in both] == [0, 0], told
    assert_whole(out, undisturbed)
    began = re.findall(r"started (\S+)", "".join(err for _, err in told))
    assert sorted(began) == NAMES
    for name in NAMES:
        with open_run(out / f"{name}.h5") as found:
            assert len(found.sessions) == 1


def test_of_two_studies_with_other_plans_one_alone_fixes_its_own(tmp_path):
    found, plans = [], [{"seeds": [seed]} for seed in range(8)]

    def write(own):
        try:
            found.append(json.loads(plan.write(tmp_path / "s", own).read_text()) == own)
        except UsageError:
            found.append(False)

    threads = [threading.Thread(target=write, args=[own]) for own in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False] * 7 + [True]


def test_a_run_that_does_not_stop_is_ended(monkeypatch, tmp_path):
    class Deaf:
        told = ()

        def poll(self):
            return None

        def terminate(self):
            self.told += ("terminate",)

        def kill(self):
            self.told += ("kill",)

        def wait(self, timeout=None):
            raise subprocess.TimeoutExpired("deaf", timeout)

    deaf = Deaf()

    def launch(words, log):
        os.kill(os.getpid(), signal.SIGTERM)  # at the worst moment: the process is there, and nobody knows it yet
        return deaf

    monkeypatch.setattr(runner, "PATIENCE", 0.1)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "s", launch=launch, trainers="joint", seeds="1")
    assert deaf.told == ("terminate", "kill")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---- a dry run


def test_a_dry_run_writes_nothing_and_fixes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = ["study", "--trainers", "joint,gradnorm", "--out", "s", "--data", "dial"]
    for more in (["--dry-run"], ["--dry-run", "--engine", "slurm"], ["--dry-run", "--seeds", "7"]):
        assert command([*ask, *more]) == 0
        assert list(tmp_path.iterdir()) == []
    assert "nothing was written" in capsys.readouterr().err
    prepare(Asked(out=Path("s"), trainers="joint", seeds="2", record=["--data", "dial"]), check_extras=False)
    before = (tmp_path / "s" / "plan.json").read_bytes()
    assert command([*ask, "--dry-run"]) == 2  # another plan is told by it, too
    assert "begun with another plan" in capsys.readouterr().err
    assert (tmp_path / "s" / "plan.json").read_bytes() == before


def test_every_command_of_a_dry_run_does_its_part(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--data", "dial:size=32", "--epochs", "1", "--every", "1"]
    ask = ["study", "--trainers", "gradnorm-static,gradnorm,joint", "--seeds", "1", "--out", "my study", *small]
    assert command([*ask, "--dry-run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[line.index("--only") + 1] for line in lines] == [
        "gradnorm-s0,gradnorm-static-s0",
        "joint-s0",
        "joint-s0-again",
    ]
    monkeypatch.setattr("gradprobe.study.runner.subprocesses", lambda jobs: InProcess())
    for line in reversed(lines):
        assert command(line[1:]) == 0
    capsys.readouterr()
    assert command([*ask, "--dry-run"]) == 0
    assert capsys.readouterr().out == ""  # nothing is left


# ---- what is there already


HOSTILE_PLANS = {
    "empty": b"",
    "text": b"not json",
    "binary": bytes(range(256)),
    "nul": b'{"seeds": "\\u0000"}\0',
    "utf16": '{"seeds": [0]}'.encode("utf-16"),
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "not a number": b'{"margin": NaN}',
    "endless": b'{"margin": -Infinity}',
    "digits": b'{"margin": ' + b"9" * 5000 + b"}",
    "beyond 64 bits": b'{"seeds": [9223372036854775808]}',
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deeper than a plan": b'{"a": ' * 40 + b"1" + b"}" * 40,
    "large": b'{"a": "' + b"x" * (3 << 20) + b'"}',
    "alien types": b'{"arms": {"joint": []}, "seeds": "0", "window": {"a": 1}, "pairs": 3, "settings": [null]}',
    "long": json.dumps({"record": "x" * 500_000, "y" * 100_000: 1}).encode(),
    "modules": b'{"trainer": "evil:Evil", "record": "--trainer evil:Evil --hyp evil.yaml", "arms": ["evil"]}',
    "turning": b'{"margin": "\\u202e\\u001b[2J"}',
}


@pytest.mark.parametrize("content", HOSTILE_PLANS.values(), ids=HOSTILE_PLANS)
def test_a_plan_of_a_stranger_is_refused_in_a_line(content, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('marker').touch()\n")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "plan.json").write_bytes(content)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for more in ([], ["--dry-run"]):
        assert command(["study", "--trainers", "joint", "--out", "s", "--data", "dial", *more]) == 2
        told = capsys.readouterr()
        assert told.err.count("\n") == 1
        assert len(told.err) < 1200
        assert "plan.json" in told.err
        assert "\x1b" not in told.err
    if content not in (HOSTILE_PLANS["alien types"], HOSTILE_PLANS["long"], *list(HOSTILE_PLANS.values())[-2:]):
        assert command(["record", "--plan", "s/plan.json", "--data", "dial", "--out", "x.h5"]) == 2
        assert "--plan s/plan.json: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "s" / "plan.json").read_bytes() == content


@pytest.mark.timeout(60)
def test_a_plan_that_is_no_file_is_refused(tmp_path, capsys):
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
        out = tmp_path / f"s{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        make(out / "plan.json")
        assert command(["study", "--trainers", "joint", "--out", str(out), "--data", "dial"]) == 2
        assert "plan.json" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == ["plan.json"]


def test_what_lies_in_the_folder_and_is_not_the_study_s_is_neither_run_nor_replaced(tmp_path, undisturbed, capsys):
    """A file that is no run, one of a later version, a run of another study, and one that is still another's."""
    out = tmp_path / "s"
    prepare(Asked(out=out, trainers="joint,gradnorm", seeds="1", record=RECORD), check_extras=False)
    (out / "joint-s0.h5").write_bytes(b"somebody's own")
    (out / "joint-s0-again.h5").write_bytes((undisturbed / "joint-s0-again.h5").read_bytes())  # of another plan
    (out / "--out.h5").write_bytes(b"no run")
    (out / "evil.py").write_text("raise SystemExit('run')")
    make_run(out / "gradnorm-s0.h5", rows=3, end="interrupted")
    (out / "gradnorm-s0.checkpoint.pt").write_bytes(b"of a stranger")
    before = {path: path.read_bytes() for path in out.iterdir()}
    launch = InProcess()
    asked = Asked(out=out, trainers="joint,gradnorm", seeds="1", record=RECORD)
    assert not run(prepare(asked, check_extras=False), launch)
    assert launch.words == []
    assert {path: path.read_bytes() for path in before} == before
    told = capsys.readouterr().err
    assert "failed: joint-s0.h5: cannot be read as a run file" in told
    assert "failed: joint-s0-again.h5: it is no run of this study: its plan.arms is ['joint']" in told
    assert "failed: gradnorm-s0.h5: it is no run of this study: its arm is None" in told
    assert told.count("away, and it is recorded again") >= 3


def test_no_module_of_the_present_folder_stands_in_for_a_package(tmp_path, undisturbed):
    """The folder that the command is given in may be a stranger's."""
    for name in ("gradprobe", "numpy", "torch", "h5py", "yaml", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("from pathlib import Path\nPath(__file__).with_name('marker').touch()\n")
    (tmp_path / "log").touch()
    root = Path(runner.__file__).parents[2]
    process = runner.start(["--version"], tmp_path / "log", {"PYTHONPATH": str(root)}, tmp_path)
    assert process.wait(60) == 0
    process = runner.start(["summary", str(undisturbed / "joint-s0.h5")], tmp_path / "log", {}, tmp_path)
    assert process.wait(60) == 0, (tmp_path / "log").read_text()
    assert not (tmp_path / "marker").exists()


def test_names_of_arms_lead_nowhere_else():
    for text in ("m:../../x", "m:-x", "m:", f"m:{'x' * 300}", "m:a/b"):
        with pytest.raises(UsageError, match="write NAME=TRAINER"):
            make_arms([text], [], ("a", "b"))


def test_an_own_trainer_is_named_again_where_its_run_is_gone_on_with(tmp_path):
    """No module is imported because a checkpoint in the folder names it."""
    arms = make_arms(["my.module:Mine", "joint"], [], ("a", "b"))
    own, joint = make_runs(arms, (0,), arms[1])[:2]
    where = folder.Folder(tmp_path)
    assert runner.command(where, own, [], folder.RESUMABLE)[-2:] == ["--trainer", "my.module:Mine"]
    assert "--trainer" not in runner.command(where, joint, [], folder.RESUMABLE)


def test_a_log_is_locked_as_long_as_its_run_goes_on(tmp_path):
    log = tmp_path / "log"
    process = runner.start(["--version"], log, {})
    try:
        with pytest.raises(runner.BusyError, match="another process has begun to record this run"):
            runner.start(["--version"], log, {})
    finally:
        process.wait(60)
    with log.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert "gradprobe" in log.read_text()


@pytest.mark.parametrize(
    "name", ["margin", "outcome_margin", "window", "seeds", "pairs", "baseline", "arms", "settings"]
)
@pytest.mark.parametrize("value", ["x", ["x"], [1.5, 2.5, 3.5], True, float("nan"), [float("inf")], "", [], 2**62])
def test_a_plan_in_a_file_of_a_stranger_is_compared_or_refused(name, value, tmp_path, capsys):
    about = {"trainer": "joint", "settings": {"seed": 0}, "arm": "joint", "plan": {name: value}}
    path = make_run(tmp_path / "run.h5", rows=4, layers=2, epochs=1, provenance=about)
    code = command(["compare", str(path)])
    told = capsys.readouterr()
    assert code in (0, 11) or (code in (2, 3) and told.err.count("\n") == 1), told.err


# ---- a run that is replaced while it is read


def write(path, number, rows=40):
    """A run whose every loss is its number."""
    header = make_header(2, provenance={"trainer": "joint", "number": number})
    writer = RunWriter(path, overwrite=True, flush_rows=7)
    writer.start(header)
    for row in make_rows(header, rows):
        row.loss[:] = number
        writer.write(row)
        if row.step % 70 == 0:
            writer.flush()
    writer.close("finished")


def test_a_reader_that_was_there_before_goes_on_with_the_old_file(tmp_path):
    path = tmp_path / "run.h5"
    write(path, 1)
    with open_run(path) as old:
        write(path, 2, rows=90)
        assert set(old["loss"].ravel()) == {1.0}
        assert (len(old), old.provenance["number"]) == (40, 1)
        assert old.refresh()
        assert set(old["loss"].ravel()) == {2.0}
        assert (len(old), old.provenance["number"]) == (90, 2)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("runs", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_readers_never_see_numbers_of_two_runs(tmp_path, runs):
    """A process replaces a run again and again, another one reads it: one run or the other, or a clear error."""
    path = tmp_path / "run.h5"
    write(path, 0)
    code = (
        "import sys; sys.path.insert(0, 'TESTS'); from test_study_stops import write; from pathlib import Path\n"
        f"for number in range(1, {runs + 1}): write(Path(sys.argv[1]), number)"
    ).replace("TESTS", str(Path(__file__).parent))
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    seen, refused = set(), 0
    follow = open_run(path)
    while writer.poll() is None:
        try:
            with open_run(path) as found:
                numbers = {found.provenance["number"], *np.unique(found["loss"]).astype(int)}
            follow.refresh()
            followed = {follow.provenance["number"], *np.unique(follow["loss"]).astype(int)}
        except RunFileError:
            refused += 1
            continue
        assert len(numbers) == len(followed) == 1, (numbers, followed)
        seen |= numbers
    follow.close()
    assert writer.returncode == 0
    assert len(seen) > 3
    assert refused <= len(seen)
