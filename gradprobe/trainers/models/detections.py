"""From decoded predictions to detections."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_CANDIDATES = 30_000  # per image, the most confident ones; bounds time and memory, as in YOLOv5


def non_maximum_suppression(
    predictions: Tensor,
    *,
    size: tuple[float, float],
    confidence: float,
    iou: float,
    max_detections: int,
) -> dict[str, Tensor]:
    """The detections of one image, suppressed per class, without any limit of time.

    Args:
        predictions: (N, 5 + classes): centre x, centre y, width and height in pixels, objectness, class
            probabilities. A row that is not finite is left out.
        size: Width and height of the image in pixels, to which boxes are clipped.
        confidence: Objectness, and objectness times class probability, are to be above this.
        iou: Of two boxes of a class that overlap by more, the less confident one goes.
        max_detections: How many are kept, most confident first.

    Returns:
        `boxes` (M, 4) as x1, y1, x2, y2, `scores` (M,) descending, `labels` (M,) int64; a prediction that is
        confident in several classes gives a detection for each.
    """
    from torchvision.ops import batched_nms, box_convert, clip_boxes_to_image

    usable = (predictions[:, 4] > confidence) & predictions.isfinite().all(dim=1)
    predictions = predictions[usable]
    class_scores = predictions[:, 5:] * predictions[:, 4:5]
    row, labels = (class_scores > confidence).nonzero(as_tuple=True)
    scores, order = class_scores[row, labels].sort(descending=True, stable=True)
    scores, order = scores[:_MAX_CANDIDATES], order[:_MAX_CANDIDATES]
    labels = labels[order]
    boxes = box_convert(predictions[row[order], :4], "cxcywh", "xyxy")
    kept = batched_nms(boxes, scores, labels, iou)[:max_detections]
    width, height = size
    clipped = clip_boxes_to_image(boxes[kept], (int(height), int(width)))
    return {"boxes": clipped, "scores": scores[kept], "labels": labels[kept]}


def boxes_in_pixels(boxes: Tensor, image: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
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
