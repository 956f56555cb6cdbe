"""The end of a recording never hides that of the training, nor keeps a script from saving what it trained."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import multiprocessing
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import forked
from test_lightning import lightning, train  # noqa: F401 - fixtures
from test_lightning import pytestmark as of_lightning
from trainings import WEIGHTS
from writing import FailingDisk, assert_rows, row, write
from zoo import Collector, mlp

import gradprobe
from gradprobe import errors, open_run
from gradprobe.cli import record as command
from gradprobe.cli.request import Plan
from gradprobe.integrations.trainer_recording import Recording
from gradprobe.probes import GradientProbe
from gradprobe.runfile import RunWriter
from gradprobe.runfile.files import Disk

TASKS = ("t0", "t1")
LOST = r"could not be completed \(\[Errno 28\] no room\); 3 rows are lost.*gradprobe summary"


@pytest.fixture
def disk(monkeypatch):
    """Every disk, full when told so."""
    state, real = SimpleNamespace(full=False), Disk.create

    def create(self, path):
        if state.full:
            raise OSError(errno.ENOSPC, "no room")
        return real(self, path)

    monkeypatch.setattr(Disk, "create", create)
    return state


def train_on(case, probe, disk, steps=5):
    """Two steps that are safe, and three for which there is no room in the end."""
    for step in range(steps):
        probe.backward(case.losses(step))
        if step == 1:
            assert probe.flush()
            disk.full = True


def two_rows(path):
    with open_run(path) as run:
        return run["step"].tolist() == [0, 1]


# ---- leaving a block


@pytest.mark.parametrize(
    "own",
    [ValueError("own"), KeyboardInterrupt(), SystemExit(3), StopIteration(), asyncio.CancelledError(), MemoryError()],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("how", ["with", "finally", "except"])
def test_the_trainings_own_exception_is_the_one_that_is_raised(tmp_path, disk, own, how):
    case, path = mlp(torch.float32), tmp_path / "run.h5"
    probe = gradprobe.attach(case.model, TASKS, path, every=1)

    def by_with():
        with probe:
            train_on(case, probe, disk)
            raise own

    def by_finally():
        try:
            train_on(case, probe, disk)
            raise own
        finally:
            probe.close()

    def by_except():
        try:
            train_on(case, probe, disk)
            raise own
        except BaseException:
            probe.close("failed")
            raise

    with pytest.warns(RuntimeWarning, match=LOST) as told, pytest.raises(type(own)) as raised:
        {"with": by_with, "finally": by_finally, "except": by_except}[how]()
    assert raised.value is own
    assert own.__context__ is None
    assert own.__cause__ is None
    assert len(told) == 1
    assert str(path) in probe.trouble
    assert two_rows(path)


def test_after_a_good_training_the_model_can_be_saved(tmp_path, disk):
    case, path = mlp(torch.float32), tmp_path / "run.h5"

    def script():
        with gradprobe.attach(case.model, TASKS, path, every=1) as probe:
            train_on(case, probe, disk)
        torch.save(case.model.state_dict(), tmp_path / "model.pt")
        return probe

    with pytest.warns(RuntimeWarning, match=LOST):
        probe = script()
    assert (tmp_path / "model.pt").exists()
    assert probe.trouble.startswith(f"{path}: could not be completed")


def test_closing_by_hand_raises_and_a_second_time_does_nothing(tmp_path, disk):
    case, path = mlp(torch.float32), tmp_path / "run.h5"
    probe = gradprobe.attach(case.model, TASKS, path, every=1)
    assert probe.trouble == ""
    train_on(case, probe, disk)
    with pytest.raises(errors.RunFileError, match=LOST) as raised:
        probe.close()
    assert probe.trouble == str(raised.value)
    probe.close()
    with probe:
        pass
    disk.full = False
    gradprobe.attach(case.model, TASKS, path, overwrite=True).close()


def test_a_run_that_is_whole_has_no_trouble(tmp_path):
    case = mlp(torch.float32)
    with gradprobe.attach(case.model, TASKS, tmp_path / "run.h5", every=1) as probe:
        probe.backward(case.losses(0))
    assert probe.trouble == ""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("own", [None, ValueError("own")], ids=str)
def test_where_warnings_are_errors_the_log_gets_it(tmp_path, disk, caplog, own):
    case, path = mlp(torch.float32), tmp_path / "run.h5"

    def script():
        with gradprobe.attach(case.model, TASKS, path, every=1) as probe:
            train_on(case, probe, disk)
            if own is not None:
                raise own
        return probe

    if own is None:
        assert "3 rows are lost" in script().trouble
    else:
        with pytest.raises(ValueError, match="own"):
            script()
        assert own.__context__ is None
    assert "3 rows are lost" in caplog.records[-1].message


def test_of_several_probes_each_tells_of_its_file(tmp_path, disk):
    first, second = mlp(torch.float32), mlp(torch.float32)
    own = ValueError("own")

    def script():
        with (
            gradprobe.attach(first.model, TASKS, tmp_path / "first.h5", every=1) as outer,
            gradprobe.attach(second.model, TASKS, tmp_path / "second.h5", every=1) as inner,
        ):
            outer.backward(first.losses(0))
            train_on(second, inner, disk)
            raise own

    with pytest.warns(RuntimeWarning) as told, pytest.raises(ValueError, match="own") as raised:
        script()
    assert raised.value is own
    assert own.__context__ is None
    said = [str(each.message) for each in told]
    assert len(said) == 2
    assert "second.h5" in said[0]
    assert "first.h5" in said[1]


def test_an_exception_that_was_handled_before_counts_for_nothing(tmp_path, disk):
    case = mlp(torch.float32)
    probe = gradprobe.attach(case.model, TASKS, tmp_path / "run.h5", every=1)
    try:
        raise KeyError("handled")
    except KeyError:
        pass
    train_on(case, probe, disk)
    with pytest.raises(errors.RunFileError, match="3 rows are lost"):
        probe.close()


# ---- all is closed, whatever one of it says


class Breaks(Collector):
    """A sink that cannot be closed."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def close(self, end):
        super().close(end)
        raise self.error


