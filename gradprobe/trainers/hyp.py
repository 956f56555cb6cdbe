"""Hyper-parameters of YOLOv5: the gains of its detection loss, and the files that hold them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gradprobe.errors import UsageError

if TYPE_CHECKING:
    from yaml.nodes import Node

__all__ = ["DetectionHyp", "HypFile", "read_hyp"]


_OPTIMIZER_KEYS = ("lr0", "lrf", "momentum", "weight_decay")
"""Learning rate, its final fraction, momentum (beta1 of Adam) and weight decay."""

_NEEDS = {
    "warmup_epochs": None,
    "warmup_momentum": "warmup_epochs",
    "warmup_bias_lr": "warmup_epochs",
    "anchors": None,
    "hsv_h": None,
    "hsv_s": None,
    "hsv_v": None,
    "degrees": None,
    "translate": None,
    "scale": None,
    "shear": None,
    "perspective": None,
    "flipud": None,
    "fliplr": None,
    "mosaic": None,
    "mixup": "mosaic",
    "copy_paste": "mosaic",
}
"""Keys that are not acted on here, each with the key without which it does nothing in YOLOv5 either."""

_WITHOUT_EFFECT = ("iou_t",)  # stands in YOLOv5's files, and its code no longer reads it


@dataclass(frozen=True)
class DetectionHyp:
    """Gains and settings of YOLOv5's detection loss, as its hyp files hold them (not yet scaled).

    Raises:
        UsageError: A value is negative or not finite, `label_smoothing` is above 1, or `anchor_t` is not
            above 1.
    """

    box: float = 0.05
    """Gain of the box loss (1 - CIoU)."""
    cls: float = 0.5
    """Gain of the loss of the box classes."""
    obj: float = 1.0
    """Gain of the objectness loss."""
    cls_pw: float = 1.0
    """Weight of positives in the class loss."""
    obj_pw: float = 1.0
    """Weight of positives in the objectness loss."""
    anchor_t: float = 4.0
    """A box goes to the anchors whose width and height differ from its own by less than this factor."""
    fl_gamma: float = 0.0
    """Exponent of the focal loss; 0 turns it off."""
    label_smoothing: float = 0.0
    """Fraction in [0, 1] by which the targets of the box classes are smoothed."""

    def __post_init__(self) -> None:
        for key, value in dataclasses.asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"hyper-parameter {key} is {value}; it is to be a finite number, 0 or above.")
        if self.label_smoothing > 1:
            raise UsageError(f"hyper-parameter label_smoothing is {self.label_smoothing}; it is to be at most 1.")
        if self.anchor_t <= 1:
            raise UsageError(f"hyper-parameter anchor_t is {self.anchor_t}; it is to be above 1, for a box to match.")

    def scaled(self, *, output_layers: int, box_classes: int, imgsz: int) -> dict[str, float]:
        """The values the loss uses: YOLOv5 scales the gains to the model and the image size when it trains.

        Args:
            output_layers: How many detection maps the model has (3 for yolov5n).
            box_classes: How many classes a box can have.
            imgsz: Side of the training images in pixels.

        Returns:
            Every field by name. box, cls and obj are multiplied by 3 / output_layers, cls by box_classes / 80
            and obj by (imgsz / 640)^2 as well; the others are unchanged.
        """
        per_layer = 3 / output_layers
        return dataclasses.asdict(self) | {
            "box": self.box * per_layer,
            "cls": self.cls * box_classes / 80 * per_layer,
            "obj": self.obj * (imgsz / 640) ** 2 * per_layer,
        }


LOSS_KEYS = tuple(f.name for f in dataclasses.fields(DetectionHyp))
_KNOWN_KEYS = (*LOSS_KEYS, *_OPTIMIZER_KEYS, *_NEEDS, *_WITHOUT_EFFECT)
"""Every key that may stand in a hyp file."""


@dataclass(frozen=True)
class HypFile:
    """What a hyp file says.

    A key that the file leaves out is at YOLOv5's published default in `loss` and absent from `optimizer`.
    """

    loss: DetectionHyp = DetectionHyp()
    optimizer: dict[str, float] = field(default_factory=dict)
    """The `_OPTIMIZER_KEYS` that stand in the file."""
    ignored: tuple[str, ...] = ()
    """Keys whose value would change training under YOLOv5 and changes nothing here, in the file's order."""


def read_hyp(path: str | Path) -> HypFile:
    """Read a YOLOv5 hyp yaml.

    Augmentation and warm-up stay off whatever the file says: they draw from random streams and couple the
    tasks. What the file asks for in vain stands in `ignored`.

    Raises:
        UsageError: The file is missing or malformed, a key is unknown or stands twice, or a value is not a
            finite number that is 0 or above. Says the file, the line and what was expected.
    """
    path = Path(path)
    values = {key: _number(path, key, node) for key, node in _entries(path).items()}
    try:
        loss = DetectionHyp(**{key: values[key] for key in LOSS_KEYS if key in values})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return HypFile(
        loss=loss,
        optimizer={key: values[key] for key in _OPTIMIZER_KEYS if key in values},
        ignored=tuple(key for key in values if _would_act(key, values)),
    )


def _would_act(key: str, values: dict[str, float]) -> bool:
    if key not in _NEEDS or values[key] == 0:
        return False
    needed = _NEEDS[key]
    return needed is None or values.get(needed, 0) > 0


def _entries(path: Path) -> dict[str, Node]:
    """The value of every key, with its place in the file."""
    import yaml

    from gradprobe.trainers.yaml_file import compose, yaml_problem

    try:
        _, root = compose(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}. Give the path of a YOLOv5 hyp yaml.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        line, problem = yaml_problem(error)
        raise UsageError(f"{path}{f', line {line}' if line else ''}: not a yaml file: {problem}.") from None
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}, line 1: expected lines of the form 'lr0: 0.01'.")
    _check_keys(path, root.value)
    return {key.value: value for key, value in root.value}


def _check_keys(path: Path, pairs: list[tuple[Node, Node]]) -> None:
    unknown: list[str] = []
    seen: dict[str, int] = {}
    for node, _ in pairs:
        key, line = str(node.value), node.start_mark.line + 1
        if key in seen:
            raise UsageError(f"{path}, line {line}: {key!r} stands on line {seen[key]} already; remove one of them.")
        seen[key] = line
        if key not in _KNOWN_KEYS:
            near = difflib.get_close_matches(key, _KNOWN_KEYS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            unknown.append(f"{key!r} (line {line}{hint})")
    if unknown:
        raise UsageError(f"{path}: unknown hyper-parameters: {', '.join(unknown)}. Correct or remove them.")


def _number(path: Path, key: str, node: Node) -> float:
    line = node.start_mark.line + 1
    try:  # float and not yaml's own type: to yaml 1.1, which YOLOv5 reads, "1e-3" is a word
        value = float(node.value)
    except (TypeError, ValueError):
        shown = repr(node.value) if isinstance(node.value, str) else "a list or a map"
        raise UsageError(f"{path}, line {line}: {key} is {shown}; it is to be a number.") from None
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{path}, line {line}: {key} is {value}; it is to be a finite number, 0 or above.")
    return value
