"""Readies a model for evaluation, and puts everything back behind it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from gradprobe.errors import DataError, UsageError


def recompute_batchnorm(model: nn.Module, loader: Iterable[Any], *, batches: int | None) -> None:
    """Replace BatchNorm's running statistics by those of the present weights.

    A short run ends with running statistics that lag behind its weights, and evaluation mode then measures
    the lag. This takes the plain average over batches, in training mode and without gradients. Parameters,
    gradients, momenta, modes and random streams are left as they were.

    Args:
        model: Its parameters say to which device batches go.
        loader: Training batches.
        batches: How many of the first to use; None for all.

    Raises:
        UsageError: `batches` is below 1.
        DataError: The loader gives no batch; the statistics are unchanged.
    """
    if batches is not None and batches < 1:
        raise UsageError(f"batches={batches}: recomputing BatchNorm statistics takes at least one batch.")
    device = next(model.parameters()).device
    with left_as_it_was(model, loader):
        images = (batch.to(device).images for batch in itertools.islice(loader, batches))
        first = next(images, None)
        if first is None:
            raise DataError("there is no batch to recompute BatchNorm statistics from; is the training split empty?")
        update_bn(itertools.chain((first,), images), model)


@contextmanager
def left_as_it_was(model: Any, loader: object) -> Iterator[None]:
    """Put back the mode of every module and the random streams, those of PyTorch and the loader's own."""
    modes = {module: module.training for module in model.modules()}
    device = next(iter(model.parameters())).device
    generator = getattr(loader, "generator", None)
    drawn = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        with torch.random.fork_rng(devices=(device,) if device.type == "cuda" else ()):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        if drawn is not None:
            cast(torch.Generator, generator).set_state(drawn)
