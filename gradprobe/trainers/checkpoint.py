"""Weights to keep, and the state from which a training goes on as if it had never stopped."""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradprobe import whole_files
from gradprobe.errors import GradprobeError, RunFileError, UsageError
from gradprobe.trainers.hyp import LOSS_KEYS, DetectionHyp
from gradprobe.trainers.settings import LONGEST, restored

__all__ = ["ANEW", "load", "save"]


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
        _check_state(state, size)
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


# ---- what a checkpoint holds, looked at value by value before anything is made of it: the file may be a stranger's
# What depends on the model (names and shapes of tensors, the state of a balancer) is compared with the training that
# was built, by `loop.load_training_state`; everything else here. Names that older versions did not write may be
# missing; a name that this version does not know is refused, since what it says would be lost.

_MOST = 2**53
"""Of a count: what float64 still tells from its neighbours."""

_DEEPEST = 16
"""Levels of dicts and lists within each other."""

_Check = Callable[[str, Any], None]
"""Of a place, such as ``probe.clock.step``, and what stands there; raises a ValueError that says what should."""


def _check_state(state: Any, size: int) -> None:
    """Whether something can be the state of a training between two epochs.

    Args:
        state: As it was read.
        size: Of the file, in bytes; no tensor in it is larger.

    Raises:
        ValueError: It cannot; says where, and what should stand there.
    """
    _bounded("", state, size, _DEEPEST)
    _CHECKPOINT("", state)
    settings = restored(state["settings"])
    DetectionHyp(**state["hyp"])
    sharing = state["probe"]["meter"].get("sharing") or {"layers": (), "effect": (), "rows": ()}
    if len({len(sharing[name]) for name in ("layers", "effect", "rows")}) > 1:
        raise ValueError("probe.meter.sharing has not as many layers, effect and rows")
    if state["epoch"] > settings.epochs:
        raise ValueError(f"epoch is {state['epoch']}, of a training of {settings.epochs}")
    if not settings.keep_going:  # weights that are not finite have no finite loss, so the first step would end it
        _check_finite("model", state["model"])
        _check_finite("optimizer", state["optimizer"])
    if "sum" in state and state["sum"] != digest(state):
        raise ValueError("its content is not what was saved: the sum over it is another one")
    if ("sum" in state) != ("id" in state):
        raise ValueError("it has one of id and sum without the other")


def digest(state: Mapping[str, Any]) -> str:
    """A hash of all values in a state but its own ``sum``: torch reads a file whose bits have flipped as it is."""
    total = hashlib.sha256()
    for piece in _pieces({name: value for name, value in state.items() if name != "sum"}):
        total.update(piece)
    return total.hexdigest()


def _pieces(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, Mapping):
        yield b"{%d" % len(value)
        for key, each in value.items():
            yield repr(key).encode("utf-8", "surrogatepass")
            yield from _pieces(each)
    elif isinstance(value, (list, tuple)):
        yield b"[%d" % len(value)
        for each in value:
            yield from _pieces(each)
    else:
        yield repr(value).encode("utf-8", "surrogatepass") + b";"


