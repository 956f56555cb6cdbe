"""A proof of which batches a training saw, and in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

UNKNOWN = {"hash": "unknown", "count": 0}
"""The state of a checkpoint that does not tell: what is added to it is equal to nothing else."""


class BatchOrder:
    """A chain of hashes over the names of the samples of every training batch.

    Two trainings with equal ``hash`` and ``count`` saw the same samples in the same batches in the same order.
    """

    def __init__(self) -> None:
        self.hash = hashlib.sha256(b"gradprobe batches").hexdigest()
        self.count = 0

    def add(self, names: Iterable[str]) -> None:
        """One more batch."""
        link = "\0".join([self.hash, *names])
        self.hash = hashlib.sha256(link.encode("utf-8", "surrogateescape")).hexdigest()
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """The hash, in hex, and how many batches it is of."""
        return {"hash": self.hash, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.hash, self.count = state["hash"], state["count"]
