"""Scores a detection + classification model on a held-out split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradprobe.trainers.detection_metrics import detection_scores, true_positives
from gradprobe.trainers.models.detections import boxes_in_pixels
from gradprobe.trainers.models.protocols import BatchLike, DetectorClassifier
from gradprobe.trainers.problems import YOLOV5
from gradprobe.trainers.running_statistics import left_as_it_was

_Detections = dict[str, Tensor]

METRICS = tuple(metric.name for metric in YOLOV5.metrics)
"""The keys of what `evaluate` returns, in order. The first eight are in [0, 1], higher is better."""


def evaluate(
    model: DetectorClassifier, loader: Iterable[BatchLike], *, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Every metric of `METRICS` on all images of `loader`.

    Parameters, gradients, buffers and random streams are untouched, and every module's mode is put back.

    Args:
        model: Already on `device`.
        loader: Yields batches.
        device: To which batches are moved.

    Returns:
        A value is NaN where it is undefined: detection metrics without a true box, AUROC with one image class
        present, everything on an empty loader.
        mAP is COCO's (101 points, at most 300 detections per image), over classes with a true box.
        precision, recall and f1 are means over those classes at IoU 0.5 and the confidence that maximises f1.
        macro_f1 is the mean over image classes present; auroc that of one class against the rest.
        Losses are unweighted means over the images.
    """
    return score(model, loader, device=device).metrics()


@dataclass(frozen=True)
class ImageScores:
    """An evaluation image by image; see :class:`gradprobe.trainers.problems.Scores`.

    Attributes:
        names: (N,) file names; numbers where the batches have none.
        found, truth: (N,) boxes.
        probabilities: (N, classes), float64, rows that sum to 1.
        labels: (N,).
        losses: Images, "det" and "cls" of each batch.
    """

    names: tuple[str, ...]
    found: list[_Detections]
    truth: list[_Detections]
    probabilities: Tensor
    labels: Tensor
    losses: list[tuple[int, float, float]]

    def metrics(self, keep: Sequence[int] | None = None) -> dict[str, float]:
        """Every metric of `METRICS` over all images or some.

        The losses are NaN over some: YOLOv5's is one of a batch, and not a mean over its images.
        """
        chosen = range(len(self.found)) if keep is None else keep
        if not len(chosen):
            return dict.fromkeys(METRICS, math.nan)
        found, truth = [self.found[i] for i in chosen], [self.truth[i] for i in chosen]
        rows = torch.tensor(list(chosen))
        values = (
            *_average_precision(found, truth),
            *_precision_recall_f1(found, truth),
            *_classification(self.probabilities[rows], self.labels[rows]),
            *(_mean_losses(self.losses) if keep is None else (math.nan, math.nan)),
        )
        return dict(zip(METRICS, values, strict=True))


def score(model: DetectorClassifier, loader: Iterable[BatchLike], *, device: str | torch.device = "cpu") -> ImageScores:
    """All that `evaluate` sums up, which see."""
    names: list[str] = []
    found: list[_Detections] = []
    truth: list[_Detections] = []
    probabilities: list[Tensor] = [torch.zeros(0, 1, dtype=torch.float64)]
    labels: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    losses: list[tuple[int, float, float]] = []
    with left_as_it_was(model, loader), torch.no_grad():
        model.eval()
        for batch in loader:
            batch = batch.to(device)
            outputs = model(batch.images)
            loss = model.losses(outputs, batch)
            losses.append((len(batch.images), float(loss["det"]), float(loss["cls"])))
            names += getattr(batch, "names", map(str, range(len(found), len(found) + len(batch.images))))
            found += [_on_cpu(image) for image in model.detections(outputs)]
            truth += [_on_cpu(image) for image in _true_boxes(batch)]
            # float64: in float32 a confident model's probabilities saturate, and AUROC would see ties
            probabilities.append(outputs.logits.double().softmax(dim=1).cpu())
            labels.append(batch.labels.cpu())
    if found:
        del probabilities[0]  # of another number of classes
    return ImageScores(tuple(names), found, truth, torch.cat(probabilities), torch.cat(labels), losses)


def _true_boxes(batch: BatchLike) -> Iterator[_Detections]:
    height, width = batch.images.shape[2:]
    for image in range(len(batch.images)):
        boxes, labels = boxes_in_pixels(batch.boxes, image, (width, height))
        yield {"boxes": boxes, "labels": labels}


def _on_cpu(tensors: _Detections) -> _Detections:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _average_precision(found: list[_Detections], truth: list[_Detections]) -> tuple[float, float]:
    """mAP at IoU 0.5, and averaged over IoU 0.5 to 0.95."""
    from torchmetrics.detection import MeanAveragePrecision

    if not any(len(image["labels"]) for image in truth):
        return math.nan, math.nan
    metric = MeanAveragePrecision(
        box_format="xyxy",
        backend="faster_coco_eval",
        max_detection_thresholds=[1, 10, 300],
        sync_on_compute=False,  # one of several processes evaluates all images, and would wait for the others
    )
    metric.warn_on_many_detections = False
    metric.update(found, truth)
    result = metric.compute()
    return float(result["map_50"]), float(result["map"])


def _precision_recall_f1(found: list[_Detections], truth: list[_Detections]) -> tuple[float, float, float]:
    right = [
        true_positives(
            image["boxes"].numpy(),
            image["scores"].numpy(),
            image["labels"].numpy(),
            true["boxes"].numpy(),
            true["labels"].numpy(),
        )
        for image, true in zip(found, truth, strict=True)
    ]
    scores = detection_scores(
        np.concatenate(right),
        torch.cat([image["scores"] for image in found]).numpy(),
        torch.cat([image["labels"] for image in found]).numpy(),
        torch.cat([image["labels"] for image in truth]).numpy(),
    )
    return scores.precision, scores.recall, scores.f1


def _classification(probabilities: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Accuracy, macro F1 over classes present, and macro AUROC over classes present.

    Args:
        probabilities: (N, classes), rows that sum to 1.
        labels: (N,).
    """
    from torchmetrics.functional.classification import (
        binary_auroc,
        multiclass_accuracy,
        multiclass_f1_score,
    )

    if not probabilities.isfinite().all():  # a model that diverged has no ranking and no best class
        return math.nan, math.nan, math.nan
    present = np.unique(labels.numpy()).tolist()
    classes = max(2, probabilities.shape[1])
    predicted = probabilities.argmax(dim=1)
    accuracy = multiclass_accuracy(predicted, labels, num_classes=classes, average="micro")
    f1 = multiclass_f1_score(predicted, labels, num_classes=classes, average="none")
    auroc = math.nan  # one class against the rest, and there is no rest
    if len(present) > 1:
        auroc = float(np.mean([float(binary_auroc(probabilities[:, c], (labels == c).long())) for c in present]))
    return float(accuracy), float(f1[present].mean()), auroc


def _mean_losses(losses: list[tuple[int, float, float]]) -> tuple[float, float]:
    images, det, cls = np.array(losses).T
    return float(images @ det / images.sum()), float(images @ cls / images.sum())
