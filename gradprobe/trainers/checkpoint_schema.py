"""What a checkpoint holds, looked at value by value before anything is made of it: the file may be a stranger's.

What depends on the model (names and shapes of tensors, the state of a balancer) is compared with the training that was
built, by :func:`gradprobe.trainers.loop.load_state`; everything else here. Names that older versions did not write may
be missing; a name that this version does not know is refused, since what it says would be lost.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gradprobe.trainers.hyp import LOSS_KEYS, DetectionHyp
from gradprobe.trainers.settings import LONGEST, restored

MOST = 2**53
"""Of a count: what float64 still tells from its neighbours."""

DEEPEST = 16
"""Levels of dicts and lists within each other."""

Check = Callable[[str, Any], None]
"""Of a place, such as ``probe.clock.step``, and what stands there; raises a ValueError that says what should."""


def check(state: Any, size: int) -> None:
    """Whether something can be the state of a training between two epochs.

    Args:
        state: As it was read.
        size: Of the file, in bytes; no tensor in it is larger.

    Raises:
        ValueError: It cannot; says where, and what should stand there.
    """
    _bounded("", state, size, DEEPEST)
    _CHECKPOINT("", state)
    settings = restored(state["settings"])
    DetectionHyp(**state["hyp"])
    sharing = state["probe"]["meter"].get("sharing") or {"layers": (), "effect": (), "rows": ()}
    if len({len(sharing[name]) for name in ("layers", "effect", "rows")}) > 1:
        raise ValueError("probe.meter.sharing has not as many layers, effect and rows")
    if state["epoch"] > settings.epochs:
        raise ValueError(f"epoch is {state['epoch']}, of a training of {settings.epochs}")
    if not settings.keep_going:  # weights that are not finite have no finite loss, so the first step would end it
        finite("model", state["model"])
        finite("optimizer", state["optimizer"])
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


def finite(where: str, value: Any) -> None:
    """Raise a ValueError where a tensor or number within is not finite."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            finite(f"{where}.{key}", each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            finite(where, each)
    elif (isinstance(value, Tensor) and not value.isfinite().all()) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise ValueError(f"{where} is not finite: the training had diverged, or this is not what was saved")


def _bounded(where: str, value: Any, size: int, levels: int) -> None:
    """Only plain values and plain tensors, none larger than the file, not too deep."""
    if levels < 0:
        raise ValueError(f"{where[:200]} has more than {DEEPEST} levels")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            raise ValueError(f"{where} is no plain tensor")
        if value.numel() * value.element_size() > size:
            raise ValueError(f"{where} has the shape {tuple(value.shape)}, more numbers than the file holds")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if not (isinstance(key, str) or (type(key) is int and abs(key) < MOST)):
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


def whole(lowest: int = 0, highest: int = MOST) -> Check:
    """A whole number within bounds."""

    def look(where: str, value: Any) -> None:
        if type(value) is not int or not lowest <= value <= highest:
            raise _wrong(where, value, f"a whole number from {lowest} to {highest}")

    return look


def real(where: str, value: Any) -> None:
    """A number, not NaN."""
    if type(value) not in (int, float) or math.isnan(value):
        raise _wrong(where, value, "a number")


def flag(where: str, value: Any) -> None:
    """True or False."""
    if type(value) is not bool:
        raise _wrong(where, value, "True or False")


def text(where: str, value: Any) -> None:
    """A text without NUL, not longer than a path can be."""
    if not isinstance(value, str) or "\0" in value or len(value) > LONGEST:
        raise _wrong(where, value, f"a text of at most {LONGEST} characters")


def tensor(where: str, value: Any) -> None:
    """Of any type and shape."""
    if not isinstance(value, Tensor):
        raise _wrong(where, value, "a tensor")


def anything(where: str, value: Any) -> None:
    """Looked at by who loads it."""


def some(look: Check) -> Check:
    """None, or what ``look`` says."""
    return lambda where, value: None if value is None else look(where, value)


def several(look: Check) -> Check:
    """A list of them."""

    def each(where: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, value, "a list")
        for place, found in enumerate(value):
            look(f"{where}[{place}]", found)

    return each


def row(*looks: Check) -> Check:
    """A list of just these."""

    def each(where: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)) or len(value) != len(looks):
            raise _wrong(where, value, f"a list of {len(looks)}")
        for place, (look, found) in enumerate(zip(looks, value, strict=True)):
            look(f"{where}[{place}]", found)

    return each


def table(look: Check, kind: type = str) -> Check:
    """A dict of them under any names."""

    def each(where: str, value: Any) -> None:
        if not isinstance(value, Mapping) or not all(isinstance(key, kind) for key in value):
            raise _wrong(where, value, f"a dict with {kind.__name__} names")
        for key, found in value.items():
            look(f"{where}.{key}", found)

    return each


def fields(needed: Mapping[str, Check], may: Mapping[str, Check] | None = None) -> Check:
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


_CHECKPOINT = fields(
    {
        "settings": anything,  # by restored()
        "hyp": fields({}, dict.fromkeys(LOSS_KEYS, real)),
        "ignored_hyp": several(text),
        "data_fingerprint": text,
        "epoch": whole(),
        "best": real,
        "model": table(tensor),
        "optimizer": fields({"state": table(table(anything), int), "param_groups": several(table(anything))}),
        "schedule": table(anything),
        "balancer": table(anything),
        "scaler": table(anything),
        "probe": fields(
            {
                "clock": fields({"step": whole(), "calls": whole(), "last_asked": whole(-1)}),
                "meter": fields(
                    {
                        "last_gram": some(several(several(anything))),
                        "derived": row(whole(), flag),
                    },
                    {
                        "ghosts": row(flag, flag),  # of earlier versions
                        "sketched": whole(),
                        "guard": fields({"rows": table(whole()), "stopped": text, "mark": text, "moves": flag}),
                        "sharing": some(
                            fields(
                                {
                                    "layers": several(row(text, several(whole()))),
                                    "found": several(row(text, whole(), whole(0, 2**64), whole(), flag)),
                                    "effect": several(several(flag)),
                                    "rows": several(whole()),
                                    "told": several(text),
                                }
                            )
                        ),
                    },
                ),
                "epoch": whole(),
                "last_row": whole(-1),
                "last_metrics": whole(-1),
                "seconds": real,
            },
            {"updates": table(anything)},
        ),
        "rng": tensor,
    },
    {
        "plan": table(anything),
        "arm": text,
        "batches": fields({"hash": text, "count": whole()}),
        "id": text,
        "sum": text,
    },
)
"""All of it. ``id``: the run's, as in its file. ``sum``: :func:`digest`."""
