"""Scores a model on a held-out split, sample by sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from gradprobe.errors import DataError, UsageError
from gradprobe.rows import TestClusters
from gradprobe.trainers.data.dataset import Batch
from gradprobe.trainers.problems import YOLOV5, SampleScores


def recompute_batchnorm(model: nn.Module, loader: Iterable[Any], *, batches: int | None) -> None:
    """Replace BatchNorm's running statistics by those of the present weights.

    A short run ends with running statistics that lag behind its weights, and evaluation mode then measures
    the lag. This takes the plain average over batches, in training mode and without gradients. Parameters,
    gradients, momenta, modes and random streams are left as they were.

    Args:
        model: Its parameters say to which device batches go.
        loader: Training batches.
        batches: How many of the first to use; None for all.

    Raises:
        UsageError: `batches` is below 1.
        DataError: The loader gives no batch; the statistics are unchanged.
    """
    if batches is not None and batches < 1:
        raise UsageError(f"batches={batches}: recomputing BatchNorm statistics takes at least one batch.")
    device = next(model.parameters()).device
    with model_kept(model, loader):
        images = (batch.to(device).images for batch in itertools.islice(loader, batches))
        first = next(images, None)
        if first is None:
            raise DataError("there is no batch to recompute BatchNorm statistics from; is the training split empty?")
        update_bn(itertools.chain((first,), images), model)


@contextmanager
def model_kept(model: Any, loader: object = None) -> Iterator[None]:
    """Put back the mode of every module and the random streams, those of PyTorch and the loader's own."""
    modes = {module: module.training for module in model.modules()}
    device = next(iter(model.parameters())).device
    generator = getattr(loader, "generator", None)
    drawn = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        with torch.random.fork_rng(devices=(device,) if device.type == "cuda" else ()):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        if drawn is not None:
            cast(torch.Generator, generator).set_state(drawn)


# ---- detection and classification

_Detections = dict[str, Tensor]

METRIC_NAMES = tuple(metric.name for metric in YOLOV5.metrics)
"""The keys of :meth:`ImageScores.metrics`, in order. The first eight are in [0, 1], higher is better."""


@dataclass(frozen=True)
class ImageScores:
    """An evaluation image by image; see :class:`gradprobe.trainers.problems.SampleScores`.

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
        """Every metric of `METRIC_NAMES` over all images or some.

        Returns:
            A value is NaN where it is undefined: detection metrics without a true box, AUROC with one image class
            present, everything without an image; and losses over some images: YOLOv5's is one of a batch.
            mAP is COCO's (101 points, at most 300 detections per image), over classes with a true box.
            precision, recall and f1 are means over those classes at IoU 0.5 and the confidence that maximises f1.
            macro_f1 is the mean over image classes present; auroc that of one class against the rest.
            Losses are unweighted means over the images.
        """
        chosen = range(len(self.found)) if keep is None else keep
        if not len(chosen):
            return dict.fromkeys(METRIC_NAMES, math.nan)
        found, truth = [self.found[i] for i in chosen], [self.truth[i] for i in chosen]
        rows = torch.tensor(list(chosen))
        values = (
            *_average_precision(found, truth),
            *_precision_recall_f1(found, truth),
            *_classification(self.probabilities[rows], self.labels[rows]),
            *(_mean_losses(self.losses) if keep is None else (math.nan, math.nan)),
        )
        return dict(zip(METRIC_NAMES, values, strict=True))


def score(model: Any, loader: Iterable[Batch], *, device: str | torch.device = "cpu") -> ImageScores:
    """An evaluation of all images of `loader`.

    Parameters, gradients, buffers and random streams are untouched, and every module's mode is put back.

    Args:
        model: See :class:`gradprobe.trainers.models.yolov5.YOLOv5WithClassification`; already on `device`.
        loader: Yields batches.
        device: To which batches are moved.
    """
    names: list[str] = []
    found: list[_Detections] = []
    truth: list[_Detections] = []
    probabilities: list[Tensor] = [torch.zeros(0, 1, dtype=torch.float64)]
    labels: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    losses: list[tuple[int, float, float]] = []
    with model_kept(model, loader), torch.no_grad():
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


def _true_boxes(batch: Batch) -> Iterator[_Detections]:
    height, width = batch.images.shape[2:]
    for image in range(len(batch.images)):
        boxes, labels = _boxes_in_pixels(batch.boxes, image, (width, height))
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


def _boxes_in_pixels(boxes: Tensor, image: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The true boxes of one image of a batch.

    Args:
        boxes: (K, 6) rows of image index, class, centre x, centre y, width, height, as fractions of the
            image.
        image: The index of the image in its batch.
        size: Width and height of the image in pixels.

    Returns:
        Boxes (M, 4) as x1, y1, x2, y2 in pixels, and their classes (M,) int64.
    """
    from torchvision.ops import box_convert

    own = boxes[boxes[:, 0] == image]
    width, height = size
    scale = torch.tensor([width, height, width, height], dtype=own.dtype, device=own.device)
    return box_convert(own[:, 2:6] * scale, "cxcywh", "xyxy"), own[:, 1].long()


