"""The dial problem: what is dialled is what is there, what is measured, and what stays."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.errors import UsageError
from gradprobe.trainers.problems import kind_of, problem_of
from gradprobe.trainers.problems.dial import BEND, CLIPS, FRAMES, REACH, TARGET, DialModel, collate_dial, make_dial_data
from gradprobe.trainers.problems.dial_spec import DialSpec, parse_dial
from gradprobe.trainers.settings import resolve


def record(*arguments):
    return command(["record", *map(str, arguments)])


def gradients(model, split):
    """(2, P): the gradient of each task's loss over a whole split, by autograd."""
    batch = collate_dial([split[i] for i in range(len(split))])
    losses = model.losses(model(batch.images), batch)
    shared = list(model.blocks.parameters())
    return np.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(losses[t], shared, retain_graph=True)]).numpy()
            for t in model.tasks
        ]
    )


# ---- what is dialled


def test_the_dials_are_read():
    assert parse_dial("dial") == DialSpec()
    assert parse_dial("dial: angle=60, seed=3").seed == 3
    assert kind_of("dial:angle=60").tasks == ("a", "b")
    assert kind_of("dial.yaml").tasks == kind_of("phantom").tasks == ("det", "cls")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("dial:angel=3", r"the dial 'angel' is unknown .*Did you mean 'angle'"),
        ("dial:angle=3,angle=4", "given twice"),
        ("dial:angle=181", "angle is 181; it is to be from 0 to 180"),
        ("dial:noise=nan", "noise is nan"),
        ("dial:ratio=0", "ratio is 0"),
        ("dial:size=3.5", "size is '3.5'; it is to be a whole number"),
        ("dial:layers", "layers is ''"),
    ],
)
def test_what_is_wrong_with_a_dial_is_named(data, message):
    with pytest.raises(UsageError, match=message):
        resolve({"data": data})


def test_tasks_and_weights_go_by_the_data(tmp_path, capsys):
    small = ("--data", "dial:size=32", "--epochs", 1, "--out", tmp_path / "x.h5")
    assert record(*small, "--trainer", "single", "--task", "det") == 2
    assert "which task? --task a or --task b" in capsys.readouterr().err
    assert record(*small, "--task-weights", "det=1,cls=1") == 2
    assert "write a=1,b=0.01" in capsys.readouterr().err
    assert record(*small, "--task-weights", "b=0.5,a=2", "--trainer", "joint") == 0
    with open_run(tmp_path / "x.h5") as run:
        assert run["weight"][0].tolist() == [2, 0.5]


# ---- what is there


@pytest.mark.parametrize("angle", [0.0, 60.0, 90.0, 137.5, 180.0])
@pytest.mark.parametrize("correlation", [0.0, 0.8, -1.0])
def test_gradient_and_noise_of_the_training_data_are_those_dialled(angle, correlation):
    spec = f"dial:angle={angle},ratio=10,noise=3,correlation={correlation},size=64,layers=2,dim=8"
    data = make_dial_data(spec, seed=5)
    x = data.train.images.double().numpy()  # (N, 2, layers, dim)
    mean = x.mean(0)
    noise = (x - mean).reshape(len(x), 2, -1)
    length = np.linalg.norm(mean, axis=2)
    np.testing.assert_allclose(length, 1 / math.sqrt(2), atol=1e-6)
    np.testing.assert_allclose((mean[0] * mean[1]).sum(1), math.cos(math.radians(angle)) / 2, atol=1e-6)
    np.testing.assert_allclose(np.square(noise).sum(2).mean(0), 9, rtol=1e-5)
    np.testing.assert_allclose((noise[:, 0] * noise[:, 1]).sum(1).mean(), 9 * correlation, atol=1e-4)


def test_the_gradient_is_the_same_at_all_parameters_before_the_bend():
    data = make_dial_data("dial:angle=120,ratio=10,noise=1", seed=0)
    model = DialModel(3, 32, (10.0, 1.0), seed=0)
    first = gradients(model, data.train)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = collate_dial([data.train[i] for i in range(len(data.train))])
    assert all(float(output.detach().max()) < TARGET - BEND for output in model(batch.images).values())
    np.testing.assert_allclose(gradients(model, data.train), first, atol=1e-5)
    norm = np.linalg.norm(first, axis=1)
    np.testing.assert_allclose(norm, [10, 1], rtol=1e-5)
    assert first[0] @ first[1] / norm.prod() == pytest.approx(-0.5, abs=1e-6)


