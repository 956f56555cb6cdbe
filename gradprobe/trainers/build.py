"""Puts a training together from its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gradprobe.probes import GradientProbe
from gradprobe.probes.probe_samples import ProbeLoader
from gradprobe.processes import OneProcess
from gradprobe.rows import Sink
from gradprobe.trainers import checkpoint, loop
from gradprobe.trainers.balancer import Setup, find_balancer, make_balancer
from gradprobe.trainers.engine import Engine, check_device, make_engine, own_device
from gradprobe.trainers.evaluation import model_kept
from gradprobe.trainers.hyp import DetectionHyp
from gradprobe.trainers.optim import make_optimizer, make_schedule
from gradprobe.trainers.paths import Paths
from gradprobe.trainers.problems import Data, Kind, Problem, problem_of
from gradprobe.trainers.settings import Settings, as_provenance
from gradprobe.updates import Ledger, Updates

__all__ = ["build"]


def build(
    settings: Settings,
    data: Data,
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
    hyp = hyp or DetectionHyp()
    problem = problem_of(settings)
    tasks = problem.kind.tasks
    processes = processes or OneProcess()
    device = check_device(own_device(settings.device))
    kind = find_balancer(settings.trainer)
    reference = problem.build_model(settings, data, hyp).to(device)
    if settings.weights:
        checkpoint.load_weights(reference, settings.weights, str(device))
    reference_weights = checkpoint.fingerprint(reference)
    train_loader, whole_loader = (
        problem.loader(data.train, settings.batch_size, seed=settings.seed, shuffle=True) for _ in range(2)
    )
    train_loader.divide(processes.rank, processes.size)
    setup = Setup(settings, tasks, len(train_loader))
    model: Any = kind.prepare(reference, setup)
    balancer = make_balancer(kind, model, setup)
    optimizer = make_optimizer(model, settings)
    schedule = make_schedule(optimizer, settings, settings.epochs * len(train_loader))
    engine = make_engine(model, settings.precision, device, processes)
    probe = GradientProbe(
        engine.forward,
        tasks,
        sinks,
        every=settings.every,
        optimizer=optimizer,
        scaler=engine.scaler,
        updates=Updates() if settings.updates else None,
        ledger=_make_ledger(model, engine, problem, data.train, settings),
        probe_loader=_make_probe_loader(settings, problem, data, model, engine),
        provenance={
            "trainer": settings.trainer,
            "settings": as_provenance(settings),
            "hyp": dict(model.scaled_hyp),
            "data": problem.describe(data),
            "metrics": _describe_metrics(problem.kind),
            "model": {
                **_size_of(model, problem.example(settings, data)),
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
        problem=problem,
        model=model,
        engine=engine,
        optimizer=optimizer,
        schedule=schedule,
        balancer=balancer,
        probe=probe,
        train_loader=train_loader,
        whole_loader=whole_loader,
        val_loader=problem.loader(data.val, settings.batch_size, shuffle=False),
        test_loader=(problem.loader(data.test, settings.batch_size, shuffle=False) if data.test is not None else None),
        paths=Paths(out),
        watcher=watcher,
    )


def _make_probe_loader(
    settings: Settings, problem: Problem, data: Data, model: Any, engine: Engine
) -> ProbeLoader | None:
    """What ``--probe-loader`` asks for; None: nothing."""
    if not settings.probe_loader:
        return None

    def losses(batch: Any) -> Mapping[str, torch.Tensor]:
        return engine.own_losses(model, batch.to(engine.device))

    size = max(settings.batch_size // settings.micro_batches, 1)
    drawn_from = problem.loader(data.train if settings.probe_loader == "train" else data.val, size, shuffle=False)
    return ProbeLoader(
        drawn_from.dataset,
        losses,
        batch_size=size,
        batches=settings.probe_batches,
        every=settings.probe_every,
        split=settings.probe_loader,
        collate=drawn_from.collate,
        seed=settings.seed,
    )


def _describe_metrics(kind: Kind) -> dict[str, list[Any]]:
    """Which task each metric judges, and whether higher is better, as lists of one length."""
    return {
        "name": [metric.name for metric in kind.metrics],
        "task": [metric.task for metric in kind.metrics],
        "higher_is_better": [metric.higher_is_better for metric in kind.metrics],
    }


def _size_of(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Parameters, each counted once, and floating-point operations of one image's forward.

    A multiplication and an addition are two operations; convolutions and matrix products are counted. The model is left
    as it was.

    Args:
        model: Any.
        image: One, as the model takes it, of batch size 1.
    """
    image = image.to(next(model.parameters()).device)
    with model_kept(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()
        model(image)
    return {"parameters": sum(p.numel() for p in model.parameters()), "flops_per_image": counter.get_total_flops()}


_PROBE_EPOCH = 0x6C656467  # of an epoch that no training reaches: the draw is no training's order


def _make_ledger(model: Any, engine: Engine, problem: Problem, split: Any, settings: Settings) -> Ledger | None:
    """The ledger of a training, or None where there is to be none.

    The probe batch goes through the model in train mode and in micro-batches as large as the training's, since
    BatchNorm makes other losses of other sizes. Which samples they are hangs on the seed alone.
    """
    if not settings.ledger:
        return None
    size = min(max(settings.batch_size // settings.micro_batches, 1), len(split))
    loader = problem.loader(split, size, seed=settings.seed)
    loader.set_epoch(_PROBE_EPOCH)
    count = max(min(settings.ledger_images, len(split)) // size, 1)
    kept = [batch.to(engine.device) for _, batch in zip(range(count), loader, strict=False)]

    def losses() -> Iterator[Mapping[str, Tensor]]:
        model.train()
        for batch in kept:
            yield engine.own_losses(model, batch)

    return Ledger(
        losses,
        ends=settings.ledger_ends,
        burst=settings.ledger_burst or None,
        every=settings.ledger_every or None,
        samples=count * size,
    )
