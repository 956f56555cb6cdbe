"""Whether parameters are still what they were: two calls at different parameters are no micro-batches of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradprobe.probes.graph import SharedLayers
from gradprobe.probes.meter import Meter

FEW = 4
"""So many parameters are looked at in a call that is not measured: an optimizer's step moves nearly all."""

SAMPLE = 1024
"""So many numbers of each parameter are compared where an update may leave no trace in a version counter."""


class SharedParameters:
    """Gives the parameters of the shared layers, as one list as long as these are the same; none before they are found.

    Args:
        meter: Finds them.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._of: SharedLayers | None = None
        self._parameters: Sequence[Tensor] = []

    def __call__(self) -> Sequence[Tensor]:
        """(P,), layer by layer."""
        shared = self._meter.shared
        if shared is not self._of:
            self._of, self._parameters = shared, shared.parameters if shared is not None else []
        return self._parameters


class Points:
    """Remembers where some parameters were.

    An update counts up the version of the tensor that it writes to, but not through ``.data``: there the numbers
    themselves are compared, bit for bit, on a sample of each parameter.

    Args:
        parameters: Gives those in question; they may be others from time to time.
    """

    def __init__(self, parameters: Callable[[], Sequence[Tensor]]) -> None:
        self._parameters = parameters
        self._of: Sequence[Tensor] = ()
        self._versions: tuple[int, ...] | None = None
        self._numbers: list[Tensor] | None = None
        self._closely = False
        self.silent = False
        """Whether the last move that was found left the version counters as they were."""

    def keep(self, *, closely: bool, numbers: bool = False) -> None:
        """Remember where some of them are; closely: all, with their numbers, on their device.

        Args:
            closely: See there.
            numbers: Of some, too.
        """
        of = self._parameters()
        self._of = of if closely else of[:: max(1, len(of) // FEW)]
        self._versions = tuple([p._version for p in self._of])
        self._numbers, self._closely = _sampled(self._of) if closely or numbers else None, closely

    def moved(self) -> bool:
        """Whether they are no longer where they were last remembered; False where nothing was.

        A new version of the same numbers is no move: averaged weights were swapped in for an evaluation, say, and out
        again. Where all versions are old the numbers are looked at, for which a device must be waited for, if they were
        remembered closely.
        """
        if self._versions is None:
            return False
        versions = tuple([p._version for p in self._of])
        written = versions != self._versions
        now = _sampled(self._of) if written or self._closely else None
        if self._numbers is None or now is None:
            self.silent = False
            return written
        moved = not same(self._numbers, now)
        self.silent, self._versions = moved and not written, versions
        return moved

    def again(self) -> None:
        """Remember where they are now, as closely as the last time."""
        self.keep(closely=self._closely, numbers=self._numbers is not None)


def sample(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Some numbers of each parameter, as one tensor per device and type; where they are asked for, nobody waits."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in parameters:
        # In the order in which they lie in memory, as what is not contiguous (channels last) would be copied.
        flat = p.detach().permute(sorted(range(p.dim()), key=p.stride, reverse=True)).reshape(-1)
        found.setdefault((p.device, p.dtype), []).append(flat[:: max(1, flat.numel() // SAMPLE)])
    return [torch.cat(parts) for parts in found.values()]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two samples are the same numbers; NaN, of a training that has diverged, is the same as NaN."""
    return len(one) == len(other) and all(
        a.device == b.device and a.dtype == b.dtype and (torch.equal(a, b) or _same_but_for_nan(a, b))
        for a, b in zip(one, other, strict=True)
    )


def _same_but_for_nan(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _sampled(parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """None for tensors of a kind that cannot be sampled: the version counters must do."""
    try:
        return sample(parameters)
    except (RuntimeError, NotImplementedError, TypeError):
        return None
