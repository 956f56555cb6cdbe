"""What a model's forward gave, handed out again in its place where nothing can have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from gradprobe.probes.state import where_random_streams_are

_Forward = Callable[..., Any]


@dataclass
class _Call:
    """One call of the forward.

    Attributes:
        given, gave: What it was called with and what came of it, as lists of tensors and plain values.
        shapes: How to put both together again.
        versions: Of the tensors among them.
    """

    given: list[Any]
    gave: list[Any]
    shapes: tuple[Any, Any]
    versions: list[int]

    def untouched(self) -> bool:
        """Whether nobody has written into what was given and what came of it."""
        return [t._version for t in (*self.given, *self.gave) if isinstance(t, Tensor)] == self.versions

    def fits(self, given: Sequence[Any], shape: Any) -> bool:
        """Whether it was called with the same."""
        return (
            shape == self.shapes[0]
            and self.untouched()
            and all(_same(one, other) for one, other in zip(given, self.given, strict=True))
        )


class RememberedForwards:
    """The calls of a model's forward while some losses are made.

    The same losses can then be made again at the same parameters without these forwards, as far as a call was given the
    same, drew no random number, detached nothing, and nobody wrote into what it gave. What a forward leaves behind
    elsewhere (in an attribute, a list of a hook) for the loss to find is not seen here.

    Args:
        model: Is called to make the losses.
        detached: How many values were detached so far.
    """

    def __init__(self, model: nn.Module, detached: Callable[[], int]) -> None:
        self._model, self._detached = model, detached
        self._calls: list[_Call | None] = []
        self._drew = False

    def __bool__(self) -> bool:
        """Whether any can be handed out."""
        return any(call is not None and call.untouched() for call in self._calls)

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Remember the calls made within."""

        def call(forward: _Forward, *given: Any, **named: Any) -> Any:
            before, streams = self._detached(), where_random_streams_are()
            found = forward(*given, **named)
            self._drew |= streams != where_random_streams_are()
            plain = not self._drew and self._detached() == before
            self._calls.append(_remembered((given, named), found) if plain else None)
            return found

        with _before_forward(self._model, call):
            yield

    def let_go_of_graphs(self) -> None:
        """Once the losses are made that need what the forwards gave."""
        for call in filter(None, self._calls):
            call.gave = [t.detach() if isinstance(t, Tensor) and t.requires_grad else t for t in call.gave]

    @contextmanager
    def handing_out(self) -> Iterator[None]:
        """Within it the forward gives what it gave, call by call, and runs where that cannot be known."""
        calls = iter(self._calls)

        def call(forward: _Forward, *given: Any, **named: Any) -> Any:
            known = next(calls, None)
            if known is None or not known.fits(*tree_flatten((given, named))):
                return forward(*given, **named)
            return tree_unflatten(known.gave, known.shapes[1])

        with _before_forward(self._model, call):
            yield


def _remembered(given: Any, found: Any) -> _Call | None:
    """None: there is something in it that may change by other ways."""
    (inputs, first), (outputs, last) = tree_flatten(given), tree_flatten(found)
    known = (Tensor, int, float, bool, str, type(None))
    if not all(isinstance(one, known) for one in (*inputs, *outputs)):
        return None
    versions = [t._version for t in (*inputs, *outputs) if isinstance(t, Tensor)]
    return _Call(inputs, outputs, (first, last), versions)


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return bool(type(one) is type(other) and one == other)
    same_kind = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return one is other or (same_kind and torch.equal(one, other))


@contextmanager
def _before_forward(model: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Within it ``call(forward, ...)`` is made in the place of ``forward(...)``."""
    forward, held = model.forward, vars(model)
    own = "forward" in held
    held["forward"] = lambda *given, **named: call(forward, *given, **named)
    try:
        yield
    finally:
        if own:
            held["forward"] = forward
        else:
            held.pop("forward", None)
