"""The loss scale of mixed precision: gradients are measured scaled, and stored unscaled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.transfer import values


class LossScale:
    """What a ``GradScaler`` does to losses; nothing without one.

    Args:
        scaler: The loop's own. It is asked for its scale and told nothing.

    Raises:
        ProbeError: It has no scale.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None and not (hasattr(scaler, "scale") and hasattr(scaler, "get_scale")):
            raise ProbeError(f"scaler= is a {type(scaler).__name__}; pass the loop's torch.amp.GradScaler, or none.")
        self._scaler = scaler
        self.unread: list[Tensor] = []
        """The factor of the losses that were last scaled together, where it is a tensor that nobody has read yet."""

    def apply(self, loss: Tensor) -> Tensor:
        """The loss as its backward is to be made."""
        if self._scaler is None:
            return loss
        self.unread = []
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def all(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Several losses, scaled."""
        scaled = [self.apply(loss) for loss in losses]
        if self._scaler is not None and losses:  # asked by get_scale() it would make the host wait
            self.unread = [self._scaler.scale(torch.ones((), device=losses[0].device))]
        return scaled

    @property
    def factor(self) -> float:
        """By what losses are multiplied; right once one was."""
        if self._scaler is None:
            return 1.0
        return values(self.unread)[0] if self.unread else float(self._scaler.get_scale())

    @property
    def now(self) -> float:
        """By what the next loss would be multiplied. Asking makes the host wait for a GPU."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    @property
    def there(self) -> bool:
        """Whether losses are scaled, so that a gradient may overflow which is finite by itself."""
        return self._scaler is not None and self.factor != 1.0

    def off(self, gram: Array) -> Array:
        """Gramians of scaled gradients as those of unscaled ones."""
        return gram / self.factor**2
