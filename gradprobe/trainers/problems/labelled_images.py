"""Images with boxes and an image class, for YOLOv5 with a classification head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradprobe.errors import DataError
from gradprobe.trainers.data import dataset, loading
from gradprobe.trainers.data.dataset import ImageDataset, Loader
from gradprobe.trainers.data.loading import LoadedData
from gradprobe.trainers.evaluation import ImageScores, score
from gradprobe.trainers.hyp import DetectionHyp
from gradprobe.trainers.models.yolov5 import YOLOv5WithClassification, build_model
from gradprobe.trainers.problems import YOLOV5
from gradprobe.trainers.settings import Settings


class YOLOv5:
    """See :class:`gradprobe.trainers.problems.Problem`.

    Args:
        make: Returns the data, see :func:`gradprobe.trainers.data.loading.load_samples`; None: ``--data`` names them.
    """

    kind = YOLOV5

    def __init__(self, make: Callable[[], Any] | None = None) -> None:
        self._make = make

    def load(self, settings: Settings) -> LoadedData:
        """The phantoms, what a data.yaml names, or what a function of the user's returns."""
        if self._make is not None:
            try:
                found = self._make()
            except Exception as error:
                raise DataError(f"--data {settings.data}: {type(error).__name__}: {error}") from error
            return loading.load_samples(found, settings.data, settings.imgsz)
        return loading.load_data(
            settings.data,
            imgsz=settings.imgsz,
            seed=settings.seed,
            skip_bad=settings.skip_bad,
            group_by=settings.group_by,
        )

    def describe(self, data: LoadedData) -> dict[str, Any]:
        """Names and numbers."""
        return {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "box_names": list(data.box_names),
            "image_names": list(data.image_names),
            "train_images": len(data.train),
            "val_images": len(data.val),
            "test_images": len(data.test) if data.test is not None else 0,
            "skipped_images": len(data.skipped),
        }

    def build_model(self, settings: Settings, data: LoadedData, hyp: DetectionHyp) -> YOLOv5WithClassification:
        """As ``--cfg`` says."""
        return build_model(
            settings.cfg,
            box_classes=len(data.box_names),
            image_classes=len(data.image_names),
            imgsz=settings.imgsz,
            hyp=hyp,
            seed=settings.seed,
        )

    def loader(self, split: ImageDataset, batch_size: int, *, seed: int = 0, shuffle: bool = True) -> Loader:
        return dataset.Loader(split, batch_size, seed=seed, shuffle=shuffle)

    def example(self, settings: Settings, data: LoadedData) -> Tensor:
        """A black image."""
        return torch.zeros(1, 3, settings.imgsz, settings.imgsz)

    def score(self, model: Any, loader: Iterable[Any], *, device: Any) -> ImageScores:
        return score(model, loader, device=device)

    def fitness(self, metrics: Mapping[str, float]) -> float:
        """YOLOv5's 0.1 mAP50 + 0.9 mAP50-95, and accuracy, half each."""
        parts = (0.1 * metrics["mAP50"], 0.9 * metrics["mAP50-95"], metrics["accuracy"])
        return sum(part for part in parts if not math.isnan(part)) / 2

    def clusters(self, split: ImageDataset) -> tuple[str, ...]:
        """The clip or patient that ``--group-by`` makes of each image's name or folder."""
        return split.clusters
