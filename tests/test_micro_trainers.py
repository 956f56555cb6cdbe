"""Every bundled trainer in micro-batches: the step is that of a plain loop, the noise is in the rows."""

from __future__ import annotations

import copy
import importlib.util
import json

import numpy as np
import pytest
import torch
import training
from test_probes_harmless import assert_same

import gradprobe
from gradprobe.cli.app import run as command
from gradprobe.errors import UsageError
from gradprobe.rows import MEASURED
from gradprobe.trainers import loop
from gradprobe.trainers.data.dataset import micro_batches
from gradprobe.trainers.settings import resolve


def test_parts_of_a_batch_are_its_images_with_their_targets():
    batch = next(iter(training.batches(training.make("joint"), 1)))
    whole = batch.boxes.clone()
    parts = micro_batches(batch, 3)
    assert [len(part) for part in parts] == [2, 3, 3]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert sum((part.names for part in parts), ()) == batch.names
    starts = [0, 2, 5]
    back = [part.boxes + torch.tensor([start, 0, 0, 0, 0, 0]) for part, start in zip(parts, starts, strict=True)]
    assert torch.equal(torch.cat(back), whole)
    assert torch.equal(batch.boxes, whole)
    assert all(part.boxes[:, 0].max() < len(part) for part in parts if len(part.boxes))


@pytest.mark.parametrize(
    ("images", "count", "sizes"), [(3, 4, [1, 1, 1]), (1, 4, [1]), (8, 1, [8]), (7, 4, [1, 2, 2, 2])]
)
def test_a_short_batch_has_fewer_parts(images, count, sizes):
    batch = next(iter(training.batches(training.make("joint"), 1))).part(0, images)
    assert [len(part) for part in micro_batches(batch, count)] == sizes


def options(trainer):
    if trainer == "single":
        return {"task": "det"}
    if trainer == "split":
        return {"double": ("model.9.cv1.conv",)}
    return {}


def available(trainer):
    kind = importlib.import_module("gradprobe.trainers.balancer").find_balancer(trainer)
    surgery = importlib.import_module("gradprobe.trainers.surgery").Surgery
    return not issubclass(kind, surgery) or importlib.util.find_spec("torchjd") is not None


@pytest.mark.parametrize("trainer", training.every_trainer())
def test_every_trainer_trains_and_is_measured_in_micro_batches(trainer):
    if not available(trainer):
        pytest.skip("torchjd is not installed")
    made = training.run(training.make(trainer, micro_batches=4, **options(trainer)), steps=2)
    assert [row.status for row in made.rows] == [MEASURED] * 2
    for row in made.rows:
        assert (row.micro_batches, row.batch_size) == (4, 8)
        assert row.gram_noise.shape == row.gram.shape
        diagonal = np.einsum("lii->li", row.gram_noise)
        assert (np.isnan(diagonal) | (diagonal >= 0)).all()
    if trainer not in ("dual", "single", "detach"):
        assert np.isfinite(made.rows[-1].gram_noise).any()


def plain_loop(made, steps, count):
    """What the loop does with fixed weights, written anew and without a probe."""
    made.probe.close()
    made.model.train()
    for batch in training.batches(made, steps):
        parts = micro_batches(batch, count)
        micro = [made.model.losses(made.model(part.images), part) for part in parts]
        shares = [len(part) / len(batch) for part in parts]
        losses = {}
        for task in micro[0]:
            losses[task] = micro[0][task] * shares[0]
            for one, share in zip(micro[1:], shares[1:], strict=True):
                losses[task] = losses[task] + one[task] * share
        (1.0 * losses["det"] + 0.5 * losses["cls"]).backward()
        made.optimizer.step()
        made.optimizer.zero_grad(set_to_none=True)
        made.schedule.step()
    return made


@pytest.mark.parametrize("count", [1, 3])
def test_a_training_with_a_probe_is_the_same_loop_without_one(count):
    made = {"task_weights": (1.0, 0.5), "micro_batches": count, "optimizer": "SGD"}
    measured = training.run(training.make("joint", **made), steps=4)
    plain = plain_loop(training.make("joint", **made), 4, count)
    assert_same(measured.model.state_dict(), plain.model.state_dict())
    assert_same(measured.optimizer.state_dict(), plain.optimizer.state_dict())


def test_the_default_is_as_it_was():
    rows = training.run(training.make("joint"), steps=2).rows
    assert [row.gram_noise for row in rows] == [None, None]
    assert [row.micro_batches for row in rows] == [1, 1]


def test_a_batch_of_one_image_has_no_noise():
    made = training.make("joint", micro_batches=4)
    made.model.train()
    batch = next(iter(training.batches(made, 1)))
    for images in (8, 2, 1):
        loop.train_step(made, batch.part(0, images))
    made.probe.close()
    assert [row.micro_batches for row in made.rows] == [4, 2, 1]
    assert [np.isnan(row.gram_noise).all() for row in made.rows] == [False, False, True]
    assert [row.status for row in made.rows] == [MEASURED] * 3


