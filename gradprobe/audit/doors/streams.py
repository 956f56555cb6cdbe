"""Dropout, augmentation and shuffling that draw from a stream which the other task draws from as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gradprobe.audit.arm import Arm
from gradprobe.audit.closing import Closing, Door
from gradprobe.audit.streams import own_streams


class _OwnStreams(Closing):
    @contextmanager
    def around(self, arm: Arm) -> Iterator[None]:
        with own_streams(arm.experiment.model, arm.index) as mode:
            yield
        self.acted += 1 + mode.draws


RANDOM = Door(
    name="random stream",
    title="both tasks draw from one random stream (dropout, augmentation, shuffling)",
    remedy="give the task's dropout, augmentation and loader a torch.Generator of their own",
    close=_OwnStreams,
    stages=("data", "forward"),
    intrusive=True,  # other numbers are drawn than the training draws, also where no other task draws
)
