from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from zoo import Collector

from gradprobe.errors import MissingExtraError, UsageError
from gradprobe.probes import GradientProbe
from gradprobe.rows import MEASURED, absent
from gradprobe.trainers.hyp import DetectionHyp
from gradprobe.trainers.models._import_yolov5 import import_yolov5, package_folder
from gradprobe.trainers.models.yolov5 import Outputs, YOLOv5WithClassification, build_model


@dataclass(frozen=True)
class Batch:
    images: Tensor
    boxes: Tensor
    labels: Tensor

    def to(self, device: object) -> Batch:
        return self


def small(cfg: str = "yolov5n.yaml", *, imgsz: int = 64, hyp: DetectionHyp | None = None, **options):
    options = {"box_classes": 3, "image_classes": 4} | options
    return build_model(cfg, imgsz=imgsz, hyp=hyp or DetectionHyp(), **options)


@pytest.fixture
def model() -> YOLOv5WithClassification:
    return small()


@pytest.fixture
def batch() -> Batch:
    stream = torch.Generator().manual_seed(5)
    boxes = torch.tensor(
        [[0, 1, 0.51, 0.48, 0.3, 0.2], [0, 0, 0.2, 0.3, 0.2, 0.3], [2, 2, 0.42, 0.43, 0.25, 0.6]], dtype=torch.float32
    )
    return Batch(torch.rand(3, 3, 64, 64, generator=stream), boxes, torch.tensor([0, 3, 1]))


def trunk_parameters(model: YOLOv5WithClassification) -> dict[str, nn.Parameter]:
    inside = tuple(f"{layer}." for layer in model.trunk)
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(inside)}


def doubled(batch: Batch) -> Batch:
    again = batch.boxes.clone()
    again[:, 0] += len(batch.images)
    return Batch(batch.images.repeat(2, 1, 1, 1), torch.cat((batch.boxes, again)), batch.labels.repeat(2))


# ---- importing


UNDISTURBED = """
import logging, os, random, socket, sys, warnings
from pathlib import Path

def no_network(*args, **kwargs):
    raise AssertionError(f"network: {args}")

import matplotlib, numpy, pandas, torch, cv2
matplotlib.use("svg")
logging.basicConfig(stream=sys.stderr, level=logging.INFO)
cv2.setNumThreads(2)
torch.set_num_threads(2)
numpy.set_printoptions(precision=3)
socket.socket.connect = socket.getaddrinfo = socket.gethostbyname = no_network

def state():
    return {
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "cv2 threads": cv2.getNumThreads(),
        "sys.path": list(sys.path),
        "handlers": [id(handler) for handler in logging.getLogger().handlers],
        "yolov5 handlers": list(logging.getLogger("yolov5").handlers),
        "numpy": str(numpy.get_printoptions()),
        "torch": str(vars(torch._tensor_str.PRINT_OPTS)),
        "pandas": pandas.get_option("display.max_columns"),
        "warnings": list(warnings.filters),
        "plots": (matplotlib.get_backend(), matplotlib.rcParams["font.size"]),
        "home": sorted(str(path) for path in Path.home().rglob("*")),
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(numpy.random.get_state())),
        "muted": [numpy.set_printoptions, torch.set_printoptions, cv2.setNumThreads, matplotlib.use, matplotlib.rc],
        "stubs": [name for name in ("ultralytics", "pkg_resources", "thop") if name in sys.modules],
    }

before = state()
from gradprobe.trainers.models.yolov5 import build_model
assert "yolov5" not in sys.modules, "imported before it was needed"
from gradprobe.trainers.hyp import DetectionHyp
build_model(box_classes=2, image_classes=2, imgsz=64, hyp=DetectionHyp())
assert "yolov5" in sys.modules
changed = {name: (value, now) for (name, value), now in zip(before.items(), state().values()) if value != now}
assert not changed, changed
"""