def test_behind_the_bend_the_gradient_shrinks_to_nothing_at_the_target():
    data = make_dial_data("dial:noise=0", seed=0)
    model = DialModel(3, 32, (1.0, 1.0), seed=0)
    for gap, length in ((BEND, 1.0), (BEND / 2, 0.5), (0.0, 0.0)):
        with torch.no_grad():
            for parameter in model.blocks.parameters():
                parameter.zero_()
            model.heads["a"].bias.fill_((TARGET - gap) / REACH)
        np.testing.assert_allclose(np.linalg.norm(gradients(model, data.train)[0]), length, atol=1e-6)


def test_data_are_a_function_of_dials_and_seed():
    one = make_dial_data("dial", seed=1)
    assert (
        one.fingerprint
        == make_dial_data("dial:angle=120", seed=1).fingerprint
        == make_dial_data("dial:seed=1", 7).fingerprint
    )
    assert len({one.fingerprint, *(make_dial_data(f"dial{d}", 1).fingerprint for d in (":ratio=2", ":seed=2"))}) == 3


def test_the_test_split_is_made_of_clips_that_its_samples_resemble():
    data = make_dial_data("dial:noise=2", seed=0)
    problem = problem_of(resolve({"data": "dial"}))
    clips = list(problem.clusters(data.test))
    assert len(set(clips)) == CLIPS
    assert [clips.count(clip) for clip in sorted(set(clips))] == [FRAMES] * CLIPS
    noise = (data.test.images - data.train.images.mean(0)).reshape(CLIPS, FRAMES, -1).double().numpy()
    between = noise.mean(1).var() - noise.var(1, ddof=1).mean() / FRAMES
    assert between / noise.var() == pytest.approx(0.5, abs=0.05)


# ---- what is measured


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    out = tmp_path_factory.mktemp("dial") / "exact.h5"
    dials = "dial:angle=120,ratio=10,noise=0"
    plain = ("--optimizer", "SGD", "--momentum", 0, "--lr", 1e-3)
    assert record("--data", dials, "--trainer", "joint", *plain, "--out", out) == 0
    return out


def test_without_noise_every_row_is_what_was_dialled_to_the_end(exact):
    with open_run(exact) as run:
        assert (run.tasks, run.layers) == (("a", "b"), ("blocks.0", "blocks.1", "blocks.2"))
        assert len(run) == 96
        np.testing.assert_allclose(run["cosine"], -0.5, atol=1e-5)
        np.testing.assert_allclose(run["shared_cosine"], -0.5, atol=1e-5)
        np.testing.assert_allclose(run["shared_grad_norm"], [[10, 1]] * len(run), rtol=1e-5)
        # b is driven backwards, which angle and ratio alone decide: 1 + 10 cos(120) < 0
        assert run["loss"][-1, 1] > run["loss"][0, 1]
        assert run["loss"][-1, 0] < run["loss"][0, 0]


@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_noise_lengthens_what_is_measured_as_much_as_dialled(noise, tmp_path):
    """Of a batch of B from N without replacement: |g|^2 (1 + noise^2 / B (N - B) / (N - 1))."""
    dials = f"dial:angle=60,ratio=0.5,noise={noise}"
    out = tmp_path / "noisy.h5"
    assert record("--data", dials, "--trainer", "joint", "--every", 1, "--lr", 5e-4, "--out", out) == 0
    with open_run(out) as run:
        assert run.provenance["data.dial.noise"] == noise
        square = np.square(run["shared_grad_norm"]).astype(float)
        product = (run["shared_cosine"][:, 0] * run["shared_grad_norm"].prod(1)).astype(float)
    part = noise**2 / 16 * (256 - 16) / 255
    error = part * math.sqrt(2 / 96 / len(square)) * 4 + 4 * 2 * math.sqrt(part / 96 / len(square))
    np.testing.assert_allclose(square.mean(0) / [0.25, 1], 1 + part, atol=error)
    assert product.mean() / 0.5 == pytest.approx(0.5, abs=error)


