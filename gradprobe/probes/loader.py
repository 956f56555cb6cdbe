"""The probe loader: task gradients on independent samples, with the parameters as they are at a step.

The batches of a training are drawn without replacement, and parameters were fitted to the samples of earlier ones, so
that what is measured on them is biased, the more the fewer samples there are. Batches that are drawn with replacement,
and that nothing is trained on, have no such bias. They are what claims rest on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from gradprobe.errors import ProbeError
from gradprobe.probes import walk
from gradprobe.probes.checks import Losses
from gradprobe.probes.schedule import whole
from gradprobe.probes.state import state_kept

SPLITS = ("train", "val")

_STREAM = 0x70726F6265
"""Keeps what is drawn apart from what else is drawn by the same seed."""


class Samples(Protocol):
    """A data set with a length, as torch's are."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """One sample."""


class ProbeLoader:
    """What a probe measures on, every so many steps, besides the training's own batches.

    Samples are drawn with replacement, by a stream that depends on the seed and the step alone. The forwards are those
    of training, in the mode that the model is in; parameters stay, and buffers, ``.grad``, modes and all random streams
    are put back: the training is bit for bit as without.

    Args:
        dataset: Samples, each with a place from 0 on.
        losses: Makes the losses of one micro-batch as the training loop does: batch -> {task: loss}. It moves the batch
            to the model's device; of a DDP model it calls ``model.module``, as no backward follows.
        batch_size: Samples of a micro-batch; as many as the training's forwards see, where the model has BatchNorm.
        batches: Micro-batches of one measurement, 2 or more.
        every: Measure at steps 0, every, 2 every, ...
        split: What the data set is: "train", or "val" for samples that are not trained on, which a claim about all
            data needs.
        collate: A list of samples -> a batch; default that of ``torch.utils.data``.
        seed: Of the samples, and of what the forwards draw.

    Raises:
        ProbeError: An argument out of its range, or an empty data set.

    Example:
        >>> loader = gradprobe.ProbeLoader(  # doctest: +SKIP
        ...     val_data, lambda batch: losses_of(model, batch), batch_size=8, split="val"
        ... )
        >>> with gradprobe.attach(model, ("det", "cls"), "conflict.h5", probe_loader=loader) as probe:  # doctest: +SKIP
        ...     ...  # the loop as it is
    """

    def __init__(
        self,
        dataset: Samples,
        losses: Callable[[Any], Losses],
        *,
        batch_size: int,
        batches: int = 8,
        every: int = 20,
        split: str = "train",
        collate: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ProbeError(f"split={split!r}: there are {' and '.join(map(repr, SPLITS))}.")
        self.batch_size, self.every = whole("batch_size", batch_size), whole("every", every)
        self.batches = whole("batches", batches, least=2)
        self._samples = len(dataset)
        if not self._samples:
            raise ProbeError("the probe loader's data set is empty: there is nothing to draw from.")
        self.split, self._seed = split, whole("seed", seed, least=0)
        self._dataset, self._losses, self._collate = dataset, losses, collate

    @property
    def about(self) -> dict[str, Any]:
        """What is stored of it."""
        return {
            "split": self.split,
            "every": self.every,
            "batches": self.batches,
            "batch_size": self.batch_size,
            "samples": self._samples,
            "seed": self._seed,
        }

    @property
    def shares(self) -> list[float]:
        """(m,) of the micro-batches in one measurement."""
        return [1 / self.batches] * self.batches

    def due(self, step: int) -> bool:
        """Whether it is measured at ``step``."""
        return step % self.every == 0

    def indices(self, step: int, rank: int = 0) -> list[list[int]]:
        """Which samples are drawn at a step, micro-batch by micro-batch; other ones in each process."""
        # Raw draws, whose stream numpy guarantees, and not what integers() makes of it.
        raw = np.random.PCG64(np.random.SeedSequence([_STREAM, self._seed, step, rank]))
        drawn = np.asarray(raw.random_raw(self.batches * self.batch_size), dtype=np.uint64) % np.uint64(self._samples)
        return [[int(index) for index in one] for one in drawn.reshape(self.batches, self.batch_size)]

    def losses(self, step: int, rank: int = 0) -> Iterator[Losses]:
        """The losses of each micro-batch, made when they are asked for; the global random streams are sown anew."""
        drawn = self.indices(step, rank)
        sow(int(np.random.SeedSequence([_STREAM, self._seed, step, rank, 1]).generate_state(1)[0]))
        for places in drawn:
            yield self._losses(self._batch([self._dataset[place] for place in places]))

    def _batch(self, samples: list[Any]) -> Any:
        if self._collate is not None:
            return self._collate(samples)
        from torch.utils.data import default_collate

        return default_collate(samples)


def sow(seed: int) -> None:
    """Begin the global random streams anew: of Python, numpy, and torch on the CPU and on GPUs."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    for generator in torch.cuda.default_generators if torch.cuda.is_initialized() else ():
        generator.manual_seed(seed)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what forwards of a training may change: buffers, modes, and the global random streams."""
    modules = walk.modules(model)
    modes, buffers = [m.training for m in modules], [dict(m._buffers) for m in modules]
    python, legacy = random.getstate(), np.random.get_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with state_kept(model):
            yield
    finally:
        for module, mode, held in zip(modules, modes, buffers, strict=True):
            module.training = mode
            module._buffers.update(held)  # a forward may have put another tensor there
        random.setstate(python)
        np.random.set_state(legacy)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
