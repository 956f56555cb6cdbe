"""What processes other than the first show: nothing, since the first says it."""

from __future__ import annotations

from collections.abc import Mapping

from gradprobe.cli.live import Display


class Silent(Display):
    """A display that shows nothing."""

    def say(self, text: str) -> None:
        """The first process says it."""

    def result(self, text: str) -> None:
        """Likewise."""

    def stepped(self, epoch: int, step: int, losses: Mapping[str, float]) -> None:
        """Likewise."""
