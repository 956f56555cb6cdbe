"""One row from the calls between two optimizer steps: gradient accumulation.

The calls' batches are micro-batches of the step: the step's task gradient is the mean of theirs, and their products
tell the noise of its Gramian. Each call hands its losses undivided; where a loop weights its calls, by their samples
say, it multiplies each call's losses by that weight times the number of calls.

Calls of one forward are one micro-batch, of which each may hand in some of the tasks (one backward per loss, say); what
was handed in before is not measured again. A task that is absent from some calls has the mean of the others.

Alive between two calls are T copies of the shared parameters, and as many more after a call that lacks tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradprobe.measures import Array
from gradprobe.probes.calls import Call, Losses, Noise, is_present, joined, padded
from gradprobe.probes.graph import is_leaf, reached, trace
from gradprobe.probes.passes import Gradients, multiplied, wide
from gradprobe.probes.shared_layers import SharedLayers
from gradprobe.probes.task_gradients import TaskGradients
from gradprobe.rows import FIRST_CALL, JOINED_WITHIN, MEASURED
from gradprobe.statistics import noise_part

_DROPS = 3
"""So often within a step what was measured is given up for the next call, in a loop whose ``.grad`` was never seen."""


class Accumulation:
    """Collects the calls of a step that is measured.

    Args:
        tasks: (T,) names.
        gradients: Makes them.
        expected: Whether steps consist of several calls; None: the first step will tell.
        by_gradients: Whether it is told by ``.grad`` if a further call belongs to the step; if not, every call does
            until so many were made, unless ``.grad`` was there and is gone.
        agree: Makes the first process's answer that of all.
        emit: Gets the calls of a step, the Gramian (L, T, T) of their mean and its noise.
        loss_scale: The present one; it falls where a step is left out.
        again: Told that the calls so far were dropped, and another is the first.
        guarded: Gives a result, or None and why there is none.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        gradients: TaskGradients,
        expected: bool | None,
        by_gradients: bool,
        agree: Callable[[bool], bool],
        emit: Callable[[Sequence[Call], Array | None, Noise | None], None],
        loss_scale: Callable[[], float] = lambda: 1.0,
        again: Callable[[], None] = lambda: None,
        guarded: Callable[[Callable[[], Any]], tuple[Any, str]] = lambda work: (work(), MEASURED),
    ) -> None:
        self._tasks, self._source, self._by_gradients, self._agree, self._emit = (
            tasks,
            gradients,
            by_gradients,
            agree,
            emit,
        )
        self._loss_scale, self._again, self._guarded = loss_scale, again, guarded
        self._waits = expected is not False
        self._expected = expected if gradients.keeps else False
        self._calls: list[Call] = []
        self._uses: list[_Uses | None] = []  # of each call, once it was asked for
        self._means: list[Gradients] = []
        self._counts: list[int] = []  # (T,) how many calls each mean is of
        self._partial: list[Gradients] = []  # of the last call, where it lacks tasks
        self._of: SharedLayers | None = None  # which layers the gradients are of
        self._joined: int | None = None  # the call whose forward the present one is of
        self._scale, self._drops = 1.0, 0
        self._collecting = self._lent = self._seen = False

    @property
    def several(self) -> bool:
        """Whether a step may have further calls, as far as is known."""
        return self._expected is not False

    def stop(self) -> None:
        """The first call stands for its step from here on: an observer looks at single calls."""
        self._expected = self._waits = False

    def due(self, first: bool, due: bool, losses: Losses) -> bool:
        """Whether a call is measured.

        Args:
            first: Whether it is the first one of the step.
            due: Whether the step is, as far as the first call is concerned.
            losses: Of the call.
        """
        self._joined = None
        if first:
            self.finish()
            self._drops = 0
            self._begin(due and self._expected is not False)
            return due
        if not self._calls:
            return False
        if self._loss_scale() < self._scale:  # the scaler left a step out, and what went before is dropped
            self.finish()
            return False
        place, _ = self._guarded(lambda: self._of_one_forward(losses))
        if place is not None:
            return self._join(place, losses)
        if not self._more():  # dropped: the optimizer will not take them
            if self._drops >= _DROPS and not self._seen:  # or gradients are kept elsewhere
                return False
            self._drops += 1
            self._forget()
            self._again()
            self._begin(self._expected is not False)
            return True
        several = self._expected is not False
        self._expected = self._source.keeps
        if several:
            self._begin(True)
        elif self._expected:  # steps that grow, as in a warm-up: seen too late for this one
            self._calls[-1] = replace(self._calls[-1], status=FIRST_CALL)
        return several

    def would_be_due(self, first: bool, due: bool) -> bool:
        """What :meth:`due` would say of a further forward, without asking."""
        return due if first else bool(self._calls) and self._expected is not False and self._more()

    def takes(self, call: Call, scale: float) -> bool:
        """Whether a call is kept until the step is complete; else its row is to be handed on at once.

        Args:
            call: As it was measured.
            scale: The loss scale that was in force.
        """
        if not self._waits:
            return False
        self._scale = scale
        _, status = self._guarded(lambda: self._take(call))
        if status != MEASURED:
            self._forget()
            self._calls, self._uses = [replace(call, gram=None, status=status)], [None]
        self._give_back()
        return True

    def _take(self, call: Call) -> None:
        gradients = list(self._source.kept or []) if self._collecting else []
        self._follow_layers()
        new = call.present if self._joined is None else call.present & ~self._calls[self._joined].present
        if self._joined is not None:
            self._merge(self._joined, call, gradients)
        else:
            self._calls.append(call)
            self._uses.append(None)
            self._partial = gradients if not call.present.all() else []
        self._add(gradients, new)

    def finish(self, *_: object) -> None:
        """The step is complete: hand on its row. Also called by the optimizer, before its step."""
        self._give_back()
        self._follow_layers()
        calls, means = self._calls, self._means
        self._forget()
        if not calls:
            return
        if len(calls) == 1:
            self._expected = self._expected or False
            self._emit(calls, calls[0].gram, calls[0].noise)
            return
        if any(call.gram is None for call in calls) or self._source.shared is None:
            self._emit(calls, None, Noise(None, len(calls)))
            return
        found, status = self._guarded(lambda: self._mean_of(calls, means))
        if found is None:
            self._emit([*calls[:-1], replace(calls[-1], gram=None, status=status)], None, Noise(None, len(calls)))
            return
        if self._source.kept is not None:
            self._source.kept[:] = means
        self._emit(calls, *found)

    def _mean_of(self, calls: Sequence[Call], means: Sequence[Gradients]) -> tuple[Array, Noise]:
        assert self._source.shared is not None
        gram = multiplied(self._source.shared, means) if means else calls[-1].gram
        assert gram is not None
        return gram, _noise_of(calls, gram)

    def settle(self) -> None:
        """Hand on the row of what the present step has so far, unless that was dropped."""
        if self._calls and self._seen and self._loss_scale() >= self._scale and not self._more():
            self._give_back()
            self._forget()
        self.finish()

    def _follow_layers(self) -> None:
        """Layers may have joined since the calls before: what they brought is put where it belongs now."""
        shared, known = self._source.shared, self._of
        if shared is not None and known is not None and self._calls and known.layers is not shared.layers:
            self._means = [_moved(own, known, shared) for own in self._means]
            self._partial = [_moved(own, known, shared) for own in self._partial]
            self._calls = [_widened(call, len(shared.layers)) for call in self._calls]
            if _reach_more(self._calls, known, shared):
                self._calls[-1] = replace(self._calls[-1], status=JOINED_WITHIN)
        self._of = shared

    def _begin(self, collecting: bool) -> None:
        self._collecting = collecting
        if collecting and self._source.kept is None:
            self._source.kept, self._lent = [], True

    def _give_back(self) -> None:
        """Gradients are kept for others, or none."""
        if self._lent:
            self._source.kept, self._lent = None, False
        self._collecting = False

    def _forget(self) -> None:
        self._calls, self._uses, self._means, self._counts, self._partial = [], [], [], [], []

    def _more(self) -> bool:
        """Whether gradients of earlier calls are there, to which those of this one are added."""
        parameters = self._parameters()
        there = self._agree(any(p.grad is not None and bool(torch.count_nonzero(p.grad)) for p in parameters))
        self._seen = self._seen or there
        return there or not (self._by_gradients or self._seen)

    def _of_one_forward(self, losses: Losses) -> int | None:
        """The call whose forward some losses are of; the latest first."""
        own = self._used(losses)
        for place in reversed(range(len(self._calls))):
            earlier = self._uses[place] or self._used(self._calls[place].losses)
            self._uses[place] = earlier
            if same_forward(own, earlier):
                return place
        return None

    def _used(self, losses: Losses) -> _Uses:
        there = [loss for loss in losses.values() if is_present(loss)]
        return uses_of(there, self._parameters())

    def _parameters(self) -> Sequence[nn.Parameter]:
        """The shared ones; the model's where none is known to be shared yet, as of a call that lacks tasks."""
        shared = self._source.shared
        return shared.parameters if shared is not None and shared.layers else self._source.parameters

    def _join(self, place: int, losses: Losses) -> bool:
        """Whether a call of a forward that was measured brings tasks that were not."""
        known = dict(zip(self._tasks, self._calls[place].present, strict=True))
        if all(known.get(task, True) or not is_present(loss) for task, loss in losses.items()):
            return False
        able, self._expected = self._expected is not False, self._source.keeps
        if able:
            self._joined = place
            self._begin(True)
        return able

    def _merge(self, place: int, call: Call, gradients: Sequence[Gradients]) -> None:
        """A call brings further tasks of a forward that another began."""
        earlier = self._calls[place]
        last = place == len(self._calls) - 1
        both = _first_known(self._partial, gradients, earlier.present) if last and self._partial and gradients else []
        gram = multiplied(self._source.shared, both) if both and self._source.shared is not None else None
        if gram is None and earlier.gram is not None and call.gram is not None:  # their products are not known
            gram = np.where(np.isnan(earlier.gram), call.gram, earlier.gram)
        merged = joined(earlier, call, gram)
        self._calls[place] = merged
        self._uses[place] = None
        if last:
            self._partial = both if not merged.present.all() else []

    def _add(self, gradients: Sequence[Gradients], new: NDArray[np.bool_]) -> None:
        """Take the gradients of some tasks, (T,) bool, into the means."""
        if not self._means:
            self._means = [list(own) for own in gradients]
            self._counts = [int(there) for there in new][: len(gradients)]
            return
        for task, own in enumerate(gradients):
            if not new[task]:
                continue
            mean, count = self._means[task], self._counts[task]
            self._counts[task] += 1
            for index, gradient in enumerate(own):
                mean[index] = _mean(mean[index], gradient, count) if count else gradient


