"""One measurement on the probe loader: forwards and passes, micro-batch by micro-batch, and everything put back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.checks import Losses, all_losses, is_present
from gradprobe.probes.loader import ProbeLoader, undisturbed
from gradprobe.probes.report import finite, status_of
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
            loss, there = probe.ranks.mean_of_present(seen.mean(self._loader.batches), seen.there)
            gram = noise = np.full((len(header.layers), len(probe.tasks), len(probe.tasks)), np.nan)
            if found is not None:
                gram, noise = (probe.scale.off(part) for part in found)
            if status == MEASURED:
                status = status_of(probe.tasks, loss, gram, there)
            status = probe.meter.guard.marked(status)
            if not probe.self_checked and found is not None:
                probe.check_self(all_losses(probe.tasks, one) for one in self._losses(probe))
        batches = self._loader.batches * probe.ranks.size
        return ProbeLoaderRow(
            step=probe.clock.step,
            epoch=probe.epoch,
            time=probe.now(),
            loss=loss,
            gram=finite(gram),
            gram_noise=finite(noise),
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
        probe.meter.let_go()

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
        self._there: list[list[bool]] = []

    def add(self, given: Losses) -> Losses:
        losses = all_losses(self._tasks, given)
        lacking = [task for task in self._tasks if task not in given]
        if lacking:
            raise ProbeError(f"losses of the probe loader lack {lacking}; give None for a task that a batch has not.")
        self._values.append([float(losses[task].detach()) for task in self._tasks])
        self._there.append([is_present(losses[task]) for task in self._tasks])
        return losses

    @property
    def there(self) -> NDArray[np.bool_]:
        """(T,) who took part in some micro-batch."""
        return np.array([any(there) for there in zip(*self._there, strict=True)] or [False] * len(self._tasks))

    def mean(self, count: int) -> Array:
        """(T,) over the micro-batches in which a task takes part; NaN: in none, or fewer than ``count`` went by."""
        if len(self._values) < count:
            return np.full(len(self._tasks), np.nan)
        there = np.array(self._there, dtype=bool)
        total = np.where(there, self._values, 0.0).sum(axis=0)
        return np.where(there.any(axis=0), total / np.maximum(there.sum(axis=0), 1), np.nan)
