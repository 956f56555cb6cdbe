"""``gradprobe record`` in two processes, as a user starts it: by torchrun and by --processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from warm import Process

from gradprobe import open_run, processes
from gradprobe.cli.app import run as command
from gradprobe.errors import TrainingError, UsageError
from gradprobe.trainers import engine
from gradprobe.trainers.settings import resolve

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")},
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}
LONG = ["--data", "dial", "--trainer", "gradnorm", "--batch-size", "8", "--every", "1", "--bn-batches", "2"]


def start(cwd, *words):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def wait_for(sign, process):
    deadline = time.monotonic() + 120
    while not sign() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    assert sign()


def of_rank(rank, run):
    """The process id of one process of a run, which is known by the folder that it works in."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            inside = (folder / "cwd").readlink() == run
        except OSError:
            continue
        if inside and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_run_of_two_processes_is_stopped_killed_and_gone_on_with_until_it_is_done(tmp_path):
    """Ctrl-C under --processes; kill -9 of the second process under torchrun; and then to the end."""
    run, last = tmp_path / "run.h5", tmp_path / "run.last.pt"
    words = [*LONG, "--epochs", 8, "--out", "run.h5"]

    process = start(tmp_path, "gradprobe", "record", *words, "--device", "cpu", "--processes", 2)
    wait_for(last.exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out.splitlines() == ["stopped, complete up to here: run.h5", "next:     gradprobe plot run.h5"]
    stopped = look(run)
    assert stopped["end"] == "interrupted"
    assert 0 < len(stopped["step"]) < stopped["steps"]

    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "gradprobe"]
    saved = last.stat().st_mtime_ns
    process = start(tmp_path, *torchrun, "record", "--resume", "run.h5")
    wait_for(lambda: last.stat().st_mtime_ns != saved, process)
    os.kill(of_rank(1, tmp_path), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    killed = look(run)
    assert killed["end"] == "interrupted" or "lost another one" in killed["end"], err
    assert len(killed["step"]) > 0

    process = start(tmp_path, "gradprobe", "record", "--resume", "run.h5")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    done = look(run)
    assert done["end"] == "finished"
    assert done["step"].tolist() == list(range(done["steps"]))
    assert done["processes"] == 2
    assert done["micro_batches"].max() == 2
    assert not (tmp_path / "run.checkpoint.pt").exists()


def ranks(folder, *words):
    """Two processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **ENVIRONMENT,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    return [
        Process(["record", *words], cwd=folder, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="forks and kills processes")
def test_a_first_process_that_is_killed_leaves_what_it_had_flushed_and_the_run_goes_on(tmp_path, capsys):
    """kill -9 of the process that writes: the other one does not wait for it, and nothing is damaged."""
    run, last, state = (tmp_path / f"run.{end}" for end in ("h5", "last.pt", "checkpoint.pt"))
    first, other = ranks(tmp_path, *LONG, "--epochs", 8, "--out", "run.h5")
    # Saved last of an epoch, after the rows were flushed.
    wait_for(lambda: last.exists() and state.stat().st_mtime_ns > last.stat().st_mtime_ns, first)
    first.kill()
    _, err = other.communicate(timeout=60)
    assert other.returncode not in (0, 130), err
    check_left(run, capsys)

    for process in ranks(tmp_path, "--resume", "run.h5"):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    check_done(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_first_process_that_is_killed_under_the_launcher_ends_the_other_too(tmp_path, capsys):
    run, last, state = (tmp_path / f"run.{end}" for end in ("h5", "last.pt", "checkpoint.pt"))
    words = [*LONG, "--epochs", 8, "--out", "run.h5"]
    process = start(tmp_path, "gradprobe", "record", *words, "--device", "cpu", "--processes", 2)
    wait_for(lambda: last.exists() and state.stat().st_mtime_ns > last.stat().st_mtime_ns, process)
    first, other = of_rank(0, tmp_path), of_rank(1, tmp_path)
    os.kill(first, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, 130), err
    assert not Path(f"/proc/{other}").exists()
    check_left(run, capsys)

    process = start(tmp_path, "gradprobe", "record", "--resume", "run.h5")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    check_done(run)


def check_left(run, capsys):
    """What a kill left is every whole epoch, readable, and nothing but incomplete."""
    left = look(run)
    assert left["end"] == ""
    epoch = left["steps"] // 8
    assert epoch <= len(left["step"]) < left["steps"]
    assert left["step"].tolist() == list(range(len(left["step"])))
    assert command(["check", str(run), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert {finding["kind"] for finding in report["findings"]} == {"incomplete"}
    assert report["rows"] == len(left["step"])


def check_done(run):
    done = look(run)
    assert (done["end"], done["processes"]) == ("finished", 2)
    assert done["step"].tolist() == list(range(done["steps"]))
    assert command(["check", str(run)]) == 0


def look(path):
    with open_run(path) as run:
        assert np.isfinite(run["loss"]).all()
        steps = run.provenance["steps_per_epoch"] * run.provenance["settings.epochs"]
        return {
            "end": run.end,
            "step": run["step"],
            "steps": steps,
            "micro_batches": run["micro_batches"],
            "processes": run.provenance["settings.processes"],
        }


TWO = {"MASTER_ADDR": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1"}


@pytest.mark.parametrize(
    ("flags", "environment", "count"),
    [
        ({}, {}, 1),
        ({"processes": 2}, {}, 2),
        ({"device": "0,1"}, {}, 2),
        ({"device": "0,1"}, TWO, 2),
        ({}, TWO, 2),
        ({"device": "0,1"}, {**TWO, "WORLD_SIZE": "4"}, 4),  # two machines
        ({"device": "0"}, {**TWO, "LOCAL_WORLD_SIZE": "1"}, 2),  # two machines with one each
        ({"micro_batches": 4}, TWO, 2),
    ],
)
def test_how_many_processes(flags, environment, count):
    assert engine.with_processes(resolve(flags), environment).processes == count


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ({"processes": 3}, TWO, "torchrun started 2 processes, but the run is of 3"),
        ({"processes": 3, "batch_size": 9, "device": "0,1"}, {}, "--device 0,1 names 2 devices for 3 processes"),
        ({"processes": 3}, {}, "--batch-size 16 is that of all 3 processes.*the next one is 18"),
        ({"processes": 2, "micro_batches": 3}, {}, "--micro-batches 3 are those of all 2 processes"),
        ({"processes": 2, "device": "mps"}, {}, "--device mps: 2 processes cannot share one"),
        ({"processes": 2, "device": "0"}, {}, "--device 0: 2 processes need a GPU each, such as --device 0,1"),
        ({"device": "0"}, TWO, "--device 0: 2 processes need a GPU each"),
        ({"device": "1,1"}, {}, "--device 1,1: 2 processes need a GPU each"),
        ({"device": "cpu,0"}, {}, "--device cpu,0: 2 processes need a GPU each"),
    ],
)
def test_what_cannot_be_divided_is_refused(flags, environment, message):
    with pytest.raises(UsageError, match=message):
        engine.with_processes(resolve(flags), environment)


def test_each_process_has_its_device():
    assert engine.own_device("0,1", TWO) == "1"
    assert engine.own_device("cpu", TWO) == "cpu"
    assert engine.own_device("0", {}) == "0"
    assert [processes.is_first(e) for e in ({}, {**TWO, "RANK": "0"}, TWO)] == [True, True, False]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "3"], "--batch-size"),
        (["--processes", "-1"], "at least 0"),
        (["--device", "98,99"], "--device 98,99: torch finds"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(["record", "--data", "dial", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_kind_is_not_taken_for_a_lost_process():
    one = processes.OneProcess()
    with pytest.raises(RuntimeError, match="of the user"), one.losing_none():
        raise RuntimeError("of the user")
    several = object.__new__(processes.ManyProcesses)
    several.rank, several.size = 0, 2
    with pytest.raises(RuntimeError, match="of the user"), several.losing_none():
        raise RuntimeError("of the user")
    with pytest.raises(TrainingError, match=r"process 0 of 2 lost another one.*--resume"), several.losing_none():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
