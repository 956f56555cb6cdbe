"""Where a run came from: versions and machine, without personal names or absolute paths."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

_PACKAGES = (
    "gradprobe",
    "torch",
    "numpy",
    "h5py",
    "torchvision",
    "yolov5",
    "lightning",
    "pytorch-lightning",
    "transformers",
    "accelerate",
    "ultralytics",
)


def environment() -> dict[str, Any]:
    """Versions of what matters to a number, and what kind of machine it is."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "machine": platform.machine(), "system": platform.system()}


def argv() -> list[str]:
    """The command line with every path cut to its own name: folders tell who and where, not what."""
    return [Path(sys.argv[0]).name, *(_without_folders(word) for word in sys.argv[1:])]


def _without_folders(word: str) -> str:
    flag, equals, value = word.partition("=")
    if equals and flag.startswith("-"):
        return f"{flag}={_without_folders(value)}"
    return Path(word).name if ("/" in word or "\\" in word) and not word.startswith("-") else word