def _first_known(one: Sequence[Gradients], other: Sequence[Gradients], known: NDArray[np.bool_]) -> list[Gradients]:
    """(T) gradients: of the tasks that are known the first ones, of the others the second."""
    return [mine if there else yours for mine, yours, there in zip(one, other, known, strict=True)]


def _moved(gradients: Gradients, known: SharedLayers, shared: SharedLayers) -> Gradients:
    """Gradients on the parameters of some layers as those on the parameters of more."""
    there = {id(p): gradient for p, gradient in zip(known.parameters, gradients, strict=True)} if gradients else {}
    return [there.get(id(p)) for p in shared.parameters]


def _reach_more(calls: Sequence[Call], known: SharedLayers, shared: SharedLayers) -> bool:
    """Whether some calls had a gradient on parameters that were no part of a layer then."""
    new = {id(p) for p in shared.parameters} - {id(p) for p in known.parameters}
    return any(new & reached(loss).keys() for call in calls for loss in call.losses.values() if is_present(loss))


def _widened(call: Call, layers: int) -> Call:
    noise = call.noise
    if noise is not None and noise.part is not None:
        noise = replace(noise, part=padded(noise.part, layers))
    return replace(call, gram=None if call.gram is None else padded(call.gram, layers), noise=noise)


def _mean(mean: Tensor | None, gradient: Tensor | None, count: int) -> Tensor | None:
    """The mean of ``count`` gradients and one more; None counts as 0. Not in place: the first may be another's."""
    if mean is None or gradient is None:
        there = mean if mean is not None else gradient
        return None if there is None else wide(there) * ((count if gradient is None else 1) / (count + 1))
    return wide(mean) * (count / (count + 1)) + wide(gradient) / (count + 1)


