"""What a probe may have beside it, which goes on from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from gradprobe.measures import Array

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from gradprobe.probes.level import Level
    from gradprobe.probes.measuring import Measuring
    from gradprobe.probes.meter import Meter


class Beside(Protocol):
    """Is told of every call and every measurement; see :mod:`gradprobe.updates.optimizer_watch`."""

    def check(self, tasks: Sequence[str], level: Level, optimizer: Optimizer | None, meter: Meter) -> None:
        """Raise a ``ProbeError`` where it cannot belong to this probe."""

    def open(self, measuring: Measuring, model: nn.Module) -> None:
        """Belong to a probe; called once."""

    def wants(self, step: int) -> bool:
        """Whether a step is to be measured for its sake, beside those that are due."""

    def looked(self, losses: Sequence[Sequence[Tensor]]) -> None:
        """A step will be measured.

        Args:
            losses: (m) of (T,), one per micro-batch, scaled; their graphs are alive.
        """

    def measured(self, losses: Sequence[Tensor], weights: Array, gram: Array, status: str) -> None:
        """A row has come about.

        Args:
            losses: (T,) whose graphs tell which task reaches what.
            weights: (T,) in force.
            gram: (L, T, T), as in the row.
            status: Of the row.
        """

    def called(self) -> None:
        """A call of the probe is over, measured or not."""

    def close(self) -> None:
        """The probe lets go of the training; called before the sinks are closed."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped."""


class Joins(Protocol):
    """One of several that want to look at the same steps, as ``updates=`` and ``ledger=``."""

    name: str
    """Of the argument."""

    @property
    def about(self) -> object:
        """What the file says of it: a value, or a mapping of names to values."""

    def together(self, readers: Sequence[Any]) -> Beside:
        """What is put beside the probe for all of them."""
