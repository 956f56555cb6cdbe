"""What a study has its runs measure, where nothing else is asked for. The one place that knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gradprobe.trainers.settings import Settings

FLAGS: Mapping[str, tuple[str, ...]] = {
    "micro_batches": ("--micro-batches", "4"),
    "probe_loader": ("--probe-loader", "val"),
    "ledger": ("--ledger",),
}
"""Setting -> the flags that switch it on."""


def flags(given: Collection[str]) -> list[str]:
    """What is to be added to every run.

    Args:
        given: Settings that the user chose.
    """
    known = Settings.__dataclass_fields__
    return [word for name, words in FLAGS.items() if name in known and name not in given for word in words]
