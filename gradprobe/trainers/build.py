"""Puts a training together from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradprobe.errors import UsageError
from gradprobe.probes import GradientProbe
from gradprobe.probes.probe_samples import ProbeLoader
from gradprobe.processes import OneProcess
from gradprobe.rows import Sink
from gradprobe.trainers import checkpoint, loop, registry
from gradprobe.trainers.balancer import Balancer, Setup
from gradprobe.trainers.engine import Engine, make_engine, own_device
from gradprobe.trainers.fixed_batch import make_ledger
from gradprobe.trainers.hyp import DetectionHyp
from gradprobe.trainers.models.size import size_of
from gradprobe.trainers.optim import make_optimizer, make_schedule
from gradprobe.trainers.problems import Data, Kind, Problem, problem_of
from gradprobe.trainers.registry import TRAINERS
from gradprobe.trainers.settings import Settings, as_provenance
from gradprobe.updates import Updates


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
    kind = registry.find(settings.trainer)
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
        ledger=make_ledger(model, engine, problem, data.train, settings),
        probe_loader=_make_probe_loader(settings, problem, data, model, engine),
        provenance={
            "trainer": settings.trainer,
            "settings": as_provenance(settings),
            "hyp": dict(model.scaled_hyp),
            "data": problem.describe(data),
            "metrics": _describe_metrics(problem.kind),
            "model": {
                **size_of(model, problem.example(settings, data)),
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
        paths=checkpoint.Paths(out),
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
        torch.zeros(1, device=device).item()  # by effect: torch knows devices that hold no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UsageError(f"--device {name}: cannot be used here ({reason}). On any machine: --device cpu") from None
    return device


def _describe_metrics(kind: Kind) -> dict[str, list[Any]]:
    """Which task each metric judges, and whether higher is better, as lists of one length."""
    return {
        "name": [metric.name for metric in kind.metrics],
        "task": [metric.task for metric in kind.metrics],
        "higher_is_better": [metric.higher_is_better for metric in kind.metrics],
    }
