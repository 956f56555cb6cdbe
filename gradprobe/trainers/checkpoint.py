"""Weights to keep, and the state from which a training goes on as if it had never stopped."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradprobe import whole_files
from gradprobe.errors import RunFileError, UsageError


@dataclass(frozen=True)
class Paths:
    """The files that lie beside a run file."""

    run: Path

    @property
    def best(self) -> Path:
        """Weights of the best epoch on val."""
        return self.run.with_name(f"{self.run.stem}.best.pt")

    @property
    def last(self) -> Path:
        """Weights after the last step."""
        return self.run.with_name(f"{self.run.stem}.last.pt")

    @property
    def checkpoint(self) -> Path:
        """All state after the last whole epoch; removed when the training is finished."""
        return self.run.with_name(f"{self.run.stem}.checkpoint.pt")

    def existing(self) -> list[Path]:
        """Those that are there."""
        return [path for path in (self.best, self.last, self.checkpoint) if path.exists()]


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` so that the file is whole or the old one, also after a loss of power.

    Raises:
        OSError: The disk is full or gone; the old file is as it was.
    """
    buffer = io.BytesIO()  # torch raises errors of many kinds when a disk fills under it
    torch.save(dict(state), buffer)
    whole_files.write(path, buffer.getbuffer())


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read what :func:`save` wrote; only tensors and plain values are accepted.

    Raises:
        RunFileError: No such file, or not one of ours.
    """
    if not path.exists():
        raise RunFileError(f"{path}: no such checkpoint, so there is nothing to go on from. Record anew: --overwrite")
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise RunFileError(f"{path}: is not a readable checkpoint ({type(error).__name__}: {error}).") from error
    return state


def load_weights(model: nn.Module, path: str, device: str = "cpu") -> None:
    """Start from a ``state_dict``.

    Raises:
        UsageError: No such file, or weights of another model; names the first parameters that differ.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state)
    except FileNotFoundError:
        raise UsageError(f"--weights {path}: no such file.") from None
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        raise UsageError(f"--weights {path}: does not fit this model: {first}") from None


def fingerprint(model: nn.Module) -> str:
    """A hash of all parameters and buffers: equal for two runs that start from the same weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
