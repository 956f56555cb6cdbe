"""The fixed probe batch of a loss ledger: samples of the training split, drawn once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from gradprobe.trainers.engine import Engine
from gradprobe.trainers.problems import Problem
from gradprobe.trainers.settings import Settings
from gradprobe.updates import Ledger

_ORDER = 0x6C656467  # of an epoch that no training reaches: the draw is no training's order


def make_ledger(model: Any, engine: Engine, problem: Problem, split: Any, settings: Settings) -> Ledger | None:
    """The ledger of a training, or None where there is to be none.

    The probe batch goes through the model in train mode and in micro-batches as large as the training's, since
    BatchNorm makes other losses of other sizes. Which samples they are hangs on the seed alone.
    """
    if not settings.ledger:
        return None
    size = min(max(settings.batch_size // settings.micro_batches, 1), len(split))
    loader = problem.loader(split, size, seed=settings.seed)
    loader.set_epoch(_ORDER)
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
