"""Dropout, augmentation and shuffling that draw from a stream which the other task draws from as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gradprobe.audit.arm import Arm
from gradprobe.audit.closing import Closing, Door
from gradprobe.audit.streams import own_streams


class _OwnStreams(Closing):
    """Draws what belongs to a step so many steps later."""

    def __init__(self, later: int = 0) -> None:
        self._later = later

    @contextmanager
    def around(self, arm: Arm) -> Iterator[None]:
        with own_streams(arm.experiment.model, self._later + arm.index) as mode:
            yield
        self.acted += 1 + mode.draws


RANDOM = Door(
    name="random stream",
    title="both tasks draw from one random stream (dropout, augmentation, shuffling)",
    remedy="give the task's dropout, augmentation and loader a torch.Generator of their own",
    close=_OwnStreams,
    stages=("data", "forward"),
    others=(lambda: _OwnStreams(10**6), lambda: _OwnStreams(10**7)),
    intrusive=True,  # other numbers are drawn than the training draws, also where no other task draws
)