def test_importing_yolov5_leaves_the_process_and_the_home_as_they_were(tmp_path):
    home, cache = tmp_path / "home", tmp_path / "matplotlib"
    (home / ".config").mkdir(parents=True)
    environment = os.environ | {"HOME": str(home), "MPLCONFIGDIR": str(cache), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", UNDISTURBED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "yolov5" not in done.stderr  # no model summary on the log


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "yolov5", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gradprobe\[yolov5\]'"):
        small()


# ---- choosing a cfg


@pytest.mark.parametrize(
    ("cfg", "last"),
    [
        ("yolov5n.yaml", "model.9.cv2.conv"),
        ("yolov5n", "model.9.cv2.conv"),
        ("yolov5n6.yaml", "model.11.cv2.conv"),
        ("yolov5s-ghost.yaml", "model.9.cv2.conv"),
        ("yolov5s-transformer.yaml", "model.9.cv2.conv"),
    ],
)
def test_the_trunk_ends_in_the_pyramid_of_every_cfg(cfg, last, batch):
    model = small(cfg)
    assert model.last_shared_layer == last
    assert model.trunk == tuple(f"model.{layer}" for layer in range(int(last.split(".")[1]) + 1))
    assert isinstance(model.get_submodule(last), nn.Conv2d)
    large = replace(batch, images=nn.functional.interpolate(batch.images, size=128))
    outputs = model(large.images)
    assert outputs.logits.shape == (3, 4)
    assert all(bool(loss.isfinite()) for loss in model.losses(outputs, large).values())


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        ("yolov5q.yaml", r"unknown model cfg 'yolov5q.yaml'.*yolov5\w\.yaml"),
        ("nowhere/own.yaml", r"unknown model cfg"),
        ("yolov3-tiny.yaml", r"backbone ends in nn.MaxPool2d"),
        ("yolov5-p2.yaml", r"AutoAnchor"),
        ("yolov5n-seg.yaml", r"last layer is Segment"),
    ],
)
def test_an_unfit_cfg_is_refused_with_a_reason(cfg, expected):
    with pytest.raises(UsageError, match=expected):
        small(cfg)


@pytest.fixture
def own_cfg(tmp_path):
    text = (package_folder() / "models" / "yolov5n.yaml").read_text()

    def write(old: str = "", new: str = "") -> str:
        path = tmp_path / "own.yaml"
        path.write_text(text.replace(old, new, 1) if old else text)
        return str(path)

    return write


def test_a_cfg_can_be_a_path(own_cfg):
    wider = small(own_cfg("width_multiple: 0.25", "width_multiple: 0.125"))
    assert wider.get_submodule(wider.last_shared_layer).out_channels == 128


def test_code_in_a_cfg_is_not_run(own_cfg, tmp_path):
    target = tmp_path / "touched"
    cfg = own_cfg("SPPF, [1024, 5]", f"SPPF, [1024, \"open('{target}', 'w')\"]")
    with pytest.raises(UsageError, match="not a plain name"):
        small(cfg)
    assert not target.exists()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("backbone:", "spine:", r"lacks backbone"),
        ("C3, [128]", "C9, [128]", r"cannot build this model: .*C9"),
        ("SPPF, [1024, 5]", "SPPF", r"row 9 of 'backbone'"),
        ("nc: 80", "nc: [", r"cannot be read"),
    ],
)
def test_a_malformed_cfg_is_refused_with_its_path(own_cfg, old, new, expected):
    with pytest.raises(UsageError, match=expected) as caught:
        small(own_cfg(old, new))
    assert "own.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("cfg", "imgsz", "following"), [("yolov5n", 100, 128), ("yolov5n6", 96, 128), ("yolov5n", 0, 32)]
)
def test_an_image_size_off_the_stride_says_the_next(cfg, imgsz, following):
    with pytest.raises(UsageError, match=f"imgsz {imgsz} .* the next is {following}"):
        small(cfg, imgsz=imgsz)


def test_no_classes_are_refused():
    with pytest.raises(UsageError, match="image_classes=0"):
        small(image_classes=0)


# ---- building


def test_parameters_have_yolov5s_names_and_shapes(model):
    names = dict(model.named_parameters())
    assert names["model.0.conv.weight"].shape == (16, 3, 6, 6)
    assert names["classifier.weight"].shape == (4, 256)
    assert {name.split(".")[0] for name in names} == {"model", "classifier"}
    assert (model.box_classes, model.image_classes, model.tasks) == (3, 4, ("det", "cls"))