def test_a_loss_that_is_not_finite_is_noted():
    made = training.make("joint", micro_batches=2, keep_going=True)
    made.model.train()
    batch = next(iter(training.batches(made, 1)))
    loop.train_step(made, batch)
    batch.images[0] = float("nan")
    loop.train_step(made, batch)
    made.probe.close()
    assert [row.status == MEASURED for row in made.rows] == [True, False]
    assert made.rows[1].batch_size == 8


def test_an_audit_takes_the_same_step():
    """The audit's stand-in for the probe makes the same joint backward."""
    from gradprobe.trainers import audited

    settings = resolve({"trainer": "joint", "imgsz": 64, "batch_size": 8, "micro_batches": 4, "optimizer": "SGD"})
    experiment = audited.experiment_factory(audited.audit_settings(settings), training.phantoms())()

    class Trace:
        def losses(self, losses):
            return losses

    for batch in list(experiment.batches(("det", "cls")))[:2]:
        experiment.step(Trace(), batch, experiment.weights)
    measured = training.run(training.make("joint", micro_batches=4, optimizer="SGD"), steps=2)
    assert_same(copy.deepcopy(experiment.model.state_dict()), measured.model.state_dict())


@pytest.mark.parametrize("count", [0, -1, 9])
def test_a_number_that_cannot_be_is_refused(count):
    with pytest.raises(UsageError, match=rf"--micro-batches {count}: "):
        resolve({"micro_batches": count, "batch_size": 8})


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_probe_loader_draws_from_the_split_and_changes_nothing(split):
    found = {"micro_batches": 2, "optimizer": "SGD", "probe_every": 2, "probe_batches": 3}
    sink = LoaderRows()
    drawn = training.run(training.make("joint", sinks=[sink], probe_loader=split, **found), steps=4)
    plain = training.run(training.make("joint", **found), steps=4)
    assert_same(drawn.model.state_dict(), plain.model.state_dict())
    assert_same(drawn.optimizer.state_dict(), plain.optimizer.state_dict())
    assert [row.step for row in sink.rows] == [0, 2]
    assert [(row.status, row.micro_batches, row.batch_size) for row in sink.rows] == [(MEASURED, 3, 12)] * 2
    for row in sink.rows:
        assert np.isfinite(row.gram_noise).all()
        assert np.isfinite(row.loss).all()
    about = drawn.collector.header.provenance["probe_loader"]
    assert (about["split"], about["samples"]) == (split, 32 if split == "train" else 8)


class LoaderRows:
    """A sink of the probe loader's rows alone."""

    tables = ("probe_loader",)

    def __init__(self):
        self.rows = []

    def start(self, header):
        pass

    def write(self, row):
        if row.table.name == "probe_loader":
            self.rows.append(row)

    def write_epoch(self, epoch, values):
        pass

    def annotate(self, values):
        assert values["self_check"] == pytest.approx([1, -1], abs=1e-6)

    def flush(self):
        return True

    def close(self, end):
        pass


def test_record_and_summary_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "run.h5"
    data = tmp_path / "data"
    assert command(["data", "make", str(data), "--n", "30", "--seed", "3"]) == 0
    flags = "--trainer joint --imgsz 64 --batch-size 8 --epochs 2 --every 2 --micro-batches 2"
    flags += " --probe-loader val --probe-every 1 --probe-batches 3 --bn-batches 1"
    assert command(["record", "--data", str(data / "data.yaml"), "--out", str(out), *flags.split()]) == 0
    with gradprobe.open_run(out) as run:
        steps = 2 * run.provenance["steps_per_epoch"]
        assert run.probe_loader["step"].tolist() == list(range(steps))
        assert run["micro_batches"].tolist() == [2] * (steps // 2)
        assert run.provenance["settings.probe_loader"] == "val"
        assert np.isfinite(run.estimate("model.9", source="probe_loader").noise_correlation).all()
    capsys.readouterr()
    assert command(["check", str(out)]) == 0
    assert command(["summary", str(out)]) == 0
    assert (
        f"On independent samples (val, {steps} rows of the probe loader), less their noise" in capsys.readouterr().out
    )
    assert command(["summary", "--json", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)["probe_loader"]
    assert (found["rows"], found["split"], found["not_measured"]) == (steps, "val", {})
    assert set(found["tasks"]["det"]) == {"noise_scale", "low", "high"}


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("probe_loader", "test", "--probe-loader test: must be one of train, val"),
        ("probe_batches", 1, "--probe-batches 1: must be at least 2; noise is told"),
    ],
)
def test_a_probe_loader_that_cannot_be_is_refused(flag, value, message):
    with pytest.raises(UsageError, match=message):
        resolve({flag: value})
