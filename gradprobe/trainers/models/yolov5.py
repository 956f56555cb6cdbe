"""YOLOv5 with a classification head: one trunk, two tasks, one forward.

yolov5 (AGPL-3.0) is imported when a model is built, not before.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradprobe.errors import UsageError
from gradprobe.trainers.data.dataset import Batch
from gradprobe.trainers.evaluation import model_kept
from gradprobe.trainers.hyp import DetectionHyp
from gradprobe.trainers.models._import_yolov5 import YOLOv5Package, import_yolov5, package_folder
from gradprobe.trainers.models.cfg import find_cfg, read_cfg, trunk_length

_MAX_CANDIDATES = 30_000  # per image, the most confident ones; bounds time and memory, as in YOLOv5


def _non_maximum_suppression(
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


_build_lock = threading.Lock()


class Outputs(NamedTuple):
    """What one forward gives."""

    maps: tuple[Tensor, ...]
    """Raw detection maps, finest first, each (B, anchors, rows, columns, 5 + box classes)."""
    logits: Tensor
    """Of the image classes, (B, image classes)."""
    decoded: Tensor | None
    """None in training mode. In evaluation mode (B, predictions, 5 + box classes): centre x, centre y, width
    and height in pixels, objectness and class probabilities in [0, 1]."""


class YOLOv5WithClassification(nn.Module):
    """YOLOv5 whose trunk also feeds a classification head.

    The head is a linear layer on the global average pool of the SPPF output.

    Parameters have the names they have in the undivided YOLOv5 (`model.0.conv.weight`), and those of the head
    begin with `classifier`. Made by `build_model`.
    """

    tasks = ("det", "cls")

    def __init__(self, detector: nn.Module, classifier: nn.Linear, trunk_layers: int, hyp: dict[str, float]) -> None:
        super().__init__()
        # In a tuple, so that its parameters are not registered a second time under other names.
        self._detector = (detector,)
        self.model = cast(nn.Sequential, detector.model)
        self.classifier = classifier
        self.scaled_hyp = hyp
        """What the detection loss uses, scaled to this model and image size (`DetectionHyp.scaled`)."""
        self.trunk = tuple(f"model.{layer}" for layer in range(trunk_layers))
        """Names of the layers that both tasks use, in execution order; the last is the SPPF."""
        self.last_shared_layer = _last_convolution(self, self.trunk[-1])
        """Name of the last convolution of the trunk."""
        self.detached = False
        """Whether the classification head learns without sending gradients into the trunk."""

    @property
    def box_classes(self) -> int:
        """How many classes a box can have."""
        return int(self._detect.nc)

    @property
    def image_classes(self) -> int:
        """How many classes an image can have."""
        return self.classifier.out_features

    @property
    def _detect(self) -> Any:
        return self.model[-1]

    def forward(self, images: Tensor) -> Outputs:
        """Both tasks' outputs from one pass.

        Args:
            images: (B, 3, S, S) in [0, 1], S a multiple of the model's largest stride (32; 64 for P6 cfgs).
        """
        shared: list[Tensor] = []
        hook = self._listen(shared)
        try:
            output = self._detector[0](images)
        finally:
            hook.remove()
        decoded, maps = (None, output) if self._detect.training else output
        return Outputs(tuple(maps), self.classify(shared[0]), decoded)

    def _listen(self, kept: list[Tensor]) -> Any:
        """A hook that keeps what :meth:`classify` is to be given: the output of the trunk."""
        return self.get_submodule(self.trunk[-1]).register_forward_hook(lambda *call: kept.append(call[2]))

    def classify(self, features: Tensor) -> Tensor:
        """Logits of the image classes, (B, image classes), from the trunk's output."""
        pooled = features.mean(dim=(2, 3))
        return cast(Tensor, self.classifier(pooled.detach() if self.detached else pooled))

    def trunk_layers(self, imgsz: int) -> tuple[str, ...]:
        """The layers of the trunk that have parameters, in the order in which the forward runs them."""
        # Not above: it imports scipy, which changes the filters of warnings.
        from gradprobe.probes.shared_layers import by_module, find_shared

        below = tuple(f"{block}." for block in self.trunk)
        groups = {name: parameters for name, parameters in by_module(self).items() if f"{name}.".startswith(below)}
        with model_kept(self):
            self.eval()  # moves no running statistics
            image = torch.zeros(1, 3, imgsz, imgsz, device=self.classifier.weight.device)
            loss = cast(Tensor, self(image).logits.sum())
        return tuple(layer.name for layer in find_shared(groups, {"one": loss, "other": loss}).layers)

    def divide(self, doubled: Collection[str]) -> YOLOv5WithClassification:
        """This model with a second copy of some layers for classification; names as :meth:`trunk_layers` gives them.

        Raises:
            UsageError: Nothing to double, or the trunk is no plain chain of blocks.
        """
        return _DividedYOLOv5(self, doubled)

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The unweighted loss of each task, in training and in evaluation mode.

        Returns:
            "det": YOLOv5's detection loss (box + objectness + class, with the gains of `scaled_hyp`), and
            "cls": the cross entropy of the image class. Both are scalars and means: they do not grow with the
            batch, and without any box "det" is the objectness loss alone.
        """
        return {
            "det": self._detection_loss(outputs.maps, batch.boxes),
            "cls": F.cross_entropy(outputs.logits, batch.labels),
        }

    def detections(
        self,
        outputs: Outputs,
        *,
        confidence: float = 0.001,
        iou: float = 0.6,
        max_detections: int = 300,
    ) -> list[dict[str, Tensor]]:
        """Boxes of each image after non-maximum suppression per class, as YOLOv5's val makes them.

        Args:
            outputs: Of a forward in evaluation mode.
            confidence: Objectness, and objectness times class probability, are to be above this.
            iou: Of two boxes of a class that overlap by more, the less confident one goes.
            max_detections: Kept per image.

        Returns:
            For each image `boxes` (N, 4) as x1, y1, x2, y2 in pixels within the image, `scores` (N,) in
            [0, 1], descending, and `labels` (N,) int64. One location can stand there for several classes.

        Raises:
            UsageError: The outputs are those of training mode.
        """
        if outputs.decoded is None:
            raise UsageError("detections need outputs of evaluation mode: call model.eval() before the forward.")
        rows, columns = outputs.maps[0].shape[2:4]
        stride = float(self._detect.stride[0])
        return [
            _non_maximum_suppression(
                predictions,
                size=(columns * stride, rows * stride),
                confidence=confidence,
                iou=iou,
                max_detections=max_detections,
            )
            for predictions in outputs.decoded.detach()
        ]

    def _detection_loss(self, maps: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
        dtype = maps[0].dtype
        # ComputeLoss sums up in the default data type, which would round a float64 model's loss and gradient.
        with _ZerosOf(dtype) if dtype == torch.float64 else nullcontext():
            # Made anew each time, because it keeps references to tensors that .to() replaces.
            criterion = import_yolov5().ComputeLoss(self._detector[0])
            # In float32 always: the anchors a box matches hang on its rounding, and are not to change with the model.
            total, _ = criterion(list(maps), boxes.float())
        return cast(Tensor, total.squeeze(0) / maps[0].shape[0])  # it comes multiplied by the batch size

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> YOLOv5WithClassification:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._detect.stride = fn(self._detect.stride)  # no buffer, so not moved with the others
        # Caches of the last image size; emptied rather than moved, the next forward fills them.
        self._detect.grid = [torch.empty(0) for _ in self._detect.grid]
        self._detect.anchor_grid = [torch.empty(0) for _ in self._detect.grid]
        return self


def build_model(
    cfg: str = "yolov5n.yaml",
    *,
    box_classes: int,
    image_classes: int,
    imgsz: int,
    hyp: DetectionHyp,
    seed: int = 0,
) -> YOLOv5WithClassification:
    """An untrained YOLOv5 with a classification head on its trunk, float32, on the CPU, in training mode.

    The same arguments give the same weights; the detector's do not depend on `image_classes`. Random streams
    of the process are left as they were. Nothing is downloaded.

    Args:
        cfg: Name of a cfg that ships with yolov5, or the path of a yaml.
        box_classes: How many classes a box can have.
        image_classes: How many classes an image can have.
        imgsz: Side of the training images in pixels; the gain of the objectness loss depends on it.
        hyp: Gains of the detection loss, as in a hyp file.
        seed: Of the initial weights.

    Raises:
        MissingExtraError: yolov5 is not installed.
        UsageError: The cfg is unknown or unfit, `imgsz` is not a multiple of the model's largest stride,
            or a number of classes is below 1.
    """
    if min(box_classes, image_classes) < 1:
        raise UsageError(f"box_classes={box_classes} and image_classes={image_classes} are to be at least 1.")
    path = find_cfg(cfg, package_folder() / "models")
    content = read_cfg(path)
    layers = trunk_length(content, path)
    with _seeded(seed):
        detector = _build_detector(content | {"nc": box_classes}, path)
    _check_image_size(imgsz, int(detector.stride.max()), path)
    with _seeded(seed):  # anew: the head's weights are the same whatever the detector drew
        classifier = nn.Linear(_channels(detector.model[layers - 1]), image_classes)
    detector.hyp = hyp.scaled(output_layers=detector.model[-1].nl, box_classes=box_classes, imgsz=imgsz)
    return YOLOv5WithClassification(detector, classifier, layers, detector.hyp)


def _build_detector(content: dict[str, Any], path: Path) -> Any:
    package = import_yolov5()
    with _build_lock, _quiet_and_separate(package):
        try:
            detector = package.DetectionModel(copy.deepcopy(content))
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            NameError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise UsageError(f"{path}: yolov5 cannot build this model: {error}") from error
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()  # the constructor pushed an image of zeros through
    return detector


@contextmanager
def _quiet_and_separate(package: YOLOv5Package) -> Iterator[None]:
    """No model summary on the log, and an activation module that no other model shares or inherits."""
    logger, activation = logging.getLogger("yolov5"), package.Conv.default_act
    level, info = logger.level, package.DetectionModel.info
    logger.setLevel(logging.ERROR)
    package.DetectionModel.info = lambda *args, **kwargs: None  # it would run the model to count operations
    package.Conv.default_act = nn.SiLU()
    try:
        yield
    finally:
        package.Conv.default_act = activation
        package.DetectionModel.info = info
        logger.setLevel(level)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a stream of its own; the process's stream goes on where it was."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        yield


def _check_image_size(imgsz: int, stride: int, path: Path) -> None:
    if imgsz < 1 or imgsz % stride:
        higher = max(1, -(-imgsz // stride)) * stride
        raise UsageError(
            f"imgsz {imgsz} is not a multiple of {stride}, the largest stride of {path.name}; the next is {higher}."
        )


def _channels(pyramid: nn.Module) -> int:
    convolutions = [module for module in pyramid.modules() if isinstance(module, nn.Conv2d)]
    return convolutions[-1].out_channels


def _last_convolution(model: nn.Module, layer: str) -> str:
    modules = model.get_submodule(layer).named_modules(prefix=layer)
    names: list[str] = [name for name, module in modules if isinstance(module, nn.Conv2d)]
    return names[-1]


class _ZerosOf(TorchFunctionMode):
    """Within it, `torch.zeros` without a data type gives this one; for the current thread only."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.zeros:
            kwargs.setdefault("dtype", self.dtype)
        return func(*args, **kwargs)


