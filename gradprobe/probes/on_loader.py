"""One measurement on the probe loader: forwards and passes, micro-batch by micro-batch, and everything put back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from gradprobe.measures import Array
from gradprobe.probes.checks import Losses, check_losses
from gradprobe.probes.loader import ProbeLoader, undisturbed
from gradprobe.probes.report import status_of
from gradprobe.probes.stopwatch import Stopwatch
from gradprobe.rows import MEASURED, ProbeLoaderRow

if TYPE_CHECKING:
    from gradprobe.probes.measuring import Measuring


class OnLoader:
    """What a probe does with its probe loader.

    Args:
        loader: Gives the losses.
        model: Whose buffers and modes are put back.
    """

    def __init__(self, loader: ProbeLoader, model: nn.Module) -> None:
        self._loader, self._model = loader, model

    def due(self, step: int) -> bool:
        """Whether it is measured at ``step``."""
        return self._loader.due(step)

    def measure(self, probe: Measuring) -> ProbeLoaderRow | None:
        """The row of the present step; None where not even the shared layers could be found.

        Raises:
            ProbeError: The loader's losses are not those of the probe's tasks.
        """
        watch, seen = Stopwatch(probe.meter.device), _Seen(probe.tasks)
        with watch.running(), undisturbed(self._model):
            found, status = probe.guarded(lambda: self._passes(probe, seen))
            header = probe.report.header
            if header is None:
                return None
            loss = probe.ranks.mean(seen.mean(self._loader.batches))
            gram = noise = np.full((len(header.layers), len(probe.tasks), len(probe.tasks)), np.nan)
            if found is not None:
                gram, noise = (probe.scale.off(part) for part in found)
                probe.meter.check_reach(probe.tasks, gram)
            if status == MEASURED:
                reach = header.reach
                status = status_of(loss, gram, reach, lambda: probe.meter.reach_now(probe.ordered(seen.last)))
            status = probe.meter.guard.marked(status)
            if not probe.self_checked and found is not None:
                probe.check_self(self._losses(probe))
        batches = self._loader.batches * probe.ranks.size
        return ProbeLoaderRow(
            step=probe.clock.step,
            epoch=probe.epoch,
            time=probe.now(),
            loss=loss,
            gram=gram,
            gram_noise=noise,
            micro_batches=batches,
            batch_size=batches * self._loader.batch_size,
            overhead=watch.seconds,
            status=status,
        )

    def _losses(self, probe: Measuring) -> Iterator[Losses]:
        return self._loader.losses(probe.clock.step, probe.ranks.rank)

    def _passes(self, probe: Measuring, seen: _Seen) -> tuple[Array, Array]:
        made = self._losses(probe)
        waiting = [probe.ranks.together(lambda: seen.add(next(made)))]
        shared = probe.find(waiting[0])

        def each() -> Iterator[list[Tensor]]:
            # Popped: the first forward's graph must not live until the last one's is gone.
            for losses in itertools.chain((waiting.pop() for _ in range(1)), map(seen.add, made)):
                yield probe.scale.all(probe.ordered(losses))

        return probe.meter.in_micro_batches(shared, each(), self._loader.shares, len(probe.tasks), aside=True)


class _Seen:
    """The losses that went by."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tuple(tasks)
        self._values: list[list[float]] = []
        self.last: Losses = {}

    def add(self, losses: Losses) -> Losses:
        check_losses(self._tasks, losses)
        self._values.append([float(losses[task].detach()) for task in self._tasks])
        self.last = losses
        return losses

    def mean(self, count: int) -> Array:
        """(T,); NaN where fewer than ``count`` went by."""
        if len(self._values) < count:
            return np.full(len(self._tasks), np.nan)
        mean: Array = np.array(self._values).mean(axis=0)
        return mean
