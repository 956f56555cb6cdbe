"""What a model asks of a batch, and what evaluation asks of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class BatchLike(Protocol):
    """Images with their boxes and their class; `gradprobe.trainers.data.Batch` is one."""

    @property
    def images(self) -> Tensor:
        """Floating point, shape (B, 3, S, S), in [0, 1]."""

    @property
    def boxes(self) -> Tensor:
        """Floating point, shape (K, 6): image index in the batch, class, centre x, centre y, width, height.

        Coordinates are fractions of the image. K is 0 where no image of the batch has a box.
        """

    @property
    def labels(self) -> Tensor:
        """The class of each image, int64, shape (B,)."""

    def to(self, device: str | torch.device) -> BatchLike:
        """The same batch on another device."""


class DetectorClassifier(Protocol):
    """A `torch.nn.Module` with a detection and a classification task, as `evaluate` uses it."""

    def __call__(self, images: Tensor) -> Any:
        """Outputs, with the image logits, shape (B, classes), as their attribute `logits`."""

    def losses(self, outputs: Any, batch: BatchLike) -> Mapping[str, Tensor]:
        """The loss of the tasks "det" and "cls", each a scalar mean over the batch."""

    def detections(self, outputs: Any) -> list[dict[str, Tensor]]:
        """For each image `boxes` (N, 4) xyxy in pixels, `scores` (N,) and `labels` (N,), best first."""

    def modules(self) -> Any:
        """Every module, as `torch.nn.Module.modules` gives them."""

    def parameters(self) -> Any:
        """Every parameter, as `torch.nn.Module.parameters` gives them."""

    def eval(self) -> Any:
        """Switch to evaluation mode, as `torch.nn.Module.eval` does."""