def _check_finite(where: str, value: Any) -> None:
    """Raise a ValueError where a tensor or number within is not finite."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            _check_finite(f"{where}.{key}", each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check_finite(where, each)
    elif (isinstance(value, Tensor) and not value.isfinite().all()) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise ValueError(f"{where} is not finite: the training had diverged, or this is not what was saved")


def _bounded(where: str, value: Any, size: int, levels: int) -> None:
    """Only plain values and plain tensors, none larger than the file, not too deep."""
    if levels < 0:
        raise ValueError(f"{where[:200]} has more than {_DEEPEST} levels")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            raise ValueError(f"{where} is no plain tensor")
        if value.numel() * value.element_size() > size:
            raise ValueError(f"{where} has the shape {tuple(value.shape)}, more numbers than the file holds")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if not (isinstance(key, str) or (type(key) is int and abs(key) < _MOST)):
                raise ValueError(f"{where or 'it'} has a {type(key).__name__} as a name")
            _bounded(f"{where}.{key}" if where else str(key), each, size, levels - 1)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _bounded(where, each, size, levels - 1)
    elif isinstance(value, int):
        if abs(value) >= 2**64:
            raise ValueError(f"{where} is a whole number of {value.bit_length()} bits")
    elif not (value is None or isinstance(value, (float, str))):
        raise ValueError(f"{where or 'it'} is a {type(value).__name__}, which no checkpoint holds")


# ---- what can stand at a place


def _wrong(where: str, value: Any, what: str) -> ValueError:
    shown = type(value).__name__ if isinstance(value, (Tensor, Mapping, list, tuple)) else repr(value)[:80]
    return ValueError(f"{where or 'it'} is {shown}, not {what}")


def _whole(lowest: int = 0, highest: int = _MOST) -> _Check:
    """A whole number within bounds."""

    def look(where: str, value: Any) -> None:
        if type(value) is not int or not lowest <= value <= highest:
            raise _wrong(where, value, f"a whole number from {lowest} to {highest}")

    return look


def _real(where: str, value: Any) -> None:
    """A number, not NaN."""
    if type(value) not in (int, float) or math.isnan(value):
        raise _wrong(where, value, "a number")


def _flag(where: str, value: Any) -> None:
    """True or False."""
    if type(value) is not bool:
        raise _wrong(where, value, "True or False")


def _text(where: str, value: Any) -> None:
    """A text without NUL, not longer than a path can be."""
    if not isinstance(value, str) or "\0" in value or len(value) > LONGEST:
        raise _wrong(where, value, f"a text of at most {LONGEST} characters")


def _tensor(where: str, value: Any) -> None:
    """Of any type and shape."""
    if not isinstance(value, Tensor):
        raise _wrong(where, value, "a tensor")


def _anything(where: str, value: Any) -> None:
    """Looked at by who loads it."""


def _optional(look: _Check) -> _Check:
    """None, or what ``look`` says."""
    return lambda where, value: None if value is None else look(where, value)


def _list_of(look: _Check) -> _Check:
    """A list of them."""

    def each(where: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, value, "a list")
        for place, found in enumerate(value):
            look(f"{where}[{place}]", found)

    return each


def _list(*looks: _Check) -> _Check:
    """A list of just these."""

    def each(where: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)) or len(value) != len(looks):
            raise _wrong(where, value, f"a list of {len(looks)}")
        for place, (look, found) in enumerate(zip(looks, value, strict=True)):
            look(f"{where}[{place}]", found)

    return each


def _dict_of(look: _Check, kind: type = str) -> _Check:
    """A dict of them under any names."""

    def each(where: str, value: Any) -> None:
        if not isinstance(value, Mapping) or not all(isinstance(key, kind) for key in value):
            raise _wrong(where, value, f"a dict with {kind.__name__} names")
        for key, found in value.items():
            look(f"{where}.{key}", found)

    return each


def _dict(needed: Mapping[str, _Check], may: Mapping[str, _Check] | None = None) -> _Check:
    """A dict with these names, those in ``may`` optional, and no others."""
    known = {**needed, **(may or {})}

    def each(where: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, f"a dict with {', '.join(needed)}")
        if lacking := [name for name in needed if name not in value]:
            raise ValueError(f"{where or 'it'} lacks {', '.join(lacking)}")
        if others := [str(name)[:80] for name in value if name not in known]:
            raise ValueError(f"{where or 'it'} holds {others[0]!r}, which this version of gradprobe does not know")
        for name, found in value.items():
            known[name](f"{where}.{name}" if where else name, found)

    return each


_CHECKPOINT = _dict(
    {
        "settings": _anything,  # by restored()
        "hyp": _dict({}, dict.fromkeys(LOSS_KEYS, _real)),
        "ignored_hyp": _list_of(_text),
        "data_fingerprint": _text,
        "epoch": _whole(),
        "best": _real,
        "model": _dict_of(_tensor),
        "optimizer": _dict(
            {"state": _dict_of(_dict_of(_anything), int), "param_groups": _list_of(_dict_of(_anything))}
        ),
        "schedule": _dict_of(_anything),
        "balancer": _dict_of(_anything),
        "scaler": _dict_of(_anything),
        "probe": _dict(
            {
                "clock": _dict({"step": _whole(), "calls": _whole(), "last_asked": _whole(-1)}),
                "meter": _dict(
                    {
                        "last_gram": _optional(_list_of(_list_of(_anything))),
                        "derived": _list(_whole(), _flag),
                    },
                    {
                        "ghosts": _list(_flag, _flag),  # of earlier versions
                        "sketched": _whole(),
                        "guard": _dict({"rows": _dict_of(_whole()), "stopped": _text, "mark": _text, "moves": _flag}),
                        "sharing": _optional(
                            _dict(
                                {
                                    "layers": _list_of(_list(_text, _list_of(_whole()))),
                                    "found": _list_of(_list(_text, _whole(), _whole(0, 2**64), _whole(), _flag)),
                                    "effect": _list_of(_list_of(_flag)),
                                    "rows": _list_of(_whole()),
                                    "told": _list_of(_text),
                                }
                            )
                        ),
                    },
                ),
                "epoch": _whole(),
                "last_row": _whole(-1),
                "last_metrics": _whole(-1),
                "seconds": _real,
            },
            {"updates": _dict_of(_anything)},
        ),
        "rng": _tensor,
    },
    {
        "plan": _dict_of(_anything),
        "arm": _text,
        "batches": _dict({"hash": _text, "count": _whole()}),
        "id": _text,
        "sum": _text,
    },
)
"""All of it. ``id``: the run's, as in its file. ``sum``: :func:`digest`."""
