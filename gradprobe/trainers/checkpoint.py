"""Weights to keep, and the state from which a training goes on as if it had never stopped."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradprobe import whole_files
from gradprobe.errors import GradprobeError, RunFileError, UsageError
from gradprobe.trainers import checkpoint_schema
from gradprobe.trainers.paths import Paths as Paths

ANEW = "Put this run's own checkpoint there, or record anew: --overwrite"
"""What can be done about a checkpoint that does not serve."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` so that the file is whole or the old one, also after a loss of power.

    Raises:
        OSError: The disk is full or gone; the old file is as it was.
    """
    buffer = io.BytesIO()  # torch raises errors of many kinds when a disk fills under it
    torch.save(dict(state), buffer)
    whole_files.write(path, buffer.getbuffer())


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read a state that :func:`save` wrote; only tensors and plain values are accepted, and only where they belong.

    Raises:
        RunFileError: No such file, or not one of ours; says what is wrong with it.
    """
    if not os.path.lexists(path):
        raise RunFileError(f"{path}: no such checkpoint, so there is nothing to go on from. {ANEW}")
    try:
        size = _size(path)
        with zipfile.ZipFile(path) as file:  # as torch writes it; packed parts could be of any size
            if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
                raise ValueError("it is compressed, as none of ours is")
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        checkpoint_schema.check(state, size)
    except Exception as error:
        raise RunFileError(f"{path}: is no checkpoint to go on from ({_reason(error)}). {ANEW}") from error
    return state


@contextmanager
def fitting(path: Path, part: str) -> Iterator[None]:
    """Within it, an error means that a part of a state is not of the training that takes it.

    Raises:
        RunFileError: Instead of that error.
    """
    try:
        yield
    except Exception as error:
        raise RunFileError(
            f"{path}: its {part} is not of this training ({_reason(error)}). The run is as it was. {ANEW}"
        ) from error


def _size(path: Path) -> int:
    """Bytes of a regular file; a device or FIFO would be waited for, or never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    return found.st_size


def _reason(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    said = " ".join(str(error).split()).rstrip(".")
    kind = "" if isinstance(error, (ValueError, GradprobeError)) else type(error).__name__
    return ": ".join(filter(None, (kind, said[:300])))


def load_weights(model: nn.Module, path: str, device: str = "cpu") -> None:
    """Start from a ``state_dict``.

    Raises:
        UsageError: No such file, or weights of another model; names the first parameters that differ.
    """
    try:
        _size(Path(path))
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state)
    except FileNotFoundError:
        raise UsageError(f"--weights {path}: no such file.") from None
    except Exception as error:
        raise UsageError(f"--weights {path}: does not fit this model: {_reason(error)}") from None


def fingerprint(model: nn.Module) -> str:
    """A hash of all parameters and buffers: equal for two runs that start from the same weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
