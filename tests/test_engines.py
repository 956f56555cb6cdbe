"""`gradprobe study --engine ray` and `--engine slurm`: the same files as on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from studies import InProcess, wait_for_an_epoch

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.cli.study import Asked, by_slurm, prepare, run, words
from gradprobe.errors import GradprobeError, UsageError
from gradprobe.study import cluster, folder
from gradprobe.study.arms import chains, choose, make_arms, make_runs
from gradprobe.study.folder import differing

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    asked = Asked(out=out, trainers="joint,gradnorm-static,gradnorm", seeds="1", record=SMALL)
    assert run(prepare(asked, check_extras=False), InProcess())
    torch.set_num_threads(threads)
    return out


def begin(there: Path, here: Path, *names: str) -> None:
    """The folder of a study of which some runs are done."""
    there.mkdir()
    for name in ("plan.json", *(f"{name}.h5" for name in names)):
        (there / name).write_bytes((here / name).read_bytes())


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
        parts = options["--output"].split("%%")  # which is a percent sign
        with Path("%".join(part.replace("%a", str(index)) for part in parts)).open("a") as log:
            codes.append(subprocess.run(["bash", str(path)], env=environment, stdout=log, stderr=log).returncode)
    return codes


@pytest.mark.parametrize("done", [["gradnorm-s0"], pytest.param([], marks=pytest.mark.slow)], ids=["two left", "three"])
def test_a_slurm_job_records_what_this_machine_records(done, here, tmp_path, monkeypatch, capsys):
    """What is left of it: the first run is there when the job is written, and those in ``done`` when it starts."""
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "my 5 % study", here, "joint-s0")
    ask = [*STUDY, "--out", "my 5 % study", "--engine", "slurm", "--jobs", "2"]
    assert command(ask) == 0
    told = capsys.readouterr()
    assert shlex.split(told.out.splitlines()[0]) == ["next:", "sbatch", "my 5 % study/slurm.sh"]
    assert "3 of 4 runs are left" in told.err
    script = tmp_path / "my 5 % study" / "slurm.sh"
    assert sorted(path.name for path in script.parent.iterdir()) == ["joint-s0.h5", "logs", "plan.json", "slurm.sh"]
    text = script.read_text()
    assert "#SBATCH --array=0-1%2\n" in text
    assert "--gres" not in text
    lines = text[text.index("RUNS=(") :].splitlines()[1:3]
    assert lines == ["gradnorm-s0,gradnorm-static-s0", "joint-s0-again"]  # made from one another: in one task
    for name in done:
        shutil.copy(here / f"{name}.h5", script.parent)
    assert sbatch(script, 1) == [0, 0]
    assert sorted(path.name for path in (script.parent / "logs").glob("slurm*")) == ["slurm-0.log", "slurm-1.log"]
    monkeypatch.setattr("gradprobe.study.runner.start", lambda *_: pytest.fail("nothing is left to run"))
    monkeypatch.setattr(cluster, "connect_ray", lambda: pytest.fail("nothing is left to join a cluster for"))
    assert command(ask) == command([*STUDY, "--out", "my 5 % study", "--engine", "ray"]) == 0
    assert capsys.readouterr().err.count("identical, bit for bit") == 2
    assert_equal_studies(here, script.parent)


def test_runs_that_follow_each_other_are_one_task_and_gpus_are_asked_for():
    arms = make_arms(["gradnorm-static", "joint", "gradnorm", "split"], [], ("a", "b"))
    runs = make_runs(arms, (0,), arms[1])
    grouped = [[run.name for run in chain] for chain in chains(runs)]
    assert grouped == [["joint-s0", "split-s0"], ["gradnorm-s0", "gradnorm-static-s0"], ["joint-s0-again"]]
    there = {"out": Path("out"), "here": Path("/data/of me"), "cores": 4, "jobs": None}
    text = cluster.slurm_script(runs, ["gradprobe", "study"], ["--device", "0,1"], gpus=2, **there)
    assert "#SBATCH --gres=gpu:2\n" in text
    assert "#SBATCH --array=0-2\n" in text
    assert "cd -- '/data/of me' || exit\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize(
    ("environment", "threads"),
    [({}, "4 4"), ({"SLURM_CPUS_PER_TASK": "2"}, "2 2"), ({"SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "1"}, "1 2")],
)
def test_a_task_has_the_threads_of_its_cores_unless_the_user_says_otherwise(environment, threads):
    runs = make_runs(make_arms(["joint"], [], ("a", "b")), (0,), make_arms(["joint"], [], ("a", "b"))[0])
    show = ["bash", "-c", 'echo "$OMP_NUM_THREADS $OPENBLAS_NUM_THREADS"']
    there = {"out": Path("out"), "here": Path("/"), "cores": 4, "gpus": 0, "jobs": None}
    text = cluster.slurm_script(runs, show, [], **there)
    bare = {"PATH": os.environ["PATH"], **environment}
    assert subprocess.run(["bash"], input=text, text=True, env=bare, capture_output=True).stdout.strip() == threads


def test_the_command_in_the_job_fixes_the_same_plan(tmp_path):
    asked = Asked(
        out=tmp_path / "s",
        trainers="joint,gradnorm",
        arm=["light=joint --task-weights a=1,b=0.1"],
        seeds="3,7",
        window="0:2",
        pairs="a>b",
        margin=0.3,
        outcome_margin=1e-3,
        record=SMALL,
    )
    prepare(asked, check_extras=False)
    again = [*words(asked), "--dry-run", "--", *SMALL]
    assert command(again) == 0  # another plan in a folder that was begun is refused


INJECTED = (
    "$(touch marker)",
    "`touch marker`",
    "'; touch marker; '",
    '"; touch marker; "',
    "a\ntouch marker\n",
    "a\r\ntouch marker",
    "\n#SBATCH --wrap=touch",
    "a # b",
    "a\\",
    "-rf",
    "--wrap=touch marker",
    "${HOME} ~ * ? [a] {a,b} !!",
    "\u202eabc\u2028touch marker",
    "檢測 %a %j",
)
STUB = """#!/bin/bash
printf '%s\\0' "$0" "$@" >> "$RECORDED"
"""


def run_by_bash(script, folder):
    """Run the script as a node does, with stand-ins that keep the words that they are called with."""
    stubs, recorded = folder / "stubs", folder / "recorded"
    stubs.mkdir(exist_ok=True)
    for name in ("gradprobe", "srun", "sbatch", "touch"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    recorded.write_bytes(b"")
    environment = {
        **os.environ,
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "RECORDED": str(recorded),
        "SLURM_ARRAY_TASK_ID": "0",
    }
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return [os.fsdecode(word) for word in recorded.read_bytes().split(b"\0")[:-1]]


@pytest.mark.parametrize("text", INJECTED, ids=ascii)
def test_nothing_in_a_flag_is_run_by_the_shell_of_a_job(text, tmp_path, monkeypatch):
    """Nor is any of it a line of its own: every word arrives as it was given."""
    monkeypatch.setattr("gradprobe.study.runner.COMMAND", ("gradprobe",))
    monkeypatch.chdir(tmp_path)
    record = [*SMALL, "--weights", text, "--gradnorm-layer", text]
    asked = Asked(
        out=Path("s"), trainers="joint", seeds="1", arm=[shlex.join(["x=joint", "--weights", text])], record=record
    )
    assert by_slurm(asked, prepare(asked, check_extras=False))
    script = tmp_path / "s" / "slurm.sh"
    assert b"\r" not in script.read_bytes()
    told = run_by_bash(script, tmp_path)
    assert [Path(told[0]).name, *told[1:]] == ["gradprobe", *words(asked), "--only", "joint-s0", "--", *record]
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("text", INJECTED, ids=ascii)
def test_nothing_in_the_name_of_a_folder_is_run_by_the_shell_of_a_job(text, tmp_path, monkeypatch, capsys):
    """Such a folder is refused where Slurm could not be told of its logs, and quoted elsewhere."""
    monkeypatch.setattr("gradprobe.study.runner.COMMAND", ("gradprobe",))
    for here, out in ((tmp_path / "there", Path(text)), (tmp_path / text, Path("s"))):
        here.mkdir()
        monkeypatch.chdir(here)
        ask = ["study", "--trainers", "joint", "--seeds", "1", "--out", str(out), "--engine", "slurm", *SMALL]
        if "\n" in text or "\r" in text:
            assert command(ask) == 2
            assert "holds a line break or another control character" in capsys.readouterr().err
            assert not (here / out / "slurm.sh").exists()
            continue
        assert command(ask) == 0
        capsys.readouterr()
        script = here / out / "slurm.sh"
        lines = script.read_text().split("\n")
        head = lines[1 : next(i for i, line in enumerate(lines) if not line.startswith("#") and i)]
        assert [line.split("=")[0] for line in head if line.startswith("#SBATCH")] == [
            "#SBATCH --job-name",
            "#SBATCH --array",
            "#SBATCH --cpus-per-task",
            "#SBATCH --output",
            "#SBATCH --open-mode",
            "#SBATCH --requeue",
            "#SBATCH --signal",
        ]
        assert re.fullmatch(r"#SBATCH --job-name=[\w.-]+", lines[1], re.ASCII)
        told = run_by_bash(script, tmp_path)
        assert told[1:4] == ["study", "--out", str(out)]
        assert told.count("gradprobe") + told.count("touch") == 0
        assert not list(tmp_path.rglob("marker"))


def test_nothing_in_a_flag_is_run_by_the_shell_of_a_worker(tmp_path):
    """There is none: what Ray runs are words."""
    (tmp_path / "plan.json").write_text("{}")
    text = "$(touch marker)`touch marker`\ntouch marker"
    assert cluster.record_on_node(["summary", text], "log", str(tmp_path), ("plan.json", "{}"), {}) == 3
    assert "no such file" in (tmp_path / "log").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("log", "plan.json")] == []


# ---- Ray


@pytest.fixture(scope="module")
def ray_cluster():
    """Two nodes of one core each, on this machine."""
    utils = pytest.importorskip("ray.cluster_utils")
    found = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.add_node(num_cpus=1)
    yield {**os.environ, "RAY_ADDRESS": found.address}
    found.shutdown()


@pytest.mark.parametrize(
    ("done", "fails"), [(NAMES[:2], NAMES[2]), pytest.param(NAMES[:1], NAMES[1], marks=pytest.mark.slow)]
)
def test_a_ray_cluster_records_what_this_machine_records(done, fails, here, ray_cluster, tmp_path):
    """Where a run fails, no other is stopped, and the same command tries it again."""
    begin(tmp_path / "a study", here, *done)
    (tmp_path / "a study" / f"{fails}.h5").mkdir()  # where a file belongs
    ask = [*STUDY, "--out", "a study", "--engine", "ray"]
    child = start(*ask, env=ray_cluster, cwd=tmp_path)
    _, err = child.communicate(timeout=280)
    assert child.returncode == 1
    assert "4 runs, 2 at a time" in err
    assert f"failed: {fails}.h5: cannot be read as a run file" in err
    assert "identical, bit for bit" in err  # so the second run of joint-s0, after that, is there
    (tmp_path / "a study" / f"{fails}.h5").rmdir()
    child = start(*ask, env=ray_cluster, cwd=tmp_path)
    out, err = child.communicate(timeout=280)
    assert child.returncode == 0, err
    assert "gradprobe compare 'a study'/*.h5 --baseline joint" in out
    assert_equal_studies(here, tmp_path / "a study")


def test_stopping_a_study_on_ray_stops_its_runs_with_their_files_closed(ray_cluster, tmp_path):
    fast = ["--no-ledger", "--micro-batches", "1", "--probe-every", "1000", "--every", "64"]
    ask = ["study", "--trainers", "joint", "--seeds", "1", "--out", tmp_path / "s", "--only", "joint-s0"]
    child = start(*ask, "--engine", "ray", "--data", "dial:size=8192", "--epochs", "50", *fast, env=ray_cluster)
    log = tmp_path / "s" / "logs" / "joint-s0.log"
    wait_for_an_epoch(child, log)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=100)
    assert child.returncode == 130, err
    with open_run(tmp_path / "s" / "joint-s0.h5") as found:
        assert found.end == "interrupted"
    assert folder.state(tmp_path / "s" / "joint-s0.h5") == "resumable"
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout == b""


def test_no_cluster_is_a_clear_error(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        monkeypatch.setenv(name, "0")  # as the command does, but not for the tests behind this one
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert command([*STUDY, "--out", str(tmp_path / "s"), "--engine", "ray"]) == 1
    assert "RAY_ADDRESS=127.0.0.1:1: no cluster answers there" in capsys.readouterr().err


def test_without_ray_it_is_said_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command([*STUDY, "--out", str(tmp_path / "s"), "--engine", "ray"]) == 2
    assert "pip install 'gradprobe[ray]'" in capsys.readouterr().err


def test_a_node_that_sees_another_folder_starts_nothing(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(GradprobeError, match="let --out lie on a shared file system"):
        cluster.record_on_node(["--version"], str(log), str(tmp_path), ("plan.json", "{}"), {})
    (tmp_path / "plan.json").write_text("{1}")
    with pytest.raises(GradprobeError, match="it holds another plan"):
        cluster.record_on_node(["--version"], str(log), str(tmp_path), ("plan.json", "{}"), {})
    assert not log.exists()
    (tmp_path / "plan.json").write_text("{}")
    assert cluster.record_on_node(["--version"], "log", str(tmp_path), ("plan.json", "{}"), {}) == 0
    assert "gradprobe" in log.read_text()


@pytest.mark.parametrize(
    ("have", "gpus", "jobs", "runs", "cores"),
    [
        ([{"CPU": 4}, {"CPU": 4}], 0, None, 8, 1),
        ([{"CPU": 4}, {"CPU": 4}], 0, 2, 2, 4),
        ([{"CPU": 4}, {"CPU": 4}], 0, 1, 1, 4),  # a run is on one node
        ([{"CPU": 4}, {"CPU": 12}], 0, 2, 2, 6),
        ([{"CPU": 0}, {"CPU": 2}], 0, 9, 9, 1),
        ([{"CPU": 16, "GPU": 4}], 2, None, 2, 8),
        ([{"CPU": 64}, {"CPU": 4, "GPU": 1}], 1, None, 1, 4),  # where the GPU is
        ([{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3}], 2, None, 2, 8),
        ([{"CPU": 8, "GPU": 1}], 1, 4, 4, 8),  # one after the other
        ([], 0, None, 1, 1),
    ],
)
def test_the_nodes_are_divided_among_runs(have, gpus, jobs, runs, cores):
    assert cluster.at_a_time(have, gpus, jobs) == runs
    assert cluster.cores_per_run(have, gpus, runs) == cores


def test_gpus_that_no_node_has_are_refused():
    with pytest.raises(UsageError, match="asks for 2 GPUs for each run; no node of the cluster has more than 1"):
        cluster.at_a_time([{"CPU": 4, "GPU": 1.0}, {"CPU": 4, "GPU": 1.0}], 2, None)