@pytest.mark.parametrize("error", [errors.RunFileError("another file"), OSError("gone"), RuntimeError()], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_one_sink_that_fails_leaves_no_other_open(tmp_path, error, first):
    case, good, bad = mlp(torch.float32), Collector(), Breaks(error)
    writer = RunWriter(tmp_path / "run.h5")
    probe = GradientProbe(case.model, TASKS, [bad, writer, good] if first else [writer, good, bad], every=1)
    probe.backward(case.losses(0))
    with pytest.warns(RuntimeWarning, match="another file|Breaks failed"), probe:
        pass
    assert good.end == bad.end == "finished"
    with open_run(tmp_path / "run.h5") as run:
        assert run.end == "finished"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_one_sink_leaves_no_other_open(tmp_path, error):
    case, good, bad = mlp(torch.float32), Collector(), Breaks(error())
    probe = GradientProbe(case.model, TASKS, [bad, good, RunWriter(tmp_path / "run.h5")], every=1)
    probe.backward(case.losses(0))
    with pytest.raises(error):
        probe.close()
    assert good.end == "finished"
    assert probe.trouble == ""
    with open_run(tmp_path / "run.h5") as run:
        assert run.end == "finished"


def test_a_failure_of_the_probes_own_leaves_a_whole_file_and_no_hook(tmp_path, monkeypatch):
    case, path = mlp(torch.float32), tmp_path / "run.h5"
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    probe = gradprobe.attach(case.model, TASKS, path, every=1, optimizer=optimizer)
    for step in range(3):
        probe.backward(case.losses(step))
        optimizer.step()
        optimizer.zero_grad()

    def fails(*_, **__):
        raise RuntimeError("of the probe's own")

    monkeypatch.setattr(probe._recorder.accumulation, "settle", fails)
    monkeypatch.setattr(probe._recorder.report, "ask_after", fails)
    with pytest.raises(RuntimeError, match="of the probe's own"):
        probe.close()
    with open_run(path) as run:
        assert len(run) == 3
        assert run.end == "finished"
    assert not optimizer._optimizer_step_post_hooks
    gradprobe.attach(case.model, TASKS, None).close()


def test_where_even_the_header_finds_no_room_all_is_closed(tmp_path, disk):
    case, good = mlp(torch.float32), Collector()
    path = tmp_path / "run.h5"
    probe = gradprobe.attach(case.model, TASKS, path, sinks=[good])
    disk.full = True
    with pytest.warns(RuntimeWarning, match="cannot be written here"), probe:
        pass
    assert good.end == "finished"
    assert "cannot be written here" in probe.trouble
    disk.full = False
    assert list(tmp_path.iterdir()) == []
    write(path, range(2)).close()


# ---- the writer by itself


def test_a_writer_hides_nothing_either(tmp_path):
    disk, own = FailingDisk(), ValueError("own")

    def script():
        writer = write(tmp_path / "run.h5", range(3), disk=disk, flush_rows=10**9, flush_seconds=1e9)
        try:
            disk.full = True
            raise own
        finally:
            writer.close("failed")
            assert "3 rows are lost" in writer.trouble

    with pytest.warns(RuntimeWarning, match="3 rows are lost"), pytest.raises(ValueError, match="own") as raised:
        script()
    assert raised.value is own
    assert own.__context__ is None


class Interrupted(Disk):
    """Ctrl-C comes while something is brought to the disk."""

    left = -1

    def sync(self, descriptor):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        super().sync(descriptor)


@pytest.mark.parametrize("at", [1, 2])
def test_an_impatient_interrupt_tears_nothing_and_the_end_of_the_program_completes_the_file(tmp_path, at):
    from gradprobe.runfile import writer as module

    path, disk = tmp_path / "run.h5", Interrupted()
    writer = write(path, range(6), disk=disk, flush_rows=10**9, flush_seconds=1e9)
    assert writer.flush()
    for step in range(6, 9):
        writer.write(row(step))
    disk.left = at
    with pytest.raises(KeyboardInterrupt):
        writer.close("interrupted")
    module._close_what_is_open()
    with open_run(path) as run:
        assert_rows(run, range(9))
        assert run.end != ""
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]


