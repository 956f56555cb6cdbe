"""YOLOv5 with some layers of the trunk doubled: the detector has one copy, the classification head the other."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradprobe.errors import UsageError
from gradprobe.probes.shared_layers import by_module, find_shared
from gradprobe.trainers.models.yolov5 import YOLOv5WithClassification


class DividedModel(YOLOv5WithClassification):
    """The reference model, with a second copy of some layers for classification.

    Layers that stay shared are run twice behind the first doubled one, with the same parameters on each task's own
    features and with running statistics of their own. The detector's layers keep their names (``model.3.conv``), so the
    shared layers have in the file the names of the undivided model; the copies are called ``image_trunk.3.conv``.

    Args:
        reference: Taken over; its parameters become the detector's, and both copies start from them.
        doubled: Names of the layers to double, as :func:`trunk_layers` gives them.

    Raises:
        UsageError: Nothing to double, or the trunk is no plain chain of blocks.
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
            _tie(self.image_trunk.get_submodule(name), self.model.get_submodule(name), f"model.{name}", set(doubled))

    def _listen(self, kept: list[Tensor]) -> Any:
        """Both ways part before the first block with a doubled layer."""
        return self.model[self._first].register_forward_pre_hook(lambda module, arguments: kept.append(arguments[0]))

    def classify(self, features: Tensor) -> Tensor:
        """Logits of the image classes, by the classification's own way through the trunk."""
        return super().classify(self.image_trunk(features))


def _tie(copied: nn.Module, original: nn.Module, prefix: str, doubled: set[str]) -> None:
    for path, module in original.named_modules():
        if (f"{prefix}.{path}" if path else prefix) in doubled:
            continue
        target = copied.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            target.register_parameter(name, parameter)


def trunk_layers(model: YOLOv5WithClassification, imgsz: int) -> tuple[str, ...]:
    """The layers of the trunk that have parameters, in the order in which the forward runs them."""
    below = tuple(f"{block}." for block in model.trunk)
    groups = {name: parameters for name, parameters in by_module(model).items() if f"{name}.".startswith(below)}
    modes = {module: module.training for module in model.modules()}
    model.eval()  # moves no running statistics
    try:
        image = torch.zeros(1, 3, imgsz, imgsz, device=model.classifier.weight.device)
        loss = cast(Tensor, model(image).logits.sum())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return tuple(layer.name for layer in find_shared(groups, {"one": loss, "other": loss}).layers)