# ---- precision, recall and F1 of detections, at the confidence where YOLOv5's val reports them

_Array = NDArray[Any]

_GRID = np.linspace(0.0, 1.0, 1000)  # confidences at which the curves are compared
_SMOOTHING = 101  # points of that grid over which F1 is averaged before its maximum is looked for


class _DetectionScores(NamedTuple):
    """Means over the classes that have a true box; all NaN where no class has one."""

    precision: float
    recall: float
    f1: float
    confidence: float
    """The threshold at which the other three were read."""


def box_iou(first: _Array, second: _Array) -> _Array:
    """Intersection over union of boxes (N, 4) and (M, 4), as x1, y1, x2, y2: (N, M) in [0, 1].

    Two boxes without area have 0.
    """
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    overlap = np.prod(np.clip(high - low, 0.0, None), axis=2)
    union = _area(first)[:, None] + _area(second)[None, :] - overlap
    ratio: _Array = np.divide(overlap, union, out=np.zeros_like(overlap, dtype=float), where=union > 0)
    return ratio


def true_positives(
    boxes: _Array, scores: _Array, labels: _Array, true_boxes: _Array, true_labels: _Array, iou: float = 0.5
) -> _Array:
    """Which detections of one image find a true box.

    A detection is compared with the true box of its class that it overlaps most. Of the detections that
    overlap the same true box so, by `iou` or more, the most confident one is right; the others are wrong.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2; any unit, the same as `true_boxes`.
        scores: (N,) confidences.
        labels: (N,) classes.
        true_boxes: (M, 4).
        true_labels: (M,).
        iou: The smallest overlap that counts.

    Returns:
        bool (N,).
    """
    right = np.zeros(len(boxes), dtype=bool)
    if not len(boxes) or not len(true_boxes):
        return right
    overlap = np.where(labels[:, None] == true_labels[None, :], box_iou(boxes, true_boxes), -1.0)
    nearest = overlap.argmax(axis=1)
    by_confidence = np.argsort(-scores, kind="stable")
    candidates = by_confidence[overlap.max(axis=1)[by_confidence] >= iou]
    _, first = np.unique(nearest[candidates], return_index=True)
    right[candidates[first]] = True
    return right


