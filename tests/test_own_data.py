"""``--data my_module:name``: a data set, or a whole problem, of the user's own."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.errors import DataError, UsageError
from gradprobe.trainers import problems
from gradprobe.trainers.data import loading

MODULE = """
import dataclasses
from pathlib import Path

import numpy as np

from gradprobe.trainers.problems import Kind, Metric
from gradprobe.trainers.problems.dial import Dial


def samples(count, seed):
    draw = np.random.default_rng(seed)
    for i in range(count):
        image = draw.integers(0, 255, (40, 64, 3), dtype=np.uint8)
        yield f"{seed}-{i}.png", image, [(i % 2, 0.5, 0.5, 0.4, 0.3)], i % 3, f"clip {i // 2}"


def squares():
    return {
        "box_names": ["one", "two"],
        "image_names": ["x", "y", "z"],
        "train": samples(8, 0),
        "val": samples(4, 1),
        "test": samples(4, 2),
    }


def broken():
    raise KeyError("no such disk")


class Tilted(Dial):
    kind = Kind("tilted", ("left", "right"), (Metric("solved_a", "left"), Metric("solved_b", "right")), "")

    def load(self, settings):
        return super().load(dataclasses.replace(settings, data="dial:angle=150,size=16"))

    def build_model(self, settings, data, hyp):
        model = super().build_model(settings, data, hyp)
        losses = model.losses
        model.losses = lambda outputs, batch: dict(zip(("left", "right"), losses(outputs, batch).values()))
        return model


class Stopped(Tilted):
    def score(self, model, loader, *, device):  # Ctrl-C in the second epoch, once
        if Path("first-epoch").exists() and not Path("stopped").exists():
            Path("stopped").touch()
            raise KeyboardInterrupt
        Path("first-epoch").touch()
        return super().score(model, loader, device=device)


class Half:
    kind = Tilted.kind
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(problems, "_allowed", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_data", raising=False)
    problems._own.cache_clear()
    yield tmp_path
    problems._own.cache_clear()


def record(*words):
    return command(["record", "--trainer", "joint", "--epochs", "1", "--every", "1", *words])


@pytest.mark.skipif("not __import__('importlib').util.find_spec('yolov5')", reason="yolov5 is not installed")
def test_a_function_hands_over_images_that_are_trained_on(own, capsys):
    assert record("--data", "own_data:squares", "--imgsz", "32", "--batch-size", "4") == 0, capsys.readouterr().err
    with open_run(own / "conflict.h5") as run:
        said = run.provenance
        assert (len(run), run.tasks) == (2, ("det", "cls"))
        assert [said[f"data.{name}"] for name in ("train_images", "val_images", "test_images")] == [8, 4, 4]
        assert said["settings.data"] == said["data.name"] == "own_data:squares"
        assert list(said["data.image_names"]) == ["x", "y", "z"]
        assert len(run.table("test")["cluster"]) == 2  # clips of two images each


def test_a_class_is_a_problem_with_tasks_of_its_own(own, capsys):
    assert record("--data", "own_data:Tilted", "--batch-size", "8") == 0, capsys.readouterr().err
    with open_run(own / "conflict.h5") as run:
        assert run.tasks == ("left", "right")
        assert np.median(run.cosine()) < -0.5


def test_a_file_does_not_name_code(own, capsys):
    """A run of one's own data goes on where the command line names them, and only there."""
    long = ["--data", "own_data:Tilted", "--batch-size", "8", "--epochs", "3", "--lr", "1e30", "--out", "run.h5"]
    assert command(["record", "--trainer", "joint", *long]) != 0  # a loss that is not finite: the run is left open
    capsys.readouterr()
    problems._allowed.clear()
    problems._own.cache_clear()
    sys.modules.pop("own_data", None)

    assert command(["record", "--resume", "run.h5"]) == 2
    assert "name it too: --data own_data:Tilted" in capsys.readouterr().err
    assert "own_data" not in sys.modules
    assert command(["record", "--resume", "run.h5", "--data", "own_data:squares"]) == 2
    assert "was recorded with --data own_data:Tilted" in capsys.readouterr().err
    with pytest.raises(UsageError, match="name it on the command line"):
        problems.kind_of("own_data:Tilted")
    assert "own_data" not in sys.modules


def test_a_run_of_ones_own_data_goes_on_where_they_are_named(own, capsys):
    data = ["--data", "own_data:Stopped"]
    assert command(["record", "--trainer", "joint", *data, "--batch-size", "8", "--epochs", "3", "--every", "1"]) == 130
    with open_run(own / "conflict.h5") as run:
        assert run.end != "finished"
    assert command(["record", "--resume", "conflict.h5", *data]) == 0, capsys.readouterr().err
    with open_run(own / "conflict.h5") as run:
        assert (run.end, run["step"].tolist()) == ("finished", list(range(6)))


def test_a_name_that_no_path_can_have_is_still_a_name():
    assert problems.is_own(f"{'a' * 3000}:make")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("own_data:none", "AttributeError"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("own_data:broken", "KeyError: 'no such disk'"),
        ("own_data:Half", "lacks load, describe"),
    ],
)
def test_what_cannot_be_loaded_says_why(data, message, own, capsys):
    assert record("--data", data, "--imgsz", "32") in (1, 2)
    assert message in capsys.readouterr().err
    assert not (own / "conflict.h5").exists()


IMAGE = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (("a", IMAGE, []), r"train, sample 1: is not \(name, image, boxes, image_class\)"),
        (("a", IMAGE.astype(float), [], 0), r"the image is \(4, 4, 3\) of float64"),
        (("a", IMAGE[..., 0], [], 0), r"the image is \(4, 4\) of uint8"),
        (("a", IMAGE, [], 2), "image class is 2, not one of 0 to 1"),
        (("a", IMAGE, [(1, 0.5, 0.5, 0.1, 0.1)], 0), "class of box 0 is 1.0, not one of 0 to 0"),
        (("a", IMAGE, [(0, 50, 0.5, 0.1, 0.1)], 0), r"box 0 is \[50.0, 0.5, 0.1, 0.1\]"),
        (("a", IMAGE, [], float("nan")), "image class is nan"),
    ],
)
def test_a_sample_that_is_wrong_is_named(sample, message):
    good = ("good", IMAGE, [(0, 0.5, 0.5, 1, 1)], 1)
    found = {"box_names": ["b"], "image_names": ["x", "y"], "train": [good, sample], "val": [good]}
    with pytest.raises(DataError, match=message):
        loading.load_samples(found, "mine", 32)
    with pytest.raises(DataError, match="returned no val"):
        loading.load_samples({"box_names": [], "image_names": [], "train": []}, "mine", 32)


def test_equal_samples_have_equal_fingerprints_whatever_their_names():
    def load(name, shade):
        image = np.full((4, 4, 3), shade, np.uint8)
        split = [(name, image, [], 0)]
        return loading.load_samples({"box_names": ["b"], "image_names": ["x"], "train": split, "val": split}, name, 32)

    assert load("a", 1).fingerprint == load("b", 1).fingerprint != load("a", 2).fingerprint