class _DividedYOLOv5(YOLOv5WithClassification):
    """The reference model, with a second copy of some layers for classification.

    Layers that stay shared are run twice behind the first doubled one, with the same parameters on each task's own
    features and with running statistics of their own. The detector's layers keep their names (``model.3.conv``), so the
    shared layers have in the file the names of the undivided model; the copies are called ``image_trunk.3.conv``.
    """

    def __init__(self, reference: YOLOv5WithClassification, doubled: Collection[str]) -> None:
        blocks = len(reference.trunk)
        super().__init__(reference._detector[0], reference.classifier, blocks, reference.scaled_hyp)
        if not doubled:
            raise UsageError("no layer of the trunk is to be doubled; that is the joint model: --trainer joint")
        self.doubled = tuple(doubled)
        self._first = min(int(name.split(".")[1]) for name in doubled)
        chain = list(self.model)[self._first : blocks]
        if any(getattr(block, "f", -1) != -1 for block in chain):
            raise UsageError("this cfg's trunk is no plain chain of blocks, so its layers cannot be doubled.")
        names = [str(index) for index in range(self._first, blocks)]
        self.image_trunk = nn.Sequential(OrderedDict(zip(names, copy.deepcopy(chain), strict=True)))
        for name in names:
            _share_parameters(
                self.image_trunk.get_submodule(name), self.model.get_submodule(name), f"model.{name}", set(doubled)
            )

    def _listen(self, kept: list[Tensor]) -> Any:
        """Both ways part before the first block with a doubled layer."""
        return self.model[self._first].register_forward_pre_hook(lambda module, arguments: kept.append(arguments[0]))

    def classify(self, features: Tensor) -> Tensor:
        """Logits of the image classes, by the classification's own way through the trunk."""
        return super().classify(self.image_trunk(features))


def _share_parameters(copied: nn.Module, original: nn.Module, prefix: str, doubled: set[str]) -> None:
    for path, module in original.named_modules():
        if (f"{prefix}.{path}" if path else prefix) in doubled:
            continue
        target = copied.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            target.register_parameter(name, parameter)