def detection_scores(right: _Array, scores: _Array, labels: _Array, true_labels: _Array) -> _DetectionScores:
    """Precision, recall and F1 over a whole data set, at the confidence that maximises the mean F1.

    As in YOLOv5's val: the curves of each class are interpolated to 1000 confidences, the mean F1 is smoothed
    over a tenth of them, and all three are read where it is highest. A class without any detection has 0 for
    all three; a detection of a class that has no true box counts nowhere.

    Args:
        right: bool (N,), from `true_positives`, of all images together.
        scores: (N,) confidences in [0, 1].
        labels: (N,) classes.
        true_labels: (M,) classes of all true boxes.
    """
    classes, counts = np.unique(true_labels, return_counts=True)
    if not len(classes):
        return _DetectionScores(np.nan, np.nan, np.nan, np.nan)
    curves = [
        _curves(right[labels == label], scores[labels == label], int(count))
        for label, count in zip(classes, counts, strict=True)
    ]
    precision, recall = (np.stack(curve) for curve in zip(*curves, strict=True))
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    best = int(_smoothed(f1.mean(axis=0)).argmax())
    means = [float(curve[:, best].mean()) for curve in (precision, recall, f1)]
    return _DetectionScores(means[0], means[1], means[2], confidence=float(_GRID[best]))


def _curves(right: _Array, scores: _Array, count: int) -> tuple[_Array, _Array]:
    """Precision and recall of one class, were only detections at or above each confidence counted."""
    if not len(scores):
        return np.zeros_like(_GRID), np.zeros_like(_GRID)
    order = np.argsort(-scores, kind="stable")
    found = right[order].cumsum()
    precision, recall = found / np.arange(1, len(found) + 1), found / count
    rising = -scores[order]  # np.interp wants rising abscissas
    # Above the highest score nothing is detected: nothing wrong, nothing found.
    return np.interp(-_GRID, rising, precision, left=1.0), np.interp(-_GRID, rising, recall, left=0.0)


def _smoothed(curve: _Array) -> _Array:
    padded = np.pad(curve, _SMOOTHING // 2, mode="edge")
    return np.convolve(padded, np.full(_SMOOTHING, 1 / _SMOOTHING), mode="valid")


def _area(boxes: _Array) -> _Array:
    area: _Array = np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0.0, None), axis=1)
    return area


# ---- intervals that respect clusters

MOST_GROUPS = 50
"""Clusters that are left out one by one; where there are more, they are put together into so many groups."""

FEWEST_GROUPS = 10
"""Groups, however many images there are."""

MOST_IMAGES = 10_000
"""Images that are looked at again, over all clusters: half a minute of COCO's average precision."""


def leave_out(scores: SampleScores, clusters: Sequence[str]) -> TestClusters | None:
    """The metrics with one cluster of samples left out, for each cluster; None where there are fewer than two.

    Images of one clip or patient resemble each other, so that 200 of them say less than 200 patients would. With K
    clusters and the metric m_k without cluster k, the variance of the metric is about (K - 1) / K * sum (m_k - mean)^2:
    the delete-one-cluster jackknife (Quenouille; Efron and Stein, "The Jackknife Estimate of Variance", 1981).

    Args:
        scores: Of a test split; the model is not asked again.
        clusters: (N,) what each of the samples belongs to.
    """
    order = list(dict.fromkeys(clusters))
    if len(order) < 2:
        return None
    groups = _group_clusters(order, max(FEWEST_GROUPS, min(MOST_GROUPS, MOST_IMAGES // len(clusters))))
    place = {cluster: index for index, group in enumerate(groups) for cluster in group}
    belongs = np.array([place[cluster] for cluster in clusters])
    without = [scores.metrics(np.flatnonzero(belongs != index).tolist()) for index in range(len(groups))]
    return TestClusters(
        tuple(_group_name(group) for group in groups),
        np.bincount(belongs, minlength=len(groups)),
        tuple(without[0]),
        np.array([list(values.values()) for values in without], dtype=np.float64),
    )


def _group_clusters(clusters: Sequence[str], most: int) -> list[tuple[str, ...]]:
    """At most ``most`` groups of whole clusters, as even in number as can be, dealt out in turn.

    >>> _group_clusters(["a", "b", "c", "d", "e"], 2)
    [('a', 'c', 'e'), ('b', 'd')]
    """
    count = min(most, len(clusters))
    return [tuple(clusters[start::count]) for start in range(count)]


def _group_name(group: Sequence[str]) -> str:
    return group[0] if len(group) == 1 else f"{group[0]} and {len(group) - 1} more"
