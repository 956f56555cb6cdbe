"""Data to train on: the embedded phantoms, and data sets in YOLO format.

The names are imported when they are first used, so that checking a data set does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradprobe.trainers.data.loader import Batch, Loader, make_loader
    from gradprobe.trainers.data.loading import LoadedData, load_data

__all__ = ["Batch", "LoadedData", "Loader", "load_data", "make_loader"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in ("Batch", "Loader", "make_loader"):
        return getattr(import_module(f"{__name__}.loader"), name)
    if name in ("LoadedData", "load_data"):
        return getattr(import_module(f"{__name__}.loading"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
