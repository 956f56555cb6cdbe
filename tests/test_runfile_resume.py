"""Going on with a run: one continuous series, both sessions in the provenance, in record's loop and in anyone's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from writing import TASKS, assert_rows, header, row, write

from gradprobe import attach, errors, open_run
from gradprobe.rows import Header
from gradprobe.runfile import RunWriter, content


def test_going_on_cuts_the_rows_from_there(tmp_path):
    path = tmp_path / "run.h5"
    first = write(path, range(25))
    for epoch in range(3):
        first.write_epoch(epoch, {"mAP50": epoch})
    first.close("interrupted")
    second = write(path, range(20, 30), rewind=(20, 1))
    second.write_epoch(2, {"mAP50": 7})
    second.close()
    with open_run(path) as run:
        assert_rows(run, range(30))
        np.testing.assert_array_equal(run.epochs["mAP50"], [0, 1, 7])
        assert run.end == "finished"


def test_metrics_are_kept_by_their_epoch_also_where_it_has_no_row(tmp_path):
    path = tmp_path / "run.h5"
    first = write(path, range(3))  # rows of epoch 0 alone
    for epoch in range(4):
        first.write_epoch(epoch, {"mAP50": epoch})
    first.close("interrupted")
    write(path, [], rewind=(3, 2)).close()
    with open_run(path) as run:
        assert run.epochs["epoch"].tolist() == [0, 1, 2]


def test_going_on_with_other_layers_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "run.h5"
    write(path, range(5)).close()
    before = path.read_bytes()
    writer = RunWriter(path, resume=True)
    writer.rewind(5, 0)
    other = Header(TASKS, ("a", "b"), np.array([1, 2]), np.ones((2, 3), bool))
    with pytest.raises(errors.RunFileError, match="Resume with the same model"):
        writer.start(other)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]


def test_going_on_with_what_is_not_there_or_from_nowhere_is_refused(tmp_path):
    with pytest.raises(errors.RunFileError, match="rows before step 20 are missing"):
        write(tmp_path / "none.h5", [], rewind=(20, 0))
    path = tmp_path / "run.h5"
    write(path, range(5)).close()
    with pytest.raises(errors.RunFileError, match=r"probe\.load_state_dict\(state\) before the first step"):
        write_without_telling(path)
    with pytest.raises(errors.RunFileError, match="contradict each other"):
        RunWriter(path, overwrite=True, resume=True)
    with open_run(path) as run:
        assert_rows(run, range(5))
    write(tmp_path / "new.h5", range(3), rewind=(0, -1)).close()  # killed before the file was begun
    with open_run(tmp_path / "new.h5") as run:
        assert_rows(run, range(3))


def write_without_telling(path):
    RunWriter(path, resume=True).start(header())


def test_the_provenance_lists_every_session(tmp_path):
    path = tmp_path / "run.h5"

    def session(steps, end, provenance, rewind=None):
        writer = RunWriter(path, resume=rewind is not None)
        if rewind is not None:
            writer.rewind(rewind, 0)
        writer.start(header(**provenance))
        for step in steps:
            writer.write(row(step))
        writer.close(end)

    session(range(5), "interrupted", {"argv": ["record"], "versions": {"torch": "2.3"}, "trainer": "joint"})
    session(
        range(4, 8), "failed: no", {"argv": ["record", "--resume"], "versions": {"torch": "2.4"}, "trainer": "joint"}, 4
    )
    session(
        range(8, 9), "finished", {"argv": ["record", "--resume"], "versions": {"torch": "2.4"}, "trainer": "joint"}, 8
    )
    with open_run(path) as run:
        assert run.provenance["versions.torch"] == "2.4"
        first, second, third = run.sessions
        assert [s["first_step"] for s in run.sessions] == [0, 4, 8]
        assert [s["end"] for s in run.sessions] == ["interrupted", "failed: no", "finished"]
        assert first["replaced"] == {"argv": ["record"], "versions.torch": "2.3"}
        assert second["replaced"] == third["replaced"] == {}
        assert first["started"] <= second["started"] <= third["started"]
        assert first["started"].endswith("+00:00")


def test_a_session_that_was_killed_has_no_end(tmp_path):
    path, tests = tmp_path / "run.h5", str(Path(__file__).parent)
    code = (
        f"import sys, os, signal; sys.path.insert(0, {tests!r}); from writing import write\n"
        f"write({str(path)!r}, range(5)).flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    write(path, range(5, 6), rewind=(5, 0)).close()
    with open_run(path) as run:
        assert [s["end"] for s in run.sessions] == ["", "finished"]


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_a_session_that_fails_to_begin_leaves_a_killed_run_as_it_was(tmp_path, options):
    path, tests = tmp_path / "run.h5", str(Path(__file__).parent)
    code = (
        f"import sys, os; sys.path.insert(0, {tests!r}); from writing import write\n"
        f"write({str(path)!r}, range(9)).flush(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    RunWriter(path, **options).close("failed: no data")
    with open_run(path) as run:
        assert_rows(run, range(9))
        assert not run.complete


def test_very_many_sessions_keep_the_first_and_the_newest():
    found = [content.new_session()]
    for step in range(1, 300):
        found = content.resumed_sessions(found, "", {}, {}, step)
    assert len(found) == content._MOST_SESSIONS
    assert [s["first_step"] for s in found[:2]] == [0, 201]
    assert found[-1]["first_step"] == 299


def test_a_session_that_measures_nothing_ends_the_run_and_loses_nothing(tmp_path):
    """Killed after the last checkpoint, before the file was closed: what is left are parts."""
    path, tests = tmp_path / "run.h5", str(Path(__file__).parent)
    code = (
        f"import sys, os; sys.path.insert(0, {tests!r}); from writing import write\n"
        f"write({str(path)!r}, range(9)).flush(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    writer = RunWriter(path, resume=True)
    writer.rewind(7, 0)
    writer.annotate({"test": {"mAP50": 0.5}})
    writer.close()
    with open_run(path) as run:
        assert_rows(run, range(7))
        assert run.end == "finished"
        assert run.provenance["test.mAP50"] == 0.5
        assert run.provenance["trainer"] == "joint"
        assert run.provenance["hyp.box"] == 0.05
        assert len(run.sessions) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]


def test_a_training_that_goes_back_records_anew_from_there(tmp_path):
    path = tmp_path / "run.h5"
    writer = write(path, range(12), flush_rows=5, flush_seconds=1e9)
    writer.write_epoch(0, {"mAP50": 0.1})
    writer.write_epoch(1, {"mAP50": 0.2})
    writer.rewind(6, 0)
    with open_run(path) as run:
        assert_rows(run, range(6))
    for step in range(6, 9):
        writer.write(row(step))
    writer.close()
    with open_run(path) as run:
        assert_rows(run, range(9))
        assert run.epochs["epoch"].tolist() == [0]


# ---- attach, in anyone's loop


def model_and_optimizer():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"trunk": torch.nn.Linear(4, 8), "a": torch.nn.Linear(8, 1), "b": torch.nn.Linear(8, 1)}
    )
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(path, steps, state_path, *, resume=False, save_at=(), stop_at=None, die_at=None):
    """A loop as users write it: a checkpoint now and then, and a probe."""
    model, optimizer = model_and_optimizer()
    probe = attach(model, ("a", "b"), path, every=2, optimizer=optimizer, resume=resume)
    if resume and state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        probe.load_state_dict(state["probe"])
    with probe:
        while probe.step < steps:
            if probe.step in save_at:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "probe": probe.state_dict()}
                torch.save(state, state_path)
            if probe.step == stop_at:
                raise KeyboardInterrupt
            if probe.step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            generator = torch.Generator().manual_seed(probe.step)
            hidden = torch.tanh(model["trunk"](torch.randn(16, 4, generator=generator)))
            probe.epoch = probe.step // 10
            probe.backward({"a": model["a"](hidden).square().mean(), "b": (model["b"](hidden) - 1).square().mean()})
            optimizer.step()
            optimizer.zero_grad()
            if probe.step % 10 == 0:
                probe.log_metrics(probe.step // 10 - 1, score=probe.step / 100)


def numbers(path):
    with open_run(path) as run:
        rows = {name: run[name] for name in ("step", "epoch", "loss", "weight", "grad_norm", "cosine", "lr", "status")}
        return rows | {f"epochs/{name}": values for name, values in run.epochs.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


@pytest.mark.parametrize(("saved", "stopped"), [((14,), 23), ((0,), 7), ((9, 20), 20), ((15,), 16)])
def test_attach_goes_on_in_anyones_loop_number_for_number(tmp_path, saved, stopped):
    whole, part, state = tmp_path / "whole.h5", tmp_path / "part.h5", tmp_path / "state.pt"
    train(whole, 40, state)
    with pytest.raises(KeyboardInterrupt):
        train(part, 40, state, save_at=saved, stop_at=stopped)
    train(part, 40, state, resume=True)
    assert_same(numbers(whole), numbers(part))
    with open_run(part) as run:
        assert [s["end"] for s in run.sessions] == ["interrupted", "finished"]
        assert run.sessions[1]["first_step"] == max(saved)


def test_attach_goes_on_after_a_kill_number_for_number(tmp_path):
    whole, part, state = tmp_path / "whole.h5", tmp_path / "part.h5", tmp_path / "state.pt"
    train(whole, 40, state)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path\n"
        "from test_runfile_resume import train\n"
        f"train({str(part)!r}, 40, Path({str(state)!r}), save_at=(13,), die_at=19)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    with open_run(part) as run:
        assert not run.complete
        assert run["step"][-1] >= 12  # the state waited for the rows
    train(part, 40, state, resume=True)
    assert_same(numbers(whole), numbers(part))


def test_a_script_may_always_say_resume(tmp_path):
    """The first start of a preemptible job has nothing to go on from."""
    train(tmp_path / "run.h5", 10, tmp_path / "none.pt", resume=True)
    with open_run(tmp_path / "run.h5") as run:
        assert run["step"].tolist() == [0, 2, 4, 6, 8]
    with pytest.raises(errors.RunFileError, match="before the first step"):
        train(tmp_path / "run.h5", 10, tmp_path / "none.pt", resume=True)


def test_a_state_waits_until_its_rows_are_on_the_disk(tmp_path):
    model, optimizer = model_and_optimizer()
    probe = attach(model, ("a", "b"), tmp_path / "run.h5", every=1, optimizer=optimizer)
    hidden = model["trunk"](torch.ones(2, 4))
    probe.backward({"a": model["a"](hidden).sum(), "b": model["b"](hidden).sum()})
    probe.state_dict()
    with open_run(tmp_path / "run.h5") as run:
        assert run["step"].tolist() == [0]
    probe.close()
