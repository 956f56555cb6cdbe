"""Puts a training together from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from gradprobe.errors import UsageError
from gradprobe.probes import GradientProbe
from gradprobe.rows import Sink
from gradprobe.trainers import checkpoint, loop, registry
from gradprobe.trainers.balancer import Balancer, Setup
from gradprobe.trainers.engine import make_engine
from gradprobe.trainers.hyp import DetectionHyp
from gradprobe.trainers.models.size import size_of
from gradprobe.trainers.models.yolov5 import YOLOv5WithClassification, build_model
from gradprobe.trainers.optim import make_optimizer, make_schedule
from gradprobe.trainers.processes import OneProcess, own_device
from gradprobe.trainers.registry import TRAINERS
from gradprobe.trainers.settings import TASKS, Settings, as_provenance
from gradprobe.updates import Updates

if TYPE_CHECKING:
    from gradprobe.trainers.data import LoadedData


def build(
    settings: Settings,
    data: LoadedData,
    sinks: Sequence[Sink],
    watcher: loop.Watcher,
    *,
    out: Path,
    processes: OneProcess | None = None,
    hyp: DetectionHyp | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> loop.Training:
    """Model, optimizer, balancer, probe and loaders of one training.

    Raises:
        UsageError: A cfg, device or layer that does not exist, or weights that do not fit.
    """
    from gradprobe.trainers.data import make_loader

    hyp = hyp or DetectionHyp()
    processes = processes or OneProcess()
    device = check_device(own_device(settings.device))
    kind = registry.find(settings.trainer)
    reference = build_model(
        settings.cfg,
        box_classes=len(data.box_names),
        image_classes=len(data.image_names),
        imgsz=settings.imgsz,
        hyp=hyp,
        seed=settings.seed,
    ).to(device)
    if settings.weights:
        checkpoint.load_weights(reference, settings.weights, str(device))
    reference_weights = checkpoint.fingerprint(reference)
    whole_loader = make_loader(data.train, settings.batch_size, seed=settings.seed, shuffle=True)
    train_loader = make_loader(
        data.train, settings.batch_size, seed=settings.seed, rank=processes.rank, processes=processes.size
    )
    setup = Setup(settings, TASKS, len(train_loader))
    model = cast(YOLOv5WithClassification, kind.prepare(reference, setup))
    balancer = make_balancer(kind, model, setup)
    optimizer = make_optimizer(model, settings)
    schedule = make_schedule(optimizer, settings, settings.epochs * len(train_loader))
    engine = make_engine(model, settings.precision, device, processes)
    probe = GradientProbe(
        engine.forward,
        TASKS,
        sinks,
        every=settings.every,
        optimizer=optimizer,
        scaler=engine.scaler,
        updates=Updates() if settings.updates else None,
        provenance={
            "trainer": settings.trainer,
            "settings": as_provenance(settings),
            "hyp": dict(model.scaled_hyp),
            "data": describe(data),
            "model": {
                **size_of(model, settings.imgsz),
                "reference": reference_weights,
                "initial_weights": checkpoint.fingerprint(model),
                "trunk": list(model.trunk),
                "last_shared_layer": model.last_shared_layer,
                "doubled": list(getattr(model, "doubled", ())),
            },
            "steps_per_epoch": len(train_loader),
            **(provenance or {}),
        },
        _divided=kind.divides(settings),
    )
    return loop.Training(
        settings=settings,
        model=model,
        engine=engine,
        optimizer=optimizer,
        schedule=schedule,
        balancer=balancer,
        probe=probe,
        train_loader=train_loader,
        whole_loader=whole_loader,
        val_loader=make_loader(data.val, settings.batch_size, shuffle=False),
        test_loader=(make_loader(data.test, settings.batch_size, shuffle=False) if data.test is not None else None),
        paths=checkpoint.Paths(out),
        watcher=watcher,
    )


def make_balancer(kind: type[Balancer], model: nn.Module, setup: Setup) -> Balancer:
    """The balancer that ``--trainer`` names.

    Raises:
        UsageError: A user's class cannot be made as its ``create`` says.
    """
    try:
        return kind.create(model, setup)
    except TypeError as error:
        if setup.settings.trainer in TRAINERS:
            raise
        raise UsageError(
            f"--trainer {setup.settings.trainer}: {kind.__name__} cannot be made ({error}). It is called without "
            "arguments; override the classmethod create(model, setup) where it needs some."
        ) from error


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