def _noise_of(calls: Sequence[Call], gram: Array) -> Noise:
    """The noise part of the Gramian of the mean of some calls; NaN for a task, or a pair, that is not in all of them.

    A layer that a task reaches in some calls only counts as a gradient of 0 in the others.
    """
    count = len(calls)
    parts = np.sum([_known(call.parts) for call in calls], axis=0) / count**2
    shares = [share / count for call in calls for share in call.shares]
    there = np.all([call.present for call in calls], axis=0)
    known = there[:, None] & there[None, :] & ~np.any([_lacks(call.parts) for call in calls], axis=0)
    with np.errstate(invalid="ignore"):  # of gradients that are not finite
        part = noise_part(gram, parts, shares)
    return Noise(np.where(known, part, np.nan), len(shares))


def _known(parts: Array) -> Array:
    return np.where(np.isfinite(parts), parts, 0.0)


def _lacks(parts: Array) -> NDArray[np.bool_]:
    """(L, T, T): pairs whose product is not known though both have a gradient: they came in calls far apart."""
    there = ~np.isnan(np.diagonal(parts, axis1=-2, axis2=-1))
    lacks: NDArray[np.bool_] = np.isnan(parts) & there[..., :, None] & there[..., None, :]
    return lacks


_Operation = tuple[int, str]
"""Sequence number and kind of an operation; the number is its own as long as the forwards run in one thread."""


