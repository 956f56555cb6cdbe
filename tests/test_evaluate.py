from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradprobe.errors import DataError, UsageError
from gradprobe.trainers.evaluation import (
    METRIC_NAMES,
    box_iou,
    detection_scores,
    recompute_batchnorm,
    score,
    true_positives,
)
from gradprobe.trainers.hyp import DetectionHyp
from gradprobe.trainers.models import _import_yolov5
from gradprobe.trainers.models.yolov5 import build_model


def evaluate(model, loader):
    return score(model, loader).metrics()


@dataclass(frozen=True)
class Batch:
    images: Tensor
    boxes: Tensor
    labels: Tensor

    def to(self, device: object) -> Batch:
        return replace(self, images=self.images.to(device), boxes=self.boxes.to(device), labels=self.labels.to(device))


def random_batch(seed: int, size: int = 4, classes: int = 3) -> Batch:
    stream = torch.Generator().manual_seed(seed)
    centres = torch.rand(size, 2, generator=stream) * 0.4 + 0.3
    sides = torch.rand(size, 2, generator=stream) * 0.3 + 0.1
    kinds = torch.randint(classes, (size, 1), generator=stream).float()
    boxes = torch.cat((torch.arange(size)[:, None], kinds, centres, sides), dim=1)
    images = torch.rand(size, 3, 64, 64, generator=stream)
    return Batch(images, boxes, torch.randint(classes, (size,), generator=stream))


@pytest.fixture
def model():
    return build_model(box_classes=3, image_classes=3, imgsz=64, hyp=DetectionHyp())


class Oracle(nn.Module):
    """Answers what it was told to, image by image; `shift` moves its boxes by so many pixels."""

    def __init__(self, batches: list[Batch], *, shift: float = 0.0, confidence: float = 0.9) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.batches, self.shift, self.confidence = batches, shift, confidence
        self.seen = 0

    def forward(self, images: Tensor) -> SimpleNamespace:
        batch = self.batches[self.seen]
        self.seen += 1
        return SimpleNamespace(batch=batch, logits=20 * nn.functional.one_hot(batch.labels, 3).float())

    def losses(self, outputs: SimpleNamespace, batch: Batch) -> dict[str, Tensor]:
        return {"det": torch.tensor(float(self.seen)), "cls": torch.tensor(0.5)}

    def detections(self, outputs: SimpleNamespace) -> list[dict[str, Tensor]]:
        batch, found = outputs.batch, []
        side = batch.images.shape[-1]
        for image in range(len(batch.images)):
            own = batch.boxes[batch.boxes[:, 0] == image]
            centre, half = own[:, 2:4] * side, own[:, 4:6] * side / 2
            boxes = torch.cat((centre - half, centre + half), dim=1) + self.shift
            scores = torch.full((len(own),), self.confidence)
            found.append({"boxes": boxes, "scores": scores, "labels": own[:, 1].long()})
        return found


def test_a_perfect_model_scores_one_in_everything():
    batches = [random_batch(seed) for seed in range(4)]
    scores = evaluate(Oracle(batches), batches)
    assert tuple(scores) == METRIC_NAMES
    assert [scores[name] for name in METRIC_NAMES[:8]] == pytest.approx([1.0] * 8)


def test_boxes_are_compared_in_pixels():
    batch = random_batch(0, size=1)
    batch.boxes[:, 2:] = torch.tensor([0.5, 0.5, 0.25, 0.25])  # 16 pixels wide
    overlapping = evaluate(Oracle([batch], shift=2.0), [batch])  # IoU 196 / 316
    assert overlapping["mAP50"] == pytest.approx(1.0)
    assert overlapping["mAP50-95"] == pytest.approx(0.3)  # right at IoU .50, .55 and .60
    assert overlapping["f1"] == pytest.approx(1.0)
    missed = evaluate(Oracle([batch], shift=6.0), [batch])
    assert missed["mAP50"] == missed["precision"] == missed["recall"] == missed["f1"] == 0.0


def test_losses_are_means_over_images_not_over_batches():
    batches = [random_batch(0, size=3), random_batch(1, size=1)]
    assert evaluate(Oracle(batches), batches)["loss_det"] == pytest.approx((3 * 1.0 + 1 * 2.0) / 4)