# ---- the end of a program, and of a probe that nobody has any more

SCRIPT = """
import errno, sys, torch
sys.path.insert(0, {tests!r})
import gradprobe
from gradprobe.runfile.files import Disk
from zoo import mlp
case = mlp(torch.float32)
probe = gradprobe.attach(case.model, ("t0", "t1"), {path!r}, every=1)
for step in range(3):
    probe.backward(case.losses(step))
def full(self, path): raise OSError(errno.ENOSPC, "no room")
Disk.create = full
"""
ENDS = {
    "print('saved')": 0,
    "raise ValueError('own')": 1,
    "sys.exit(7)": 7,
    "del probe; import gc; gc.collect(); print('saved')": 0,
    "import gradprobe.runfile.writer as w; w._close_what_is_open()": 0,
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Each end -> the code that its program ended with, and what it said."""
    folder = tmp_path_factory.mktemp("ended")
    programs = [
        SCRIPT.format(tests=str(Path(__file__).parent), path=str(folder / f"{number}.h5")) + end
        for number, end in enumerate(ENDS)
    ]
    first = f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import gradprobe, torch._dynamo, zoo"
    return dict(zip(ENDS, forked(programs, folder, first), strict=True))


@pytest.mark.parametrize(("end", "code"), ENDS.items())
def test_a_program_ends_as_it_would_and_one_line_says_what_is_lost(ended, end, code):
    returned, said = ended[end]
    assert returned == code, said
    assert "3 rows are lost" in said
    assert said.count("Traceback") == ("own" in end), said
    assert "Exception ignored" not in said
    if "own" in end:
        assert "ValueError: own" in said


def test_a_probe_that_is_lost_tells(tmp_path, disk):
    case = mlp(torch.float32)

    def script():
        train_on(case, gradprobe.attach(case.model, TASKS, tmp_path / "run.h5", every=1), disk)
        gc.collect()

    with pytest.warns(RuntimeWarning, match="3 rows are lost"):
        script()


@pytest.mark.parametrize("how", ["close", "with", "exit"])
def test_a_forked_child_closes_nothing(tmp_path, how):
    case, path, sink = mlp(torch.float32), tmp_path / "run.h5", Collector()
    probe = gradprobe.attach(case.model, TASKS, path, every=1, sinks=[sink])
    probe.backward(case.losses(0))

    def child(queue):
        if how == "close":
            probe.close()
        elif how == "with":
            with probe:
                pass
        else:
            probe._lost()
        queue.put((sink.end, probe.trouble))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get() == (None, "")
    process.join()
    probe.backward(case.losses(1))
    probe.close()
    assert sink.end == "finished"
    with open_run(path) as run:
        assert run["step"].tolist() == [0, 1]
        assert run.end == "finished"


# ---- other people's trainers


def test_a_callback_never_raises_at_the_end(tmp_path, disk):
    case, recording = mlp(torch.float32), Recording("test", tmp_path / "run.h5", every=1)
    recording.open(case.model, TASKS, None)
    train_on(case, recording.probe, disk)
    assert recording.trouble == ""
    with pytest.warns(RuntimeWarning, match=LOST):
        recording.close()
    assert "3 rows are lost" in recording.trouble
    recording.close()
    disk.full = False
    recording = Recording("test", tmp_path / "next.h5")
    recording.open(case.model, TASKS, None)
    recording.close()
    assert recording.trouble == ""


class FillsDisk:
    """Fills the disk after so many steps, and may end the training after some more."""

    def __init__(self, disk, own=None):
        self.disk, self.own = disk, own

    def __call__(self, step):
        self.disk.full = step >= 2
        if step == 4 and self.own is not None:
            raise self.own


@pytest.mark.parametrize("own", [None, ValueError("own")], ids=str)
def test_lightning_ends_as_it_would(train, tmp_path, disk, own):  # noqa: F811 - a fixture
    from gradprobe.integrations.lightning import GradprobeCallback

    callback = GradprobeCallback(("a", "b"), tmp_path / "run.h5", weights=WEIGHTS, every=1)
    ends = contextlib.nullcontext() if own is None else pytest.raises(ValueError, match="own")
    with pytest.warns(RuntimeWarning, match="rows are lost"), ends as raised:
        train(callback, fails=FillsDisk(disk, own))
    assert own is None or raised.value is own
    assert "rows are lost" in callback.recording.trouble


for mark in reversed(of_lightning):
    test_lightning_ends_as_it_would = mark(test_lightning_ends_as_it_would)


@pytest.mark.parametrize("own", [None, ValueError("own")], ids=str)
def test_transformers_ends_as_it_would(tmp_path, disk, own):
    pytest.importorskip("transformers")
    from gradprobe.integrations.huggingface import GradprobeCallback

    case = mlp(torch.float32)
    arguments = SimpleNamespace(n_gpu=1)
    state = SimpleNamespace(global_step=0, epoch=0)

    class Trainer:
        """Calls the events in the order in which that of transformers does, which takes too long to import here."""

        def add_callback(self, callback):
            self.callback = callback

        def train(self):
            optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
            self.callback.on_train_begin(arguments, state, None, model=case.model, optimizer=optimizer)
            for step in range(5):
                disk.full = step > 1
                losses = case.losses(step)
                self.callback.record(losses)
                sum(losses.values()).backward()
                optimizer.step()
                assert disk.full or self.callback.recording.probe.flush()
            if own is not None:
                raise own
            self.callback.on_train_end(arguments, state, None)

    trainer = Trainer()
    callback = GradprobeCallback(TASKS, tmp_path / "run.h5", losses=None, every=1).add_to(trainer)
    ends = contextlib.nullcontext() if own is None else pytest.raises(ValueError, match="own")
    with pytest.warns(RuntimeWarning, match=LOST), ends as raised:
        trainer.train()
    assert own is None or (raised.value is own and own.__context__ is None)
    assert "3 rows are lost" in callback.recording.trouble


def test_ultralytics_tears_down_without_a_word_too_many(tmp_path, disk):
    from gradprobe.integrations.ultralytics import GradprobeCallback

    case, callback = mlp(torch.float32), GradprobeCallback(tmp_path / "run.h5", every=1)
    callback.recording.open(case.model, TASKS, None)
    trainer, own = SimpleNamespace(model=case.model), ValueError("own")

    def script():
        try:
            train_on(case, callback.recording.probe, disk)
            raise own
        finally:
            callback.teardown(trainer)

    with pytest.warns(RuntimeWarning, match=LOST), pytest.raises(ValueError, match="own") as raised:
        script()
    assert raised.value is own
    assert own.__context__ is None


# ---- gradprobe record


def test_gradprobe_record_says_why_the_training_ended(tmp_path, disk, monkeypatch):
    from gradprobe.cli.progress import NoDisplay
    from gradprobe.trainers.hyp import DetectionHyp
    from gradprobe.trainers.settings import Settings

    own = errors.TrainingError("own")

    def fails(plan, writer, display):
        from writing import header

        writer.start(header())
        for step in range(3):
            writer.write(row(step))
        disk.full = True
        raise own

    monkeypatch.setattr(command, "train", fails)
    plan = Plan(Settings(), DetectionHyp(), (), tmp_path / "run.h5", overwrite=False, state=None)
    with (
        pytest.warns(RuntimeWarning, match="3 rows are lost"),
        pytest.raises(errors.TrainingError, match="own") as raised,
    ):
        command._record(plan, NoDisplay(Settings()))
    assert raised.value is own
    assert own.__context__ is None


def test_nothing_is_said_twice(tmp_path, disk, caplog):
    case = mlp(torch.float32)
    with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with gradprobe.attach(case.model, TASKS, tmp_path / "run.h5", every=1) as probe:
            train_on(case, probe, disk)
    assert len(told) == 1
    assert not caplog.records