@pytest.mark.parametrize(
    "arguments",
    [
        ("single", "--task", "b"),
        ("gradnorm",),
        ("dual",),
        ("dual", "--share-until", "blocks.0"),
        ("detach",),
        ("pcgrad",),
        ("uncertainty",),
        ("dwa",),
        ("rlw",),
    ],
    ids=" ".join,
)
def test_every_kind_of_trainer_records_it(arguments, tmp_path):
    out = tmp_path / "run.h5"
    assert record("--data", "dial:size=64", "--trainer", *arguments, "--epochs", 2, "--out", out, "--every", 1) == 0
    shared = {"dual": 0, "detach": 0, "--share-until": 1}
    with open_run(out) as run:
        assert run.end == "finished"
        assert len(run.layers) == shared.get(arguments[-2] if len(arguments) > 2 else arguments[0], 3)
        assert set(run.epochs) == {"epoch", "solved_a", "solved_b", "loss_a", "loss_b"}
        assert run.provenance["metrics.task"] == ["a", "b", "a", "b"]
        assert run.provenance["metrics.higher_is_better"] == [1, 1, 0, 0]
        assert 0 <= run.provenance["test.solved_b"] <= 1
        assert run.provenance["data.test_images"] == CLIPS * FRAMES


def test_layers_of_an_earlier_run_are_doubled(exact, tmp_path):
    out = tmp_path / "split.h5"
    dials = ("--data", "dial:size=32", "--epochs", 1, "--out", out)
    assert record("--trainer", "split", "--from", exact, "--top-k", 2, *dials) == 0
    with open_run(out) as run:
        assert len(run.layers) == 1
        assert len(run.provenance["model.doubled"]) == 2


def test_sharing_less_solves_more_when_tasks_conflict(tmp_path):
    solved = {}
    for trainer in ("joint", "dual"):
        out = tmp_path / f"{trainer}.h5"
        assert record("--data", "dial:angle=120", "--trainer", trainer, "--out", out, "--every", 50) == 0
        with open_run(out) as run:
            solved[trainer] = [run.provenance[f"test.solved_{task}"] for task in run.tasks]
    assert min(solved["dual"]) > 0.9
    assert max(solved["joint"]) < 0.6


def test_the_audit_knows_it(capsys):
    assert command(["audit", "--data", "dial:size=32", "--task", "b", "--steps", "3", "--trainer", "joint"]) == 0
    assert "b" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["dial:size=16", "phantom"])
def test_a_part_of_a_batch_is_a_batch_of_those_samples(source):
    settings = resolve({"data": source, "imgsz": 32})
    problem = problem_of(settings)
    if source == "phantom":
        from gradprobe.trainers.data.loading import load_data

        data = load_data(source, imgsz=32, n_train=7, n_val=1)
    else:
        data = problem.load(settings)
    whole, wanted = (next(iter(problem.loader(data.train, size, shuffle=False))) for size in (7, 4))
    parts = [whole.part(0, 4), whole.part(4, 7)]
    assert [len(part) for part in parts] == [4, 3]
    assert parts[0].names == wanted.names
    for name in set(vars(wanted)) - {"names"}:
        assert torch.equal(getattr(parts[0], name), getattr(wanted, name)), name
    if source == "phantom":
        assert sum(len(part.boxes) for part in parts) == len(whole.boxes)
        assert parts[1].boxes[:, 0].min() >= 0
        assert parts[1].boxes[:, 0].max() < 3


def test_yolov5_is_not_imported_for_it(tmp_path):
    code = (
        "import sys; from gradprobe.cli.app import run; "
        f"run(['record', '--data', 'dial:size=16', '--epochs', '1', '--out', {str(tmp_path / 'x.h5')!r}]); "
        "print([m for m in sys.modules if m.split('.')[0] in ('yolov5', 'torchvision', 'torchmetrics') "
        "or m.endswith('models.yolov5')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.splitlines()[-1] == "[]"