def test_more_than_a_hundred_detections_count_up_to_three_hundred():
    batch = random_batch(0, size=1)
    batch.boxes[:, 2:] = torch.tensor([0.5, 0.5, 0.25, 0.25])

    class Late(Oracle):
        def detections(self, outputs):
            right = super().detections(outputs)[0]
            wrong = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(150, 1)
            return [
                {
                    "boxes": torch.cat((wrong, right["boxes"])),
                    "scores": torch.linspace(0.9, 0.1, 151),
                    "labels": right["labels"].repeat(151),
                }
            ]

    assert evaluate(Late([batch]), [batch])["mAP50"] > 0


def test_undefined_metrics_are_nan_without_a_warning():
    batch = random_batch(0)
    empty = replace(batch, boxes=torch.zeros(0, 6), labels=torch.ones(4, dtype=torch.int64))
    scores = evaluate(Oracle([empty]), [empty])
    for name in ("mAP50", "mAP50-95", "precision", "recall", "f1", "auroc"):
        assert math.isnan(scores[name]), name
    assert scores["accuracy"] == scores["macro_f1"] == 1.0
    assert all(math.isnan(value) for value in evaluate(Oracle([]), []).values())


def test_nothing_detected_scores_zero():
    batch = random_batch(0)

    class Blind(Oracle):
        def detections(self, outputs):
            empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
            return [empty] * len(outputs.batch.images)

    scores = evaluate(Blind([batch]), [batch])
    assert scores["mAP50"] == scores["precision"] == scores["recall"] == scores["f1"] == 0.0


def test_classification_by_hand():
    batch = replace(random_batch(0), labels=torch.tensor([0, 0, 1, 1]))

    class Fixed(Oracle):
        def forward(self, images):
            probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.4, 0.5, 0.1], [0.1, 0.1, 0.8]])
            return SimpleNamespace(batch=batch, logits=probabilities.log())

    scores = evaluate(Fixed([batch]), [batch])
    assert scores["accuracy"] == pytest.approx(0.5)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)  # class 2 is in no image
    assert scores["auroc"] == pytest.approx((3 / 4 + 1 / 4) / 2)


def test_auroc_sees_differences_beyond_float32():
    batch = replace(random_batch(0, size=3), labels=torch.tensor([0, 0, 1]))

    class Confident(Oracle):
        def forward(self, images):
            logits = torch.tensor([[30.0, 0, 0], [30, 0, 0], [20, 0, 0]])  # the wrong one is the least sure
            return SimpleNamespace(batch=batch, logits=logits)

    assert evaluate(Confident([batch]), [batch])["auroc"] == 1.0


def test_a_model_that_diverged_gives_nan_for_classification():
    batch = random_batch(0)

    class Diverged(Oracle):
        def forward(self, images):
            return SimpleNamespace(batch=batch, logits=torch.full((4, 3), math.nan))

    assert math.isnan(evaluate(Diverged([batch]), [batch])["accuracy"])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def shuffled(batches: list[Batch], generator: torch.Generator | None = None) -> DataLoader:
    return DataLoader(batches, batch_size=None, shuffle=True, generator=generator)


