"""What a loss detaches: values that no gradient flows through, and that move all the same.

YOLOv5's objectness is trained towards the overlap of the present boxes, detached. As the boxes get better that target
moves, and the loss with it, by no part of any gradient. Held at what it was, the loss is what is really descended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CALLS = (torch.Tensor.detach, torch.detach)


class Recorded(TorchFunctionMode):
    """While it is entered, keeps a copy of every result of ``detach()``, in order.

    Attributes:
        values: The copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in the place of each of its functions."""
        found = func(*args, **(kwargs or {}))
        if func in _CALLS:
            with torch.no_grad():
                self.values.append(found.clone())
        return found


class Held(TorchFunctionMode):
    """While it is entered, ``detach()`` gives what it gave when it was recorded, call by call.

    Attributes:
        fits: Whether the calls are those that were recorded, as many and of the same shapes.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__()
        self._values, self._next, self._apart = list(values), 0, False

    @property
    def fits(self) -> bool:
        """Known when all is done."""
        return not self._apart and self._next == len(self._values)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in the place of each of its functions."""
        found = func(*args, **(kwargs or {}))
        if func not in _CALLS:
            return found
        held = self._values[self._next] if self._next < len(self._values) else None
        self._next += 1
        if held is None or held.shape != found.shape or held.dtype != found.dtype:
            self._apart = True
            return found
        with torch.no_grad():
            return held.clone()
