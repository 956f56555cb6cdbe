"""Doubled layers: what is shared, what is not, and what two copies start from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import training
from run_factory import make_run, trunk_layers

from gradprobe import open_run
from gradprobe.cli import request
from gradprobe.cli.app import run as command
from gradprobe.errors import UsageError
from gradprobe.trainers import checkpoint
from gradprobe.trainers.settings import Settings, resolve


def touched(model, batch):
    """Parameters by the task whose loss gives them a gradient."""
    losses = model.losses(model(batch.images), batch)
    found = {}
    for task, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        found[task] = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return found


def one_batch(made):
    made.model.train()
    return next(iter(training.batches(made, 1)))


def test_the_gradients_of_a_dual_model_have_no_parameter_in_common_and_all_are_used():
    made = training.make("dual")
    found = touched(made.model, one_batch(made))
    assert found["det"] & found["cls"] == set()
    assert found["det"] | found["cls"] == {n for n, _ in made.model.named_parameters()}
    assert {n.split(".")[0] for n in found["cls"]} == {"image_trunk", "classifier"}


def test_both_copies_are_the_one_reference_model_bit_for_bit():
    reference, made = training.make("joint"), training.make("dual")
    hashes = {training.provenance(trainer)["reference"] for trainer in ("joint", "dual")}
    assert hashes == {checkpoint.fingerprint(reference.model)}
    original, state = reference.model.state_dict(), made.model.state_dict()
    for name, value in state.items():
        assert torch.equal(value, original[name.replace("image_trunk", "model")]), name
    copies = [n for n in state if n.startswith("image_trunk")]
    assert len(copies) == sum(n.split(".")[0] == "model" and int(n.split(".")[1]) < 10 for n in original)
    batch = one_batch(reference)
    made.model.train()
    with torch.no_grad():
        first, second = (m.losses(m(batch.images), batch) for m in (reference.model, made.model))
    assert {t: v.item() for t, v in first.items()} == {t: v.item() for t, v in second.items()}


def test_parameters_and_operations_are_those_of_two_trunks():
    one, two = (training.provenance(t) for t in ("joint", "dual"))
    assert two["parameters"] - one["parameters"] == 1_046_368  # the trunk, of facts
    assert 1.4 < two["flops_per_image"] / one["flops_per_image"] < 1.9  # neck and head are there once
    shallow = training.provenance("dual", share_until="model.8")
    assert one["flops_per_image"] < shallow["flops_per_image"] < two["flops_per_image"]


def test_nothing_shared_is_not_applicable_in_the_file_and_in_words(tmp_path, capsys):
    data = tmp_path / "phantoms"
    small = ["--imgsz", "64", "--epochs", "1", "--bn-batches", "1", "--batch-size", "8"]
    out = str(tmp_path / "dual.h5")
    assert command(["data", "make", str(data), "--n", "16"]) == 0
    assert command(["record", "--trainer", "dual", "--data", str(data / "data.yaml"), *small, "--out", out]) == 0
    with open_run(out) as run:
        assert run.layers == ()
        assert np.isnan(run["shared_cosine"]).all()
        assert len(run) > 0
        assert len(run.provenance["model.doubled"]) == 66
        assert run.provenance["model.flops_per_image"] > 0
    capsys.readouterr()
    assert command(["summary", out]) == 0
    assert "not applicable" in capsys.readouterr().out
    assert command(["check", out]) == 0
    assert command(["plot", out]) == 0


@pytest.mark.parametrize("until", ["model.4", "model.4.m.0.cv1"])
def test_layers_up_to_one_stay_shared_under_the_undivided_models_names(until):
    whole = training.run(training.make("joint"), 1).collector.header
    part = training.run(training.make("dual", share_until=until), 1).collector.header
    last = max(i for i, name in enumerate(whole.layers) if name.startswith(until))
    assert tuple(part.layers) == tuple(whole.layers[: last + 1])
    assert part.layer_size.tolist() == whole.layer_size[: last + 1].tolist()


def test_a_divided_model_goes_on_from_its_checkpoint_with_its_layers_still_shared(tmp_path):
    made = training.run(training.make("dual", share_until="model.5"), 2)
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"model": made.model.state_dict()})
    again = training.make("dual", share_until="model.5")
    again.model.load_state_dict(torch.load(path, weights_only=True)["model"])
    found = touched(again.model, one_batch(again))
    assert {n.split(".")[1] for n in found["det"] & found["cls"]} == {str(i) for i in range(6)}
    assert checkpoint.fingerprint(again.model) != checkpoint.fingerprint(training.make("dual").model)


def test_a_layer_in_the_middle_is_doubled_and_those_around_it_stay_shared():
    double = ("model.6.m.0.cv1.conv", "model.9.cv1.bn")
    made = training.make("split", from_run="x.h5", double=double)
    found = touched(made.model, one_batch(made))
    common = {n.rpartition(".")[0] for n in found["det"] & found["cls"]}
    reference = training.make("joint").model
    assert common == set(reference.trunk_layers(64)) - set(double)
    copies = {n.rpartition(".")[0] for n in found["cls"] - found["det"]}
    assert copies == {n.replace("model", "image_trunk", 1) for n in double} | {"classifier"}
    assert sum(p.numel() for p in made.model.parameters()) == sum(p.numel() for p in reference.parameters()) + sum(
        p.numel() for n in double for p in reference.get_submodule(n).parameters()
    )
    run = training.run(made, 1)  # shared layers behind the doubled one: both tasks' gradients, one parameter
    assert set(run.collector.header.layers) == common


def test_shared_batchnorm_behind_a_doubled_layer_keeps_statistics_for_each_task():
    made = training.make("split", from_run="x.h5", double=("model.6.cv1.conv",))
    with torch.no_grad():
        made.model.image_trunk.get_submodule("6.cv1.conv").weight.mul_(3)
    training.run(made, 1)
    det, cls = made.model.get_submodule("model.9.cv1.bn"), made.model.image_trunk.get_submodule("9.cv1.bn")
    assert det.weight is cls.weight
    assert not torch.equal(det.running_mean, cls.running_mean)


@pytest.mark.parametrize(
    ("trainer", "options", "message"),
    [
        ("dual", {"share_until": "model.44"}, r"--share-until 'model.44': the trunk has no such layer \(near: model.4"),
        ("dual", {"share_until": "model.4.m.0.cv9"}, r"near: model.4.m.0.cv"),
        ("dual", {"share_until": "model.9"}, "no layer of the trunk is to be doubled"),
        ("joint", {"share_until": "model.4"}, "goes with --trainer dual"),
        ("split", {"from_run": "x.h5", "double": ("model.12.cv1.conv",)}, "--from x.h5: layer 'model.12.cv1.conv'"),
    ],
)
def test_layers_that_are_not_there_are_named_with_near_ones(trainer, options, message):
    with pytest.raises(UsageError, match=message):
        training.make(trainer, **options)


# ---- what --from reads


def read(source, trainer, **options):
    return request.read_source(source, resolve({"trainer": trainer, **options}))


PROVENANCE = {"trainer": "gradnorm", "settings": {"cfg": "yolov5n.yaml"}}


def test_split_takes_the_layers_with_the_worst_score(tmp_path):
    source = make_run(tmp_path / "joint.h5", layers=trunk_layers(), rows=80, provenance=PROVENANCE)
    given = read(source, "split", top_k=3)
    assert given["from_run"] == "joint.h5"
    with open_run(source) as run:
        late = run["cosine"][:, :, 0].mean(0).argsort()[:12]  # the factory makes the late layers drift apart
        assert set(given["double"]) <= {run.layers[i] for i in late}
        assert given["double_sizes"] == tuple(run.layer_size[run.layers.index(n)] for n in given["double"])
    assert len(given["double"]) == 3
    dataclasses.replace(Settings(trainer="split"), **given)


def test_split_from_a_run_whose_cfg_has_the_same_name_and_other_sizes_is_refused():
    options = {"from_run": "x.h5", "double": ("model.3.conv", "model.4.cv1.conv")}
    training.make("split", double_sizes=(18_432, 2_048), **options)
    with pytest.raises(UsageError, match=r"layer model.4.cv1.conv has 8,192 parameters, this model's 2,048"):
        training.make("split", double_sizes=(18_432, 8_192), **options)


def test_split_from_a_run_of_another_architecture_is_refused(tmp_path):
    other = make_run(tmp_path / "s.h5", provenance={"trainer": "joint", "settings": {"cfg": "yolov5s.yaml"}})
    with pytest.raises(UsageError, match=r"another architecture \(yolov5s.yaml, not yolov5n.yaml\)"):
        read(other, "split")
    foreign = make_run(tmp_path / "f.h5", provenance={"trainer": "attach"})
    with pytest.raises(UsageError, match="no YOLOv5 cfg"):
        read(foreign, "split")
    halved = make_run(tmp_path / "h.h5", provenance={**PROVENANCE, "model": {"doubled": ["model.3.conv"]}})
    with pytest.raises(UsageError, match="has 1 doubled layers already"):
        read(halved, "split")
    few = make_run(tmp_path / "few.h5", layers=4, provenance=PROVENANCE)
    with pytest.raises(UsageError, match=r"--top-k 5: .* has 4 layers"):
        read(few, "split")


def test_static_gradnorm_takes_the_time_average(tmp_path):
    source = make_run(tmp_path / "g.h5", provenance=PROVENANCE)
    with open_run(source) as run:
        expected = run["weight"].mean(0)
    given = read(source, "gradnorm-static")
    np.testing.assert_allclose(given["task_weights"], expected, rtol=1e-6)
    joint = make_run(tmp_path / "j.h5", provenance={"trainer": "joint"})
    with pytest.raises(UsageError, match="was recorded with --trainer joint"):
        read(joint, "gradnorm-static")


@pytest.mark.parametrize("weights", ["det=1,cls=0.5", "equal"])
def test_static_gradnorm_takes_its_weights_from_one_place(weights, tmp_path, capsys):
    source = make_run(tmp_path / "g.h5", provenance=PROVENANCE)
    given = ["--trainer", "gradnorm-static", "--from", str(source), "--task-weights", weights]
    assert command(["record", *given, "--out", str(tmp_path / "x.h5")]) == 2
    assert "leave out --task-weights" in capsys.readouterr().err


def test_from_is_asked_for_where_it_is_needed_and_refused_where_not(tmp_path):
    with pytest.raises(UsageError, match="--trainer split needs an earlier run"):
        read(None, "split")
    with pytest.raises(UsageError, match="gradnorm reads no earlier run"):
        read(tmp_path / "x.h5", "gradnorm")