def test_building_is_deterministic_in_the_seed_and_draws_nothing_from_the_process():
    torch.manual_seed(1)
    stream = torch.get_rng_state()
    first = small(seed=7).state_dict()
    assert torch.equal(stream, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = small(seed=7).state_dict(), small(seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.0.conv.weight"], other["model.0.conv.weight"])
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_the_detector_does_not_depend_on_the_image_classes():
    few, many = small(image_classes=2).state_dict(), small(image_classes=9).state_dict()
    assert all(torch.equal(few[name], many[name]) for name in few if name.startswith("model."))


def test_batchnorm_statistics_start_fresh(model):
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert bool((norm.running_mean == 0).all() and (norm.running_var == 1).all())
        assert norm.num_batches_tracked == 0
        assert (norm.momentum, norm.eps) == (0.03, 1e-3)


def test_an_activation_set_by_one_cfg_does_not_reach_the_next_model():
    package = import_yolov5()
    default = package.Conv.default_act
    leaky, plain, again = small("yolov5s-LeakyReLU.yaml"), small(), small()
    assert isinstance(leaky.model[0].act, nn.LeakyReLU)
    assert isinstance(plain.model[0].act, nn.SiLU)
    assert plain.model[0].act is not again.model[0].act
    assert package.Conv.default_act is default


def test_building_logs_nothing(caplog):
    with caplog.at_level(logging.INFO):
        small()
    assert not [record for record in caplog.records if record.name == "yolov5"]


def test_scaled_gains_are_recorded():
    model = small(box_classes=8, imgsz=160, hyp=DetectionHyp(box=0.1))
    expected = {"box": 0.1, "cls": 0.05, "obj": 0.0625}
    assert {key: model.scaled_hyp[key] for key in expected} == pytest.approx(expected)


# ---- losses


def test_the_parameters_both_losses_reach_are_exactly_the_trunk(model, batch):
    names, parameters = zip(*model.named_parameters(), strict=True)
    losses = model.losses(model(batch.images), batch)
    reached = {}
    for task, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        reached[task] = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    shared = reached["det"] & reached["cls"]
    assert shared == set(trunk_parameters(model))
    assert len(shared) == 99
    assert reached["cls"] - shared == {"classifier.weight", "classifier.bias"}
    assert reached["det"] | reached["cls"] == set(names)


def test_one_forward_serves_both_tasks(model, batch):
    calls = []
    for layer in ("model.0", "model.9", "model.24"):
        model.get_submodule(layer).register_forward_hook(lambda *call, layer=layer: calls.append(layer))
    model(batch.images)
    assert calls == ["model.0", "model.9", "model.24"]
    assert len(model.model[9]._forward_hooks) == 1  # the forward leaves no hook of its own behind


def test_losses_are_scalars_and_do_not_grow_with_the_batch(model, batch):
    model.double().eval()  # in training mode BatchNorm's variance would depend on the batch size
    batch = replace(batch, images=batch.images.double())
    parameters = list(trunk_parameters(model).values())
    once, twice = (model.losses(model(b.images), b) for b in (batch, doubled(batch)))
    for task in model.tasks:
        assert once[task].shape == ()
        torch.testing.assert_close(once[task], twice[task], rtol=1e-12, atol=0)
        for first, second in zip(
            torch.autograd.grad(once[task], parameters, retain_graph=True),
            torch.autograd.grad(twice[task], parameters, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-12)


def test_a_task_of_weight_zero_leaves_the_trunk_bitwise_the_other_tasks_gradient(model, batch):
    parameters = list(trunk_parameters(model).values())
    first = model.losses(model(batch.images), batch)
    alone = torch.autograd.grad(first["det"], parameters)
    second = model.losses(model(batch.images), batch)
    joint = torch.autograd.grad(1.0 * second["det"] + 0.0 * second["cls"], parameters)
    assert all(torch.equal(a, b) for a, b in zip(alone, joint, strict=True))
    assert any(bool(gradient.any()) for gradient in alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_without_boxes_give_a_finite_loss(model, batch, dtype):
    model.to(dtype)
    empty = replace(batch, images=batch.images.to(dtype), boxes=torch.zeros(0, 6))
    loss = model.losses(model(empty.images), empty)["det"]
    loss.backward()
    assert loss.dtype == dtype
    assert bool(loss > 0)
    assert all(bool(p.grad.isfinite().all()) for p in trunk_parameters(model).values())


def test_float64_gives_the_same_losses_and_gradients_as_float32(batch):
    hyp = DetectionHyp(cls_pw=0.7, obj_pw=1.3, fl_gamma=1.5, label_smoothing=0.1)
    results = []
    for dtype in (torch.float32, torch.float64):
        model = small(hyp=hyp).to(dtype)
        losses = model.losses(model(batch.images.to(dtype)), batch)
        gradient = torch.autograd.grad(losses["det"], model.model[24].m[0].weight)[0]
        results.append((losses["det"].double(), losses["cls"].double(), gradient.double()))
    for single, double in zip(*results, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-7)


def test_a_box_on_the_edge_between_cells_matches_the_same_anchors_in_float64(batch):
    edge = replace(batch, boxes=torch.tensor([[0, 1, 0.4, 0.4, 0.1, 0.2]]))  # float32: 0.4 * 20 rounds to 8
    images = nn.functional.interpolate(batch.images, size=160)
    single, double = (small(imgsz=160).to(dtype) for dtype in (torch.float32, torch.float64))
    losses = [m.losses(m(x), edge)["det"].double() for m, x in ((single, images), (double, images.double()))]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("task", "hyp", "with_boxes"),
    [  # the box loss and its objectness target hold part of their graph constant, so they have no such check
        ("det", DetectionHyp(box=0.0, obj=0.0, cls_pw=0.7), True),
        ("det", DetectionHyp(obj_pw=0.7), False),
        ("cls", DetectionHyp(), True),
    ],
)
def test_float64_gradients_equal_finite_differences(batch, task, hyp, with_boxes):
    model = small(hyp=hyp, imgsz=64).double()
    batch = replace(batch, images=batch.images.double(), boxes=batch.boxes if with_boxes else torch.zeros(0, 6))
    weight = model.get_submodule(model.last_shared_layer).weight

    def loss() -> Tensor:
        return model.losses(model(batch.images), batch)[task]

    gradient = torch.autograd.grad(loss(), weight)[0]
    index = divmod(int(gradient.abs().argmax()), weight.shape[1])
    step, values = 1e-5, []
    for offset in (step, -2 * step):
        with torch.no_grad():
            weight[index] += offset
            values.append(loss())
    numeric = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(gradient[index].squeeze(), numeric.squeeze(), rtol=1e-6, atol=0)


def test_losses_in_evaluation_mode_are_those_of_the_raw_maps(model, batch):
    model.eval()
    outputs = model(batch.images)
    raw = outputs._replace(decoded=None)
    assert torch.equal(model.losses(outputs, batch)["det"], model.losses(raw, batch)["det"])


# ---- copying


def test_a_deep_copy_is_independent_and_whole(model, batch):
    twin = copy.deepcopy(model)
    before = model(batch.images).maps[0]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(before, model(batch.images).maps[0])
    outputs = twin(batch.images)
    assert not torch.equal(before, outputs.maps[0])
    losses = twin.losses(outputs, batch)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_survive_a_file(model, batch, tmp_path):
    model(batch.images)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = small(seed=9)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    first, second = (m.eval()(batch.images) for m in (model, other))
    assert torch.equal(first.decoded, second.decoded)
    assert torch.equal(first.logits, second.logits)


def test_evaluation_follows_a_change_of_size_and_of_data_type(model, batch):
    model.eval()
    model(batch.images)
    small_again = nn.functional.interpolate(batch.images, size=96)
    fresh = small().eval()
    assert torch.equal(model(small_again).decoded, fresh(small_again).decoded)
    decoded = model.double()(small_again.double()).decoded
    assert decoded.dtype == torch.float64
    torch.testing.assert_close(decoded.float(), fresh(small_again).decoded, rtol=1e-4, atol=1e-3)


def test_what_is_no_parameter_and_no_buffer_moves_with_the_model(model):
    model.to("meta")
    assert model.model[-1].stride.device.type == "meta"


# ---- detections


def outputs_of(rows: list[list[float]]) -> Outputs:
    return Outputs((torch.zeros(1, 3, 8, 8, 8),), torch.zeros(1, 4), torch.tensor([rows]))


def detected(model: YOLOv5WithClassification, rows: list[list[float]], **options) -> dict[str, list]:
    (found,) = model.detections(outputs_of(rows), **options)
    return {name: [pytest.approx(x, abs=1e-5) for x in value.tolist()] for name, value in found.items()}


def test_an_overlapping_box_of_the_same_class_goes_and_of_another_stays(model):
    rows = [
        [32, 32, 20, 20, 0.9, 1.0, 0, 0],
        [33, 32, 20, 20, 0.8, 1.0, 0, 0],
        [33, 32, 20, 20, 0.7, 0, 1.0, 0],
    ]
    found = detected(model, rows)
    assert found["scores"] == [0.9, 0.7]
    assert found["labels"] == [0, 1]
    assert found["boxes"][0] == [22, 22, 42, 42]


def test_one_location_can_be_detected_in_several_classes(model):
    found = detected(model, [[32, 32, 20, 20, 0.5, 0.8, 0.0, 0.6]])
    assert found["labels"] == [0, 2]
    assert found["scores"] == [0.4, 0.3]


def test_boxes_end_at_the_edge_of_the_image(model):
    assert detected(model, [[60, 4, 20, 20, 0.9, 1, 0, 0]])["boxes"] == [[50, 0, 64, 14]]


def test_the_least_confident_go_first_and_unsure_or_broken_ones_always(model):
    rows = [[10.0 * i, 10, 4, 4, 0.1 + 0.2 * i, 1, 0, 0] for i in range(4)]
    rows += [[32, 32, 9, 9, 0.0009, 1, 0, 0], [float("nan"), 32, 9, 9, 0.9, 1, 0, 0]]
    assert detected(model, rows)["scores"] == [0.7, 0.5, 0.3, 0.1]
    assert detected(model, rows, max_detections=2)["scores"] == [0.7, 0.5]
    assert detected(model, rows, confidence=0.4)["scores"] == [0.7, 0.5]


def test_detections_of_training_outputs_are_refused(model, batch):
    with pytest.raises(UsageError, match=re.escape("model.eval()")):
        model.detections(model(batch.images))


def test_detections_equal_those_of_yolov5(model, batch):
    from yolov5.utils.general import non_max_suppression

    outputs = model.double().eval()(batch.images.double())  # in float32 a tie at the threshold can go either way
    expected = non_max_suppression(outputs.decoded.detach().clone(), 0.001, 0.6, multi_label=True, max_det=300)
    for own, theirs in zip(model.detections(outputs), expected, strict=True):
        assert len(own["scores"]) == len(theirs) > 0
        torch.testing.assert_close(own["scores"], theirs[:, 4])
        torch.testing.assert_close(own["boxes"], theirs[:, :4].clamp(0, 64))


def test_yolov5s_own_losses_have_no_graph_on_a_batch_without_boxes(monkeypatch):
    """box and cls are absent from such a step; obj is trained and measured, and weights end as without a probe."""
    tasks, cat = ("box", "obj", "cls"), torch.cat

    def own_losses(criterion, predictions, boxes):
        found = []

        def heard(tensors, *args, **kwargs):
            found.append(tensors)
            return cat(tensors, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "cat", heard)
            criterion(predictions, boxes)
        return dict(zip(tasks, found[-1], strict=True))

    def train(probed):
        torch.manual_seed(0)
        model = small()._detector[0].train()
        criterion, sink = import_yolov5().ComputeLoss(model), Collector()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        probe = GradientProbe(model, tasks, [sink], every=1, optimizer=optimizer) if probed else None
        for step in range(3):
            images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(step))
            boxes = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.3], [1, 2, 0.4, 0.6, 0.2, 0.3]])
            losses = own_losses(criterion, model(images), boxes if step != 1 else boxes[:0])
            if probe is not None:
                probe.backward(losses)
            else:
                sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        if probe is not None:
            probe.close()
        return model, sink

    (bare, _), (model, sink) = train(False), train(True)
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), model.parameters(), strict=True))
    assert [row.status for row in sink.rows] == [MEASURED, absent(["box", "cls"]), MEASURED]
