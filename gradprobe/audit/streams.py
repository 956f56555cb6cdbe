"""A random stream of its own for every place that draws, so that no draw moves another's."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_OWN = __name__.rpartition(".")[0] + "."
_ARM = str(Path("gradprobe", "audit", "arm.py"))


class OwnStreams(TorchDispatchMode):
    """While active, every random operation of torch draws from a stream that depends on the step, the module and the
    lines of code that it is called from, and on how often it was from there; and the generator it would have drawn
    from, global or not, is left where it was.

    Args:
        step: The number of the step.
        modules: The modules that are running, outermost first; kept by :func:`_modules_watched`.
    """

    def __init__(self, step: int, modules: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = 0
        self._step, self._modules = step, modules
        self._seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.draws += 1
        generator = _generator(args, kwargs)
        before = generator.get_state()
        generator.manual_seed(self._seed())
        try:
            return func(*args, **kwargs)
        finally:
            generator.set_state(before)

    def _seed(self) -> int:
        place = (self._step, *self._modules, *_lines())
        self._seen[place] += 1
        return _seed(*place, self._seen[place])


def _seed(*parts: Any) -> int:
    """A number for a random generator that is a function of the parts alone.

    >>> _seed(1, "a") == _seed(1, "a"), _seed(1, "a") == _seed(2, "a")
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


def _lines() -> Iterator[str]:
    """The lines that led here, from within the step: what called the step differs between the arms.

    Of a file only its name counts: an audit must not depend on the folder that the code is in. The audit's own lines do
    not count at all: another version of it would draw other numbers.
    """
    frame = sys._getframe(3)
    while frame is not None and not (frame.f_code.co_name == "advance" and frame.f_code.co_filename.endswith(_ARM)):
        if not frame.f_globals.get("__name__", "").startswith(_OWN):
            yield f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]


def _generator(args: Any, kwargs: dict[str, Any]) -> torch.Generator:
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)]
    if given:
        return given[0]
    tensors = [a.device for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    device = torch.device(kwargs.get("device") or (tensors[0] if tensors else "cpu"))
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


@contextmanager
def _modules_watched(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keeps the names of the modules whose forward is running in ``running``."""

    def entered(name: str) -> Any:
        return lambda module, args: running.append(name)

    def left(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(entered(name)).remove)
            stack.callback(module.register_forward_hook(left, always_call=True).remove)
        yield


@contextmanager
def own_streams(model: nn.Module, step: int) -> Iterator[OwnStreams]:
    """Streams of their own for torch; Python's and numpy's global streams begin each step at a number of the step's."""
    running: list[str] = []
    random.seed(_seed("python", step))
    np.random.seed(_seed("numpy", step) % 2**32)
    with _modules_watched(model, running), OwnStreams(step, running) as mode:
        yield mode
