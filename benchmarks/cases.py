"""The models of the benchmarks, and the ways to make one training step with them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gradprobe
from gradprobe.probes.shared_layers import Selection

Losses = Callable[[nn.Module], dict[str, Tensor]]


@dataclass
class Case:
    """A model, and its losses on one fixed batch."""

    model: nn.Module
    losses: Losses
    weights: dict[str, float]

    def fresh(self):
        """A copy of the model, and its optimizer."""
        model = copy.deepcopy(self.model)
        return model, torch.optim.SGD(model.parameters(), lr=1e-5)

    def step(self, backward):
        """A step whose backward is ``backward(losses)``."""
        model, optimizer = self.fresh()
        return self.step_of(model, optimizer, backward)

    def step_of(self, model, optimizer, backward):
        def run():
            backward(self.losses(model))
            optimizer.step()
            optimizer.zero_grad()

        return run

    def joint(self, losses):
        sum(self.weights[t] * losses[t] for t in losses).backward()

    def bare(self):
        return self.step(self.joint)

    def probed(self, use, weights=None, **options):
        """With a probe that records into a file."""
        model, optimizer = self.fresh()
        weights = weights or self.weights
        path = Path(tempfile.mkdtemp()) / "run.h5"
        probe = gradprobe.attach(model, list(weights), path, optimizer=optimizer, **({"every": 1} | options))

        def backward(losses):
            if use == "backward":
                probe.backward(losses, weights)
            else:
                probe.record(losses, weights)
                self.joint(losses)

        run = self.step_of(model, optimizer, backward)
        run.probe = probe
        return run

    def passes_alone(self, use):
        """The autograd passes that a probe makes, their gradients kept, and nothing of it besides."""
        model, optimizer = self.fresh()
        losses = self.losses(model)
        parameters = Selection(model, None, None).find(losses).parameters
        explicit = len(losses) - (use == "backward")

        def backward(losses):
            kept = [
                torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                for loss in list(losses.values())[-explicit:]
            ]
            if use == "record":
                del kept  # before the joint backward, as a probe does
                kept = None
            sum(self.weights[t] * losses[t] for t in losses).backward(retain_graph=use == "backward")
            del kept

        return self.step_of(model, optimizer, backward)

    def shared(self):
        return Selection(self.model, None, None).find(self.losses(self.model))


def detector(imgsz: int = 160, batch: int = 8) -> Case:
    """YOLOv5n with a classification head."""
    from gradprobe.trainers.hyp import DetectionHyp
    from gradprobe.trainers.models.yolov5 import build_model

    model = build_model(box_classes=4, image_classes=3, imgsz=imgsz, hyp=DetectionHyp()).train()
    stream = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, imgsz, imgsz, generator=stream)
    boxes = torch.rand(3 * batch, 6, generator=stream) * 0.3 + 0.3
    boxes[:, 0] = torch.arange(3 * batch) % batch
    boxes[:, 1] = torch.arange(3 * batch) % 4
    targets = Targets(images, boxes, torch.arange(batch) % 3)
    return Case(model, lambda m: m.losses(m(images), targets), {"det": 1.0, "cls": 1.0})


@dataclass
class Targets:
    images: Tensor
    boxes: Tensor
    labels: Tensor


class Classifier(nn.Module):
    """ResNet-18 with a linear head per task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.trunk = resnet18()
        self.trunk.fc = nn.Identity()
        self.heads = nn.ModuleList(nn.Linear(512, 10) for _ in range(tasks))

    def forward(self, images: Tensor) -> list[Tensor]:
        z = self.trunk(images)
        return [head(z) for head in self.heads]


def classifier(tasks: int, imgsz: int = 64, batch: int = 16) -> Case:
    """T classifications of one image."""
    torch.manual_seed(0)
    model = Classifier(tasks).train()
    images = torch.randn(batch, 3, imgsz, imgsz)
    labels = [torch.randint(10, (batch,)) for _ in range(tasks)]

    def losses(m):
        return {
            f"t{i}": nn.functional.cross_entropy(out, y)
            for i, (out, y) in enumerate(zip(m(images), labels, strict=True))
        }

    return Case(model, losses, {f"t{i}": 1.0 for i in range(tasks)})
