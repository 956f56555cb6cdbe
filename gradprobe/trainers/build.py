"""Puts a training together from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradprobe.errors import UsageError
from gradprobe.probes import GradientProbe
from gradprobe.rows import Sink
from gradprobe.trainers import checkpoint, loop
from gradprobe.trainers.balancer import Balancer
from gradprobe.trainers.gradnorm import GradNorm
from gradprobe.trainers.hyp import DetectionHyp
from gradprobe.trainers.joint import Joint
from gradprobe.trainers.models.yolov5 import YOLOv5WithClassification, build_model
from gradprobe.trainers.optim import make_optimizer, make_schedule
from gradprobe.trainers.settings import TASKS, Settings, as_provenance

if TYPE_CHECKING:
    from gradprobe.trainers.data import LoadedData


def build(
    settings: Settings,
    data: LoadedData,
    sinks: Sequence[Sink],
    watcher: loop.Watcher,
    *,
    out: Path,
    hyp: DetectionHyp | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> loop.Training:
    """Model, optimizer, balancer, probe and loaders of one training.

    Raises:
        UsageError: A cfg, device or layer that does not exist, or weights that do not fit.
    """
    from gradprobe.trainers.data import make_loader

    hyp = hyp or DetectionHyp()
    device = check_device(settings.device)
    model = build_model(
        settings.cfg,
        box_classes=len(data.box_names),
        image_classes=len(data.image_names),
        imgsz=settings.imgsz,
        hyp=hyp,
        seed=settings.seed,
    ).to(device)
    if settings.weights:
        checkpoint.load_weights(model, settings.weights, settings.device)
    balancer = make_balancer(settings, model)
    optimizer = make_optimizer(model, settings)
    train_loader = make_loader(data.train, settings.batch_size, seed=settings.seed, shuffle=True)
    schedule = make_schedule(optimizer, settings, settings.epochs * len(train_loader))
    probe = GradientProbe(
        model,
        TASKS,
        sinks,
        every=settings.every,
        optimizer=optimizer,
        provenance={
            "trainer": settings.trainer,
            "settings": as_provenance(settings),
            "hyp": dict(model.scaled_hyp),
            "data": describe(data),
            "model": {
                "parameters": sum(p.numel() for p in model.parameters()),
                "initial_weights": checkpoint.fingerprint(model),
                "trunk": list(model.trunk),
            },
            "steps_per_epoch": len(train_loader),
            **(provenance or {}),
        },
    )
    return loop.Training(
        settings=settings,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        balancer=balancer,
        probe=probe,
        train_loader=train_loader,
        val_loader=make_loader(data.val, settings.batch_size, shuffle=False),
        test_loader=(make_loader(data.test, settings.batch_size, shuffle=False) if data.test is not None else None),
        paths=checkpoint.Paths(out),
        watcher=watcher,
    )


def make_balancer(settings: Settings, model: YOLOv5WithClassification) -> Balancer:
    """What ``--trainer`` names."""
    initial = dict(zip(TASKS, settings.task_weights, strict=True))
    if settings.trainer == "joint":
        return Joint(initial)
    return GradNorm(
        initial,
        layer_parameters(model, settings.gradnorm_layer or model.last_shared_layer),
        alpha=settings.gradnorm_alpha,
        lr=settings.gradnorm_lr,
        momentum=settings.gradnorm_momentum,
        total=settings.weight_sum,
        lowest=settings.min_weight,
        highest=settings.max_weight,
    )


def layer_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of the module called ``name``.

    Raises:
        UsageError: No module is called so, or it has none; lists the near ones.
    """
    from difflib import get_close_matches

    modules = {n: m for n, m in model.named_modules() if n and any(True for _ in m.parameters())}
    if name not in modules:
        near = get_close_matches(name, list(modules), n=3)
        raise UsageError(f"--gradnorm-layer {name!r}: the model has no such layer (near: {', '.join(near) or 'none'}).")
    return list(modules[name].parameters())


def check_device(name: str) -> torch.device:
    """A device as YOLOv5 writes it (``cpu``, ``0``, ``mps``) or as torch does (``cuda:0``).

    Raises:
        UsageError: Unknown, or not on this machine.
    """
    text = f"cuda:{name}" if name.isdecimal() else name
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UsageError(f"--device {name}: cannot be used here ({reason}). On any machine: --device cpu") from None
    return device


def describe(data: LoadedData) -> dict[str, Any]:
    """The data set as it is stored in a run file: its own name and content, no folder."""
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
