"""`gradprobe study --engine ray` and `--engine slurm`: the same files as on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from studies import InProcess

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.cli.engines import words
from gradprobe.cli.studying import Asked, prepare, run
from gradprobe.errors import GradprobeError, UsageError
from gradprobe.study import folder, ray_engine, slurm
from gradprobe.study.agreement import differing
from gradprobe.study.arms import choose, make_arms, make_runs

SMALL = ["--data", "dial:size=32", "--epochs", "1", "--every", "1"]
STUDY = ["study", "--trainers", "joint,gradnorm-static,gradnorm", "--seeds", "1", *SMALL]
NAMES = ["joint-s0", "gradnorm-s0", "gradnorm-static-s0", "joint-s0-again"]


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "gradprobe", *map(str, arguments)],
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The study on this machine, as every other engine has to leave it; one core for each run, as on a small node."""
    out = tmp_path_factory.mktemp("local") / "study"
    child = start(*STUDY, "--out", out, "--jobs", "2", env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, err = child.communicate(timeout=280)
    assert child.returncode == 0, err
    return out


def assert_equal_studies(one: Path, other: Path) -> None:
    assert (one / "plan.json").read_text() == (other / "plan.json").read_text()
    for name in NAMES:
        assert differing(one / f"{name}.h5", other / f"{name}.h5") == []
    results = [json.loads((each / "results.json").read_text()) for each in (one, other)]
    assert [result["again"]["identical"] for result in results] == [True, True]
    assert [result["unequal"] for result in results] == [{}, {}]


# ---- some of its runs


def test_chosen_runs_bring_those_that_they_are_made_from():
    arms = make_arms(["gradnorm-static", "joint", "gradnorm"], [], ("a", "b"))
    runs = make_runs(arms, (0, 1), arms[1])
    assert [run.name for run in choose(runs, "gradnorm-static-s1,joint-s0")] == [
        "joint-s0",
        "gradnorm-s1",
        "gradnorm-static-s1",
    ]
    assert choose(runs, "") == runs
    with pytest.raises(UsageError, match=r"no run of this study is called so\. Did you mean 'joint-s0'"):
        choose(runs, "jiont-s0")


def test_some_runs_alone_are_those_of_the_whole_study_and_leave_no_results(here, tmp_path):
    asked = Asked(
        out=tmp_path / "s",
        trainers="joint,gradnorm-static,gradnorm",
        seeds="1",
        only="gradnorm-static-s0",
        record=SMALL,
    )
    launch = InProcess()
    assert run(prepare(asked, check_extras=False), launch)
    assert [line[2] for line in launch.words] == ["gradnorm", "gradnorm-static"]
    assert not (tmp_path / "s" / "results.json").exists()
    assert (tmp_path / "s" / "plan.json").read_text() == (here / "plan.json").read_text()


def test_an_unknown_engine_is_refused(tmp_path, capsys):
    assert command([*STUDY, "--out", str(tmp_path / "s"), "--engine", "rya"]) == 2
    assert "there are: local, ray, slurm" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


# ---- Slurm


def sbatch(path: Path, cores: int) -> list[int]:
    """What sbatch does with an array job, one task after the other, on this machine; the exit code of each.

    Read on its own: the options of the ``#SBATCH`` lines, the range, the name of the log, the variable of the index.
    """
    options = {}
    for line in path.read_text().splitlines()[1:]:
        if not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            ((name, value),) = [word.partition("=")[::2] for word in shlex.split(line)[1:]]
            options[name] = value
    assert int(options["--cpus-per-task"]) == cores
    first, last = re.match(r"(\d+)-(\d+)", options["--array"]).groups()
    codes = []
    for index in range(int(first), int(last) + 1):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(index), "OMP_NUM_THREADS": str(cores)}
        with Path(options["--output"].replace("%a", str(index))).open("a") as log:
            codes.append(subprocess.run(["bash", str(path)], env=environment, stdout=log, stderr=log).returncode)
    return codes


