"""``gradprobe record`` as a user runs it, on small data."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from warm import Process
from zoo import naive_gramian

from gradprobe import measures, open_run
from gradprobe.cli.app import run as command
from gradprobe.runfile.integrity import check_run

COCO = Path(__file__).parents[1].parent / "shared/data/coco128/data.yaml"
SMALL = ["--imgsz", "64", "--batch-size", "8", "--bn-batches", "2", "--every", "1"]
DIALLED = ["--data", "dial:size=512", "--trainer", "gradnorm", "--batch-size", "8", "--every", "1", "--epochs", "2"]
TIMES = {"time", "overhead"}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    assert command(["data", "make", str(folder), "--n", "40", "--seed", "3"]) == 0
    return str(folder / "data.yaml")


def record(*arguments, data=None):
    return command(["record", *(["--data", data] if data else []), *SMALL, *map(str, arguments)])


@pytest.fixture(scope="session")
def recorded(data, tmp_path_factory):
    """One GradNorm run of two epochs, for the tests that only look."""
    out = tmp_path_factory.mktemp("run") / "conflict.h5"
    assert record("--trainer", "gradnorm", "--epochs", 2, "--out", out, data=data) == 0
    return out


def test_the_whole_trunk_is_recorded_with_finite_numbers(recorded):
    with open_run(recorded) as run:
        assert run.complete
        assert run.tasks == ("det", "cls")
        assert {name.split(".")[1] for name in run.layers} == {str(i) for i in range(10)}
        assert run.layers[0] == "model.0.conv"
        assert run.layers[-1] == "model.9.cv2.bn"
        assert run["layer_size"].sum() == 1_046_368
        assert run["step"].tolist() == list(range(len(run)))
        for name in ("loss", "weight", "grad_norm", "cosine", "shared_grad_norm", "shared_cosine", "lr"):
            assert np.isfinite(run[name]).all(), name
        np.testing.assert_allclose(run["weight"].sum(1), 2, rtol=1e-6)
        assert len(set(run["weight"][:, 0])) > 2
        assert run["epoch"].tolist() == sorted(run["epoch"])
        assert (run["overhead"] > 0).all()
        assert set(run.epochs) >= {"mAP50", "mAP50-95", "precision", "recall", "f1", "accuracy", "macro_f1", "auroc"}
        assert len(run.epochs["mAP50"]) == 2


def test_where_it_came_from_is_recorded_without_folders(recorded, data):
    with open_run(recorded) as run:
        stored = run.provenance
    assert stored["trainer"] == "gradnorm"
    assert stored["settings.seed"] == 0
    assert stored["data.name"] == "data.yaml"
    assert len(stored["data.fingerprint"]) == 64
    assert stored["hyp.obj"] == pytest.approx((64 / 640) ** 2)
    assert stored["versions.torch"] == torch.__version__.split("+")[0] or stored["versions.torch"] == torch.__version__
    assert not any(str(Path(data).parent) in str(value) for value in stored.values())


def test_the_test_split_is_evaluated_once_and_stored_apart(recorded, data):
    with open_run(recorded) as run:
        assert run.provenance["data.test_images"] > 0
        assert 0 <= run.provenance["test.mAP50"] <= 1
        assert 0 <= run.provenance["test.accuracy"] <= 1


def test_the_weights_are_saved_and_load(recorded):
    from gradprobe.trainers.hyp import DetectionHyp
    from gradprobe.trainers.models.yolov5 import build_model

    for kind in ("best", "last"):
        state = torch.load(recorded.with_name(f"conflict.{kind}.pt"), weights_only=True)
        model = build_model(box_classes=4, image_classes=3, imgsz=64, hyp=DetectionHyp())
        model.load_state_dict(state)
    assert not recorded.with_name("conflict.checkpoint.pt").exists()


def test_recorded_numbers_are_those_of_an_independent_float64_computation(recorded, data):
    """The first row, from the same batch and the same initial parameters, with a naive twin in float64."""
    from gradprobe.probes.shared_layers import by_module, find_shared
    from gradprobe.trainers.data.dataset import Loader
    from gradprobe.trainers.data.loading import load_data
    from gradprobe.trainers.hyp import DetectionHyp
    from gradprobe.trainers.models.yolov5 import build_model

    loaded = load_data(data, imgsz=64, seed=0)
    loader = Loader(loaded.train, 8, seed=0, shuffle=True)
    loader.set_epoch(0)
    batch = next(iter(loader))
    model = build_model(box_classes=4, image_classes=3, imgsz=64, hyp=DetectionHyp(), seed=0).double().train()
    losses = model.losses(model(batch.images.double()), batch)
    shared = find_shared(by_module(model), losses)
    gram = naive_gramian(shared.layers, losses)
    with open_run(recorded) as run:
        assert run.layers == tuple(layer.name for layer in shared.layers)
        assert sum(len(layer.parameters) for layer in shared.layers) == 99
        np.testing.assert_allclose(run["loss"][0], [float(v.detach()) for v in losses.values()], rtol=1e-4)
        np.testing.assert_allclose(run["grad_norm"][0], measures.norm(gram), rtol=1e-3)
        np.testing.assert_allclose(run["cosine"][0], measures.pair_cosine(gram), atol=1e-3)
        np.testing.assert_allclose(run.norm()[0], np.sqrt(np.einsum("lii->i", gram)), rtol=1e-3)


def numbers(path):
    with open_run(path) as run:
        rows = {name: run[name] for name in ("step", "epoch", "loss", "weight", "grad_norm", "cosine", "lr", "status")}
        return rows | {f"epochs/{name}": values for name, values in run.epochs.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_the_same_seed_gives_the_same_file_number_for_number(recorded, data, tmp_path):
    assert record("--trainer", "gradnorm", "--epochs", 2, "--out", tmp_path / "again.h5", data=data) == 0
    assert_same(numbers(recorded), numbers(tmp_path / "again.h5"))


def test_another_seed_gives_another_run(recorded, data, tmp_path):
    out = tmp_path / "other.h5"
    assert record("--trainer", "gradnorm", "--epochs", 1, "--seed", 1, "--out", out, data=data) == 0
    assert not np.array_equal(numbers(recorded)["loss"][0], numbers(out)["loss"][0])


def test_measuring_changes_nothing_in_the_training(recorded, data, tmp_path):
    """Measured at every step or hardly ever: the last weights are the same bit for bit."""
    out = tmp_path / "rarely.h5"
    assert record("--trainer", "gradnorm", "--epochs", 2, "--every", 1000, "--out", out, data=data) == 0
    often = torch.load(recorded.with_name("conflict.last.pt"), weights_only=True)
    rarely = torch.load(tmp_path / "rarely.last.pt", weights_only=True)
    assert all(torch.equal(often[name], rarely[name]) for name in often)


def test_a_resumed_run_equals_an_uninterrupted_one(recorded, data, tmp_path, monkeypatch):
    from gradprobe.trainers import loop

    out, real, steps = tmp_path / "part.h5", loop.train_step, []

    def stop_in_the_second_epoch(training, batch):
        steps.append(1)
        if len(steps) == len(training.train_loader) + 2:
            raise KeyboardInterrupt
        real(training, batch)

    monkeypatch.setattr(loop, "train_step", stop_in_the_second_epoch)
    assert record("--trainer", "gradnorm", "--epochs", 2, "--out", out, data=data) == 130
    monkeypatch.setattr(loop, "train_step", real)
    with open_run(out) as run:
        assert run.end == "interrupted"
    assert command(["record", "--resume", str(out)]) == 0
    assert_same(numbers(recorded), numbers(out))


@pytest.fixture(scope="module")
def dialled(tmp_path_factory):
    """A whole run on the problem that needs no detector."""
    out = tmp_path_factory.mktemp("dialled") / "whole.h5"
    assert command(["record", *DIALLED, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("sign_of_life", ["run.h5", "run.last.pt"], ids=["in the first epoch", "in the second"])
def test_a_killed_run_is_resumed_without_a_gap(dialled, tmp_path, sign_of_life):
    """kill -9 right after the file began, or a checkpoint: no row before it may still have been in memory alone."""
    process = warm(*DIALLED, "--out", "run.h5", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / sign_of_life).exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    with open_run(tmp_path / "run.h5") as run:
        assert not run.complete
    assert command(["record", "--resume", str(tmp_path / "run.h5")]) == 0
    assert_same(numbers(dialled), numbers(tmp_path / "run.h5"))
    with open_run(tmp_path / "run.h5") as run:
        assert [s["end"] for s in run.sessions] == ["", "finished"]
        assert "--epochs" in run.sessions[0]["replaced"]["argv"]


@pytest.mark.slow
def test_record_killed_at_random_and_resumed_until_it_is_done(recorded, data, tmp_path):
    """GRADPROBE_KILLS (300) kills, at any moment of any session, from the first import to the last merge."""
    from gradprobe.trainers import checkpoint
    from gradprobe.trainers.paths import Paths

    rng, kills, run_number = random.Random(0), int(os.environ.get("GRADPROBE_KILLS", "300")), 0
    arguments = ["--data", data, *SMALL, "--trainer", "gradnorm", "--epochs", 2]
    while kills > 0:
        run_number += 1
        path = tmp_path / f"run{run_number}.h5"
        saved = Paths(path).checkpoint
        left_over: set[str] = set()
        while True:
            words = ["--resume", path.name] if path.exists() else [*arguments, "--out", path.name]
            process = start(*words, cwd=tmp_path)
            try:
                _, err = process.communicate(timeout=rng.uniform(0.5, 11))
                assert process.returncode == 0, err
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills -= 1
            if path.exists() and not saved.exists():  # killed within a millisecond of the first row, or of the end
                with open_run(path) as run:
                    if run.end == "finished":
                        left_over = {f"{path.name}.parts"}
                        break
                    assert not len(run)
                path.unlink()
            elif path.exists():
                with open_run(path) as run:
                    assert run["step"].tolist() == list(range(len(run)))
                    assert len(run) >= checkpoint.load(saved)["probe"]["clock"]["step"]
                    if run.end == "finished":
                        saved.unlink()
                        left_over = {f"{path.name}.parts"}
                        break
        assert check_run(
            path
        ).whole  # what a kill between the last merge and the removal of its parts leaves is no harm
        assert_same(numbers(recorded), numbers(path))
        assert {p.name for p in tmp_path.glob(f"*run{run_number}*")} - left_over == {
            path.name,
            f"run{run_number}.best.pt",
            f"run{run_number}.last.pt",
        }
    assert run_number > 0


def test_joint_keeps_its_weights(data, tmp_path):
    out = tmp_path / "joint.h5"
    assert record("--trainer", "joint", "--task-weights", "det=1,cls=0.01", "--epochs", 1, "--out", out, data=data) == 0
    with open_run(out) as run:
        np.testing.assert_allclose(run["weight"], [[1, 0.01]] * len(run), rtol=1e-6)


def test_clipping_is_said_in_the_file(data, tmp_path, capsys):
    out = tmp_path / "clip.h5"
    assert record("--trainer", "joint", "--clip-norm", 0.1, "--epochs", 1, "--out", out, data=data) == 0
    assert "couples the tasks" in capsys.readouterr().err
    with open_run(out) as run:
        assert run.provenance["settings.clip_norm"] == 0.1


def test_hyp_is_applied_and_what_is_ignored_is_said(data, tmp_path, capsys):
    hyp, out = tmp_path / "hyp.yaml", tmp_path / "hyp.h5"
    hyp.write_text("lr0: 0.0007\nbox: 0.1\nmosaic: 1.0\n")
    assert record("--trainer", "joint", "--hyp", hyp, "--epochs", 1, "--out", out, data=data) == 0
    assert "ignored in --hyp: mosaic" in capsys.readouterr().err
    with open_run(out) as run:
        assert run["lr"][0] == 0.0007
        assert run.provenance["hyp.box"] == 0.1
        assert run.provenance["ignored_hyp"] == ["mosaic"]


def test_a_loss_that_is_not_finite_stops_with_a_closed_file(data, tmp_path, capsys):
    out = tmp_path / "nan.h5"
    wild = ["--trainer", "joint", "--optimizer", "SGD", "--lr", "1e18", "--epochs", 2]
    assert record(*wild, "--out", out, data=data) == 1
    message = capsys.readouterr().err
    assert "the loss of task" in message
    assert "--keep-going" in message
    with open_run(out) as run:
        assert run.end.startswith("failed: NonFiniteLossError")
        assert not np.isfinite(run["loss"][-1]).all()
        assert run.status_names[run["status"][-1]] == "a task's loss is not finite"
        assert f"at step {run['step'][-1]}" in message


def test_weights_that_cannot_be_saved_end_no_training(data, tmp_path, capsys, monkeypatch):
    from gradprobe.trainers import checkpoint

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    assert record("--trainer", "joint", "--epochs", 2, "--out", tmp_path / "run.h5", data=data) == 0
    error = capsys.readouterr().err
    for name in ("run.last.pt", "run.best.pt", "run.checkpoint.pt"):
        assert f"{name} of epoch 2 not saved, is the disk full? ([Errno 28] No space left on device)" in error
    with open_run(tmp_path / "run.h5") as run:
        assert run.end == "finished"
    assert {path.name for path in tmp_path.iterdir()} == {"run.h5"}


def test_keep_going_goes_on_and_keeps_the_rows(data, tmp_path):
    out = tmp_path / "nan.h5"
    wild = ["--trainer", "joint", "--optimizer", "SGD", "--lr", "1e18", "--epochs", 1]
    assert record(*wild, "--keep-going", "--out", out, data=data) == 0
    with open_run(out) as run:
        assert run.end == "finished"
        assert run["step"].tolist() == list(range(len(run)))
        assert not np.isfinite(run["loss"][-1]).all()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--trainer", "gradnrom"], 2, "Did you mean 'gradnorm'"),
        (["--cfg", "yolov5nn.yaml"], 2, "yolov5n"),
        (["--preset", "reprot"], 2, "unknown preset"),
        (["--imgsz", "100"], 2, "the next one is 128"),
        (["--hyp", "none.yaml"], 2, "none.yaml"),
        (["--gradnorm-layer", "model.9.cv9"], 2, r"model.9.cv"),
        (["--device", "7"], 2, "--device cpu"),
        (["--weights", "none.pt"], 2, "no such file"),
        (["--task-weights", "det=1"], 2, "no weight for ['cls']"),
        (["--min-weight", "3"], 2, "--weight-sum"),
        (["--data", "nowhere/data.yaml"], 1, "nowhere"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_what_is_wrong_is_said_and_no_file_is_left(arguments, code, message, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = arguments if "--data" in arguments else ["--data", data, *arguments]
    small = [] if "--imgsz" in arguments else SMALL
    assert command(["record", *small, *arguments]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_refused(recorded, data, capsys):
    before = recorded.read_bytes()
    assert record("--out", recorded, data=data) == 3
    error = capsys.readouterr().err
    assert "--overwrite" in error
    assert "--resume" in error
    assert recorded.read_bytes() == before


def test_resuming_takes_no_other_settings_and_only_what_can_be_resumed(recorded, tmp_path, capsys):
    for others in (["--epochs", "3"], ["--project", "foo"]):
        assert command(["record", "--resume", str(recorded), *others]) == 2
        assert "give no other flags" in capsys.readouterr().err
    assert command(["record", "--resume", str(recorded)]) == 2
    assert "this run is finished" in capsys.readouterr().err
    assert command(["record", "--resume", str(tmp_path / "none.h5")]) == 3
    assert "no such file" in capsys.readouterr().err


@pytest.fixture
def stopped(data, tmp_path, monkeypatch):
    """A run stopped in its third epoch, measured at its first step only, on data of its own."""
    import shutil

    from gradprobe.trainers import loop

    shutil.copytree(Path(data).parent, tmp_path / "own")
    out, real, steps = tmp_path / "run.h5", loop.train_step, []

    def stop(training, batch):
        steps.append(1)
        if len(steps) == 2 * len(training.train_loader) + 1:
            raise KeyboardInterrupt
        real(training, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stop)
        arguments = ["--trainer", "joint", "--epochs", 3, "--every", 1000, "--out", out]
        assert record(*arguments, data=tmp_path / "own/data.yaml") == 130
    return out


def test_a_resumed_run_that_measures_nothing_more_is_finished_all_the_same(stopped):
    assert command(["record", "--resume", str(stopped)]) == 0
    with open_run(stopped) as run:
        assert run.end == "finished"
        assert run.epochs["epoch"].tolist() == [0, 1, 2]
        assert "test.mAP50" in run.provenance
        assert run.sessions[1]["first_step"] > 0


def test_resuming_with_other_data_is_refused_and_touches_nothing(stopped, capsys):
    before = stopped.read_bytes()
    next((stopped.parent / "own/images/train").iterdir()).unlink()
    assert command(["record", "--resume", str(stopped)]) == 1
    captured = capsys.readouterr()
    assert "the data changed" in captured.err
    assert captured.out == ""  # no word of a run that was not begun
    assert stopped.read_bytes() == before
    assert stopped.with_name("run.checkpoint.pt").exists()


def test_a_failed_overwrite_leaves_the_old_run_and_its_weights(stopped, capsys):
    kept = {path: path.read_bytes() for path in stopped.parent.glob("run.*") if path.is_file()}
    assert len(kept) == 4
    for arguments, code in ((["--data", "nowhere.yaml"], 1), (["--seed", "-1"], 2), (["--gradnorm-layer", "x"], 2)):
        assert command(["record", "--out", str(stopped), "--overwrite", *arguments]) == code
        assert capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_missing_package_names_the_pip_line(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; sys.modules['yolov5'] = None\n"
        "from gradprobe.cli.app import run; sys.exit(run(['record', '--out', 'x.h5']))"
    )
    process = Process([], program=program, cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "pip install 'gradprobe[yolov5]'" in err
    assert "Traceback" not in err


def start(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "gradprobe", "record", *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def warm(*arguments, cwd):
    """The same, but for its imports."""
    return Process(["record", *arguments], cwd=cwd)


@pytest.mark.parametrize(("signal_", "begin"), [(signal.SIGINT, start), (signal.SIGTERM, warm)])
def test_ctrl_c_closes_the_file(tmp_path, signal_, begin):
    process = begin("--data", "dial", "--every", 1, "--epochs", 5000, "--out", "run.h5", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run.last.pt").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal_)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "gradprobe plot run.h5" in out
    with open_run(tmp_path / "run.h5") as run:
        assert run.end == "interrupted"
        assert len(run) > 3
    assert not (tmp_path / "run.h5.parts").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_tear_the_closing_of_the_file(number):
    from gradprobe.cli.record import interruptible, uninterrupted

    with interruptible():
        with uninterrupted():
            signal.raise_signal(number)
            closed = True
        with pytest.raises(KeyboardInterrupt):  # and outside of it a signal still ends the recording
            signal.raise_signal(number)
    assert closed


def test_without_a_terminal_there_are_plain_lines(data, tmp_path):
    process = warm("--data", data, *SMALL, "--epochs", 1, "--out", "run.h5", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "\x1b" not in err + out
    assert "epoch 1/1 on val: mAP50" in err
    assert out.splitlines() == ["recorded: run.h5", "next:     gradprobe plot run.h5"]


def test_summary_and_plot_take_what_record_made(recorded, capsys):
    assert command(["summary", str(recorded), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] > 5
    assert command(["plot", str(recorded)]) == 0
    assert recorded.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_without_flags_a_detector_and_a_classifier_have_learned(tmp_path, monkeypatch):
    """The default recording, as `make demo` makes it: two minutes on two cores that have nothing else to do."""
    monkeypatch.chdir(tmp_path)
    assert command(["record"]) == 0
    with open_run("conflict.h5") as run:
        assert run.provenance["trainer"] == "gradnorm"
        first, last = ({name: float(values[i]) for name, values in run.epochs.items()} for i in (0, -1))
    assert first["mAP50"] < 0.5  # neither is solved in the first epoch
    assert first["accuracy"] < 0.9
    assert last["mAP50"] >= 0.5
    assert last["accuracy"] >= 0.8


@pytest.mark.skipif(not COCO.exists(), reason="the real data set ../shared/data/coco128 is not here")
def test_real_photographs(tmp_path, capsys):
    out = tmp_path / "c.h5"
    arguments = ["--data", str(COCO), "--imgsz", "64", "--epochs", "1", "--out", str(out)]
    assert command(["record", "--trainer", "gradnorm", *arguments]) == 0
    assert "4 images left out: train: 000000000250.jpg: no image class" in capsys.readouterr().err
    with open_run(out) as run:
        assert run["layer_size"].sum() == 1_046_368
        for name in ("loss", "weight", "grad_norm", "cosine"):
            assert np.isfinite(run[name]).all(), name
        assert math.isfinite(run.epochs["accuracy"][0])
