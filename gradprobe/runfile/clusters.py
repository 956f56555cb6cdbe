"""The group ``test/``: metrics of the test split with one cluster of images left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from gradprobe.rows import TestClusters
from gradprobe.runfile import schema

if TYPE_CHECKING:
    from gradprobe.runfile.pieces import Piece


def read(piece: Piece) -> dict[str, NDArray[Any]]:
    """What a file says, by name; empty where it has no such group.

    Raises:
        RunFileError: It is damaged.
    """
    return piece.whole(schema.TEST)


def load(piece: Piece) -> TestClusters | None:
    """The same as it was written; None where there is none."""
    found = read(piece)
    if not found:
        return None
    return TestClusters(tuple(found["cluster"]), found["size"], tuple(found["metric"]), found["without"])