def test_evaluation_leaves_the_model_and_the_random_streams_alone(model):
    batches = [random_batch(0), random_batch(1)]
    model.model[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    own = torch.Generator().manual_seed(3)
    before, stream, drawn = state_of(model), torch.get_rng_state(), own.get_state()
    for loader in (shuffled(batches), shuffled(batches, own)):
        scores = evaluate(model, loader)
    assert all(math.isfinite(value) for value in scores.values())
    assert_same(before, state_of(model))
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert model.training
    assert not model.model[0].training
    assert torch.equal(stream, torch.get_rng_state())
    assert torch.equal(drawn, own.get_state())


def test_evaluating_twice_gives_the_same_numbers(model):
    batches = [random_batch(0), random_batch(1)]
    assert evaluate(model, batches) == evaluate(model, batches)


def test_recomputed_statistics_are_the_plain_average_over_the_first_batches(model):
    batches = [random_batch(seed) for seed in range(3)]
    first = model.model[0]
    outputs = [first.conv(batch.images) for batch in batches[:2]]
    recompute_batchnorm(model, batches, batches=2)
    mean = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    variance = torch.stack([output.var(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    torch.testing.assert_close(first.bn.running_mean, mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.bn.running_var, variance, rtol=1e-4, atol=1e-6)


def test_recomputing_changes_nothing_but_the_statistics(model):
    model.eval()
    model.model[0].train()
    before, stream = state_of(model), torch.get_rng_state()
    recompute_batchnorm(model, shuffled([random_batch(0), random_batch(1)]), batches=None)
    after = state_of(model)
    assert {name.rsplit(".", 1)[1] for name in before if not torch.equal(before[name], after[name])} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert model.model[0].training
    assert torch.equal(stream, torch.get_rng_state())
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.03}


def test_recomputing_from_nothing_is_refused_and_keeps_the_statistics(model):
    before = state_of(model)
    with pytest.raises(DataError, match="no batch"):
        recompute_batchnorm(model, [], batches=None)
    with pytest.raises(UsageError, match="batches=0"):
        recompute_batchnorm(model, [random_batch(0)], batches=0)
    assert_same(before, state_of(model))


def test_iou_by_hand():
    first = np.array([[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    second = np.array([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_allclose(box_iou(first, second), [[1 / 7, 1.0, 0.0], [0.0, 0.0, 0.0]])


def test_the_more_confident_of_two_detections_of_one_box_is_right():
    truth = np.array([[0.0, 0.0, 10.0, 10.0]])
    boxes = np.array([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0]])
    right = true_positives(boxes, np.array([0.4, 0.8]), np.array([0, 0]), truth, np.array([0]))
    assert right.tolist() == [False, True]


def test_a_box_of_another_class_is_no_match():
    box = np.array([[0.0, 0.0, 10.0, 10.0]])
    assert true_positives(box, np.array([0.9]), np.array([1]), box, np.array([0])).tolist() == [False]


def test_an_overlap_of_exactly_the_threshold_counts():
    truth, box = np.array([[0.0, 0.0, 10.0, 10.0]]), np.array([[0.0, 0.0, 10.0, 5.0]])
    assert true_positives(box, np.array([0.9]), np.array([0]), truth, np.array([0])).tolist() == [True]


def test_the_confidence_is_where_f1_is_best():
    right = np.array([True, True] + [False] * 8)
    scores = detection_scores(right, np.array([0.9, 0.9] + [0.1] * 8), np.zeros(10), np.zeros(2))
    assert scores[:3] == pytest.approx((1.0, 1.0, 1.0), abs=0.03)  # precision is 0.2 at the lowest confidence
    assert 0.1 < scores.confidence <= 0.9


def test_a_class_never_detected_counts_as_zero_and_an_absent_one_not_at_all():
    right, scores = np.array([True, False]), np.array([0.9, 0.8])
    result = detection_scores(right, scores, np.array([0, 7]), np.array([0, 1]))
    assert result[:3] == (0.5, 0.5, 0.5)


def random_detections(seed: int, count: int = 300):
    rng = np.random.default_rng(seed)
    labels, truth = rng.integers(0, 4, count), rng.integers(0, 3, 120)
    scores = rng.permutation(np.linspace(0.001, 0.95, count))
    return rng.random(count) < 0.2 + 0.5 * scores, scores, labels, truth


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_those_of_yolov5(seed, monkeypatch):
    _import_yolov5.import_yolov5()
    from yolov5.utils.metrics import ap_per_class

    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)  # gone from numpy 2.4
    right, scores, labels, truth = random_detections(seed)
    _, _, precision, recall, f1, _, _ = ap_per_class(right[:, None], scores, labels, truth, names={})
    own = detection_scores(right, scores, labels, truth)
    assert own[:3] == pytest.approx((precision.mean(), recall.mean(), f1.mean()), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_matches_equal_those_of_yolov5(seed):
    _import_yolov5.import_yolov5()
    with _import_yolov5._environment_and_path_kept():
        from yolov5.val import process_batch

    rng = np.random.default_rng(seed)
    truth = np.concatenate([(low := rng.random((20, 2)) * 50), low + 10 + rng.random((20, 2)) * 20], axis=1)
    true_labels = rng.integers(0, 2, 20)
    origin = rng.integers(0, 20, 80)
    boxes = truth[origin] + rng.normal(0, 2, (80, 4))
    scores, labels = np.sort(rng.random(80))[::-1], true_labels[origin]
    detections = torch.tensor(np.concatenate([boxes, scores[:, None], labels[:, None]], axis=1))
    answers = torch.tensor(np.concatenate([true_labels[:, None], truth], axis=1))
    expected = process_batch(detections, answers, torch.tensor([0.5]))[:, 0].numpy()
    own = true_positives(boxes, scores, labels, truth, true_labels)
    assert own.tolist() == expected.tolist()
    assert 0 < own.sum() < 80