@dataclass(frozen=True)
class _Uses:
    """What a call's losses were made by.

    Attributes:
        losses: The operations that made the losses themselves.
        parameters: ``id`` of a parameter -> the operations that joined it with something else, such as a layer's input.
        operations: All of them.
    """

    losses: frozenset[_Operation]
    parameters: dict[int, frozenset[_Operation]]
    operations: frozenset[_Operation]


def uses_of(losses: Iterable[Tensor], parameters: Collection[Tensor]) -> _Uses:
    """Read off the graph.

    What is made of a parameter alone (a transposed or a shorter copy) may be kept for several forwards, so such
    operations are passed over.
    """
    roots, wanted = list(losses), {id(p) for p in parameters}
    found: dict[int, set[_Operation]] = {}
    nodes = [node for node in trace(roots).nodes if not is_leaf(node)]
    for node in nodes:
        if len(node.next_functions) == 1:
            continue
        for child, _ in node.next_functions:
            leaf = _leaf_below(child)
            if id(leaf) in wanted:
                found.setdefault(id(leaf), set()).add(_name(node))
    made = frozenset(_name(loss.grad_fn) for loss in roots if loss.grad_fn is not None)
    used = {leaf: frozenset(by) for leaf, by in found.items()}
    return _Uses(made, used, frozenset(map(_name, nodes)))


def same_forward(one: _Uses, other: _Uses) -> bool:
    """Whether ``one`` is of the forward that ``other`` is of.

    It is where all its losses are the other's, or where both use the parameters that they have in common by the same
    operations. One may use a parameter more often than the other, as heads at different depths do; where each has a
    use of its own, the forward ran twice, whatever else they share (a penalty that was made once, say). Where no
    parameter is visible in both (behind a reentrant checkpoint), any operation in common will do.
    """
    if one.losses and one.losses <= other.losses:
        return True
    common = one.parameters.keys() & other.parameters.keys()
    pairs = [(one.parameters[p], other.parameters[p]) for p in common]
    if not pairs:
        return bool(one.operations & other.operations)
    return all(own <= theirs or theirs <= own for own, theirs in pairs)


def _leaf_below(node: Any) -> object:
    """The leaf that a chain of operations on one tensor begins with; None: there is none."""
    while node is not None and not is_leaf(node):
        if len(node.next_functions) != 1:
            return None
        node = node.next_functions[0][0]
    return None if node is None else node.variable


def _name(node: Any) -> _Operation:
    return node._sequence_nr(), type(node).__name__
