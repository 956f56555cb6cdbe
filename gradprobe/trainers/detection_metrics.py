"""Precision, recall and F1 of detections, at the confidence where YOLOv5's val reports them; numpy only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_GRID = np.linspace(0.0, 1.0, 1000)  # confidences at which the curves are compared
_SMOOTHING = 101  # points of that grid over which F1 is averaged before its maximum is looked for


class _DetectionScores(NamedTuple):
    """Means over the classes that have a true box; all NaN where no class has one."""

    precision: float
    recall: float
    f1: float
    confidence: float
    """The threshold at which the other three were read."""


def box_iou(first: Array, second: Array) -> Array:
    """Intersection over union of boxes (N, 4) and (M, 4), as x1, y1, x2, y2: (N, M) in [0, 1].

    Two boxes without area have 0.
    """
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    overlap = np.prod(np.clip(high - low, 0.0, None), axis=2)
    union = _area(first)[:, None] + _area(second)[None, :] - overlap
    ratio: Array = np.divide(overlap, union, out=np.zeros_like(overlap, dtype=float), where=union > 0)
    return ratio


def true_positives(
    boxes: Array, scores: Array, labels: Array, true_boxes: Array, true_labels: Array, iou: float = 0.5
) -> Array:
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


def detection_scores(right: Array, scores: Array, labels: Array, true_labels: Array) -> _DetectionScores:
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


def _curves(right: Array, scores: Array, count: int) -> tuple[Array, Array]:
    """Precision and recall of one class, were only detections at or above each confidence counted."""
    if not len(scores):
        return np.zeros_like(_GRID), np.zeros_like(_GRID)
    order = np.argsort(-scores, kind="stable")
    found = right[order].cumsum()
    precision, recall = found / np.arange(1, len(found) + 1), found / count
    rising = -scores[order]  # np.interp wants rising abscissas
    # Above the highest score nothing is detected: nothing wrong, nothing found.
    return np.interp(-_GRID, rising, precision, left=1.0), np.interp(-_GRID, rising, recall, left=0.0)


def _smoothed(curve: Array) -> Array:
    padded = np.pad(curve, _SMOOTHING // 2, mode="edge")
    return np.convolve(padded, np.full(_SMOOTHING, 1 / _SMOOTHING), mode="valid")


def _area(boxes: Array) -> Array:
    area: Array = np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0.0, None), axis=1)
    return area