def test_a_slurm_job_records_what_this_machine_records(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ask = [*STUDY, "--out", "my study", "--engine", "slurm"]
    assert command(ask) == 0
    told = capsys.readouterr()
    assert shlex.split(told.out.splitlines()[0]) == ["next:", "sbatch", "my study/slurm.sh"]
    assert "4 of 4 runs are left" in told.err
    script = tmp_path / "my study" / "slurm.sh"
    assert sorted(path.name for path in script.parent.iterdir()) == ["logs", "plan.json", "slurm.sh"]
    assert sbatch(script, 1) == [0] * 3  # gradnorm-static behind gradnorm, in one task
    monkeypatch.setattr("gradprobe.study.runner.start", lambda *_: pytest.fail("nothing is left to run"))
    assert command(ask) == 0
    assert "identical, bit for bit" in capsys.readouterr().err
    assert_equal_studies(here, tmp_path / "my study")


def test_a_slurm_job_has_what_is_left_and_as_many_at_a_time_as_asked(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    for name in ("plan.json", "joint-s0.h5", "gradnorm-s0.h5"):
        (tmp_path / "s" / name).write_bytes((here / name).read_bytes())
    assert command([*STUDY, "--out", "s", "--engine", "slurm", "--jobs", "2"]) == 0
    assert "2 of 4 runs are left" in capsys.readouterr().err
    text = (tmp_path / "s" / "slurm.sh").read_text()
    assert "#SBATCH --array=0-1%2\n" in text
    assert "--gres" not in text
    lines = text[text.index("RUNS=(") :].splitlines()[1:3]
    assert lines == ["joint-s0-again", "gradnorm-static-s0"]


def test_runs_that_follow_each_other_are_one_task_and_gpus_are_asked_for():
    arms = make_arms(["gradnorm-static", "joint", "gradnorm", "split"], [], ("a", "b"))
    runs = make_runs(arms, (0,), arms[1])
    chains = [[run.name for run in chain] for chain in slurm.chains(runs)]
    assert chains == [["joint-s0", "split-s0"], ["gradnorm-s0", "gradnorm-static-s0"], ["joint-s0-again"]]
    there = {"out": Path("out"), "here": Path("/data/of me"), "cores": 4, "jobs": None}
    text = slurm.script(runs, ["gradprobe", "study"], ["--device", "0,1"], gpus=2, **there)
    assert "#SBATCH --gres=gpu:2\n" in text
    assert "#SBATCH --array=0-2\n" in text
    assert "cd '/data/of me' || exit\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_the_command_in_the_job_fixes_the_same_plan(tmp_path):
    asked = Asked(
        out=tmp_path / "s",
        trainers="joint,gradnorm",
        arms=["light=joint --task-weights a=1,b=0.1"],
        seeds="3,7",
        window="0:2",
        pairs="a>b",
        margin=0.3,
        outcome_margin=1e-3,
        record=["--", *SMALL],
    )
    prepare(asked, check_extras=False)
    again = [*words(asked), "--dry-run", "--", *SMALL]
    assert command(again) == 0  # another plan in a folder that was begun is refused


# ---- Ray


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each, on this machine."""
    utils = pytest.importorskip("ray.cluster_utils")
    found = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.add_node(num_cpus=1)
    yield {**os.environ, "RAY_ADDRESS": found.address}
    found.shutdown()


def test_a_ray_cluster_records_what_this_machine_records(here, cluster, tmp_path):
    child = start(*STUDY, "--out", "s", "--engine", "ray", env=cluster, cwd=tmp_path)
    out, err = child.communicate(timeout=280)
    assert child.returncode == 0, err
    assert "4 runs, 2 at a time" in err
    assert "identical, bit for bit" in err
    assert "gradprobe compare s/*.h5 --baseline joint" in out
    assert_equal_studies(here, tmp_path / "s")


def test_stopping_a_study_on_ray_stops_its_runs_with_their_files_closed(cluster, tmp_path):
    fast = ["--no-ledger", "--micro-batches", "1", "--probe-every", "1000", "--every", "64"]
    ask = ["study", "--trainers", "joint", "--seeds", "1", "--out", tmp_path / "s", "--engine", "ray"]
    child = start(*ask, "--data", "dial:size=8192", "--epochs", "50", *fast, env=cluster)
    log = tmp_path / "s" / "logs" / "joint-s0.log"
    deadline = time.monotonic() + 150
    while folder.progress(log) == 0 and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    assert time.monotonic() < deadline, log.read_text()
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=100)
    assert child.returncode == 130, err
    with open_run(tmp_path / "s" / "joint-s0.h5") as found:
        assert found.end == "interrupted"
    assert folder.state(tmp_path / "s" / "joint-s0.h5") == "resumable"
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout == b""


def test_a_run_that_fails_on_ray_stops_no_other_and_says_why(cluster, tmp_path):
    ask = ["study", "--trainers", "joint", "--seeds", "1", "--out", "s", *SMALL]
    assert start(*ask, "--dry-run", cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait(100) == 0
    (tmp_path / "s" / "joint-s0.h5").mkdir()  # where a file belongs
    child = start(*ask, "--engine", "ray", env=cluster, cwd=tmp_path)
    _, err = child.communicate(timeout=280)
    assert child.returncode == 1
    assert "failed: joint-s0.h5: exit code " in err
    assert folder.state(tmp_path / "s" / "joint-s0-again.h5") == "finished"


def test_no_cluster_is_a_clear_error(tmp_path):
    pytest.importorskip("ray")
    child = start(*STUDY, "--out", tmp_path / "s", "--engine", "ray", env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"})
    _, err = child.communicate(timeout=200)
    assert child.returncode == 1
    assert "RAY_ADDRESS=127.0.0.1:1: no cluster answers there" in err


def test_a_node_that_sees_another_folder_starts_nothing(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(GradprobeError, match="let --out lie on a shared file system"):
        ray_engine.record(["--version"], str(log), str(tmp_path), ("plan.json", "{}"), {})
    (tmp_path / "plan.json").write_text("{1}")
    with pytest.raises(GradprobeError, match="it holds another plan"):
        ray_engine.record(["--version"], str(log), str(tmp_path), ("plan.json", "{}"), {})
    assert not log.exists()
    (tmp_path / "plan.json").write_text("{}")
    assert ray_engine.record(["--version"], "log", str(tmp_path), ("plan.json", "{}"), {}) == 0
    assert "gradprobe" in log.read_text()


@pytest.mark.parametrize(
    ("have", "gpus", "jobs", "runs", "cores"),
    [
        ({"CPU": 8, "node:a": 1, "node:b": 1, "node:__internal_head__": 1}, 0, None, 8, 1),
        ({"CPU": 8, "node:a": 1, "node:b": 1, "node:__internal_head__": 1}, 0, 2, 2, 4),
        ({"CPU": 8, "node:a": 1, "node:b": 1, "node:__internal_head__": 1}, 0, 1, 1, 4),
        ({"CPU": 16, "GPU": 4, "node:a": 1}, 2, None, 2, 8),
        ({}, 0, None, 1, 1),
    ],
)
def test_the_cluster_is_divided_among_runs(have, gpus, jobs, runs, cores):
    assert ray_engine.at_a_time(have, gpus, jobs) == runs
    assert ray_engine.cores_each(have, runs) == cores


def test_gpus_that_are_not_there_are_refused():
    with pytest.raises(UsageError, match="asks for 2 GPUs for each run; the cluster has 1"):
        ray_engine.at_a_time({"GPU": 1.0}, 2, None)
