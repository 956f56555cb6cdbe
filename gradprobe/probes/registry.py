"""Which model has a probe: one at a time, so that none measures another's passes."""

from __future__ import annotations

import dis
import weakref
from types import FrameType
from typing import Any, Protocol

from torch import nn

from gradprobe.errors import ProbeError


class Attached(Protocol):
    """What is registered here."""

    def close(self, end: str = "finished") -> None:
        """Let go of the model."""


_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attached]] = weakref.WeakKeyDictionary()


def claim(model: nn.Module, probe: Attached) -> None:
    """Note that ``model`` has ``probe`` now."""
    _attached[model] = weakref.ref(probe)


def release(model: nn.Module, probe: Attached) -> None:
    """Note that ``probe`` has let go of ``model``."""
    if _holder(model) is probe:
        del _attached[model]


def make_room(model: nn.Module, caller: FrameType | None) -> None:
    """Make sure that a new probe may attach.

    A cell of a notebook that is run again says ``probe = attach(model, ...)`` while ``probe`` still is the old one.
    The old one is closed then, since this very assignment is about to lose it. It is told from any other second
    attachment by the instruction that follows the call in ``caller``: a store to the variable that holds the old one.

    Raises:
        ProbeError: The model has a probe that something else holds.
    """
    old = _holder(model)
    if old is None:
        return
    if caller is not None and _about_to_be_assigned(caller) is old:
        old.close("finished")
        return
    raise ProbeError(
        f"this model ({type(model).__name__}) has a probe already, and two would measure each other. Close it first: "
        "probe.close(), or use it in a `with` block. In a notebook, assign the new probe to the variable that holds "
        "the old one."
    )


def _holder(model: nn.Module) -> Attached | None:
    reference = _attached.get(model)
    return reference() if reference is not None else None


def _about_to_be_assigned(frame: FrameType) -> Any:
    """What the variable holds now to which the result of the running call goes; None where it goes elsewhere."""
    following = (i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti and i.opname != "CACHE")
    store = next(following, None)
    if store is None or store.opname not in ("STORE_NAME", "STORE_GLOBAL", "STORE_FAST"):
        return None
    if store.opname == "STORE_GLOBAL":
        return frame.f_globals.get(store.argval)
    return frame.f_locals.get(store.argval)
