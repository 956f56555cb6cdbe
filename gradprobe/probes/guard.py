"""Checks by their effect that passes of a probe leave a training alone, and that their gradients are the tasks'.

A pass may run the user's code: operations of their own, hooks, parts of the forward that are recomputed. So what it
must not move is noted before the passes of the 1st, 2nd, 4th, 8th, ... row and compared afterwards. What was moved is
put back. At the first row that is a refusal, so that no training begins that a probe would change; later it is the end
of measuring, never that of the training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradprobe.errors import GradprobeError, ProbeError
from gradprobe.measures import Array
from gradprobe.probes.graph import Node, custom_operations, hooked_names, some, unpack_hooks
from gradprobe.probes.passes import done
from gradprobe.probes.state import (
    ParameterValues,
    PassSnapshot,
    Touched,
    has_backward_hooks,
    has_parameter_hooks,
    parameters_of,
    state_kept,
)
from gradprobe.processes import OneProcess

T = TypeVar("T")
_TOUCHES = "not measured: a backward pass writes into .grad or parameters by itself"
_ONE_BACKWARD = "not measured: this forward allows one backward only"
MOVED = "not measured: the optimizer stepped within the backward, before the derived gradient was known"
_UNTRIED = "not measured: hooks on saved tensors that no measured row had tried"
OBSERVED = "beside"
"""The kind of what is looked at besides rows."""
_ELSEWHERE = "not measured: so it is in another process"


class NotMeasured(Exception):  # noqa: N818 (nothing went wrong)
    """A row is not measured, and no failure is the cause. Its text is the row's status.

    Attributes:
        said: What the user should know; empty: it was said.
    """

    def __init__(self, status: str, said: str = "") -> None:
        super().__init__(status)
        self.said = said


class Guard:
    """Stands around the passes of a probe.

    Args:
        model: Whose parameters and hooks are watched.
        warn: Is told what the user should know.
        ranks: The processes that measure together.

    Attributes:
        proven: Whether a row was looked at closely in this session, and nothing was touched.
        stopped: Why no more passes are made; empty: they are.
        mark: Status of rows whose gradients do not add up to the joint one; empty: they do, as far as is known.
        moves: Whether parameters move while the joint backward runs, so that none can be looked at after it.
    """

    def __init__(self, model: nn.Module, warn: Callable[[str], None], ranks: OneProcess | None = None) -> None:
        self._model, self._warn, self._ranks = model, warn, ranks or OneProcess()
        self._rows: Counter[str] = Counter()
        self.proven = self._off = self._said = self._told = False
        self._tried: set[str] = set()
        self._passes = done.count  # before the first of this probe
        self.stopped = self.mark = ""
        self.moves = False

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to look at the rows that this one would have looked at."""
        return {"rows": dict(self._rows), "stopped": self.stopped, "mark": self.mark, "moves": self.moves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stopped; what it has tried is tried again."""
        self._rows = Counter(state["rows"])
        self.stopped, self.mark, self.moves = state["stopped"], state["mark"], state["moves"]

    def say_hooks(self) -> None:
        """Once: which hooks of the user's the passes run, too."""
        if self._said or not has_backward_hooks(self._model):
            return
        self._said = True
        names = hooked_names(self._model)
        self._warn(
            f"backward hooks of your own on {some(names)} run in every pass of the probe, too, so once per task at "
            "measured steps: what they change is measured changed, and what they count or collect is counted that much "
            "oftener. If they keep a state, take them off or skip the steps at which probe.is_due"
        )

    def will_look(self, kind: str = "rows") -> bool:
        """Whether the next row of a kind will be looked at closely: the first of a session is, too."""
        return not self.proven or self.scheduled(kind)

    def scheduled(self, kind: str = "rows") -> bool:
        """Whether it is the 1st, 2nd, 4th, 8th, ... of a run."""
        return not self._rows[kind] & (self._rows[kind] + 1)

    # ---- passes

    def passes(self, losses: Sequence[Tensor], measure: Callable[[bool], T], *, kind: str = "rows") -> T:
        """The result of ``measure``, which makes passes and is told whether this is a row that is looked at closely.

        Args:
            losses: Those the passes begin at; may be filled while ``measure`` runs.
            measure: May be called a second time, where what it is given is there already.
            kind: Rows are counted by it.

        Raises:
            ProbeError: The passes would change the training, at the first row.
            NotMeasured: They would at a later one, or nobody knows yet.
        """
        self.say_hooks()
        nodes = _reachable(losses)
        hooks = unpack_hooks(nodes)
        why = self.stopped or (_UNTRIED if self.proven and not self._tried.issuperset(hooks) else "")
        if not self._ranks.all(not why):
            raise NotMeasured(why or _ELSEWHERE, self._words_of_untried(hooks) if why == _UNTRIED else "")
        looks = self.will_look(kind)
        self._rows[kind] += 1
        if not looks:
            before = done.count
            try:
                with self._hooks_off():
                    return measure(False)
            except Exception as error:
                raise self._cause(error, losses, before) from error
        known = bool(losses)
        copies = not known or bool(hooks or custom_operations(nodes) or has_backward_hooks(self._model))
        snapshot, before = PassSnapshot(self._model, nodes, copies=copies), done.count if self.proven else self._passes
        result, touched, failure = self._looked_at(snapshot, measure)
        if not self._ranks.all(not self._may_be_hooks(touched)):
            self._hold_off(touched)
            if not known:
                raise NotMeasured(_TOUCHES)
            result, touched, failure = self._looked_at(snapshot, measure)
        if not self._ranks.all(not touched):
            self._refuse(touched, _reachable(losses))
        if failure is not None:
            raise self._cause(failure, losses, before) from failure
        if kind != OBSERVED:  # that goes through parts of the graph only
            self._tried.update(hooks)
            self.proven = True
        return cast(T, result)

    def _looked_at(
        self, snapshot: PassSnapshot, measure: Callable[[bool], T]
    ) -> tuple[T | None, Touched, Exception | None]:
        """The result or the failure, and what was touched, which is put back."""
        result, failure = None, None
        try:
            with self._hooks_off():
                result = measure(True)
        except GradprobeError:
            snapshot.back()
            raise
        except Exception as error:
            failure = error
        return result, snapshot.back(), failure

    def _cause(self, error: Exception, losses: Sequence[Tensor], before: int) -> Exception:
        """What is to be raised for a failure: a forward that the first pass used up fails in the second.

        Args:
            error: What was raised.
            losses: Those the passes began at.
            before: Passes that had gone through when these began.
        """
        if isinstance(error, GradprobeError) or done.count == before or not losses or self._goes_through(losses[0]):
            return error
        why = self._words_of_one_backward(unpack_hooks(_reachable(losses)), error)
        if not self.proven:
            return ProbeError(
                why + " Nothing can be measured here, and the training's own backward would fail after it: make the "
                "forward anew, without the probe, or without what allows one backward only."
            )
        self.stopped = _ONE_BACKWARD
        said = "This one is used up, so that the training's own backward will fail, too. No more passes are made"
        return NotMeasured(_ONE_BACKWARD, f"{why} {said}")

    def _goes_through(self, loss: Tensor) -> bool:
        """Whether a pass through this graph, where one went through before, does again."""
        wanted = [p for p in parameters_of(self._model) if p.requires_grad]
        try:
            with state_kept(self._model):
                torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        except Exception:
            return False
        return True

    def _may_be_hooks(self, touched: Touched) -> bool:
        return bool(touched.parameters) and not touched.lost and not self._off and has_parameter_hooks(self._model)

    def _hold_off(self, touched: Touched) -> None:
        self._off = True
        names = some(touched.parameters) or "parameters"
        self._warn(
            f"hooks on parameters move parameters ({names}) in every backward pass, as an optimizer's step does. They "
            "were put back, and the hooks are held off during the probe's passes: what else they change is not "
            "measured. torch's register_post_accumulate_grad_hook is called in the training's own backward alone"
        )

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        """Where the user's hooks on parameters move parameters, let none of them run."""
        if not self._off:
            yield
            return
        tables = [p._backward_hooks for p in parameters_of(self._model) if p._backward_hooks]
        kept = [dict(table) for table in tables]
        for table in tables:
            table.clear()
        try:
            yield
        finally:
            for table, hooks in zip(tables, kept, strict=True):
                table.update(hooks)

    def _refuse(self, touched: Touched, nodes: list[Node]) -> None:
        """Say what was touched; it is put back already."""
        if not touched:
            raise NotMeasured(_ELSEWHERE)
        what = self._words_of_touched(touched, custom_operations(nodes))
        if not self.proven:
            raise ProbeError(
                f"{what} Replace it (torch.utils.checkpoint.checkpoint(..., use_reentrant=False) recomputes without), "
                "or record level='features' with probe.backward, which makes no passes."
            )
        self.stopped = _TOUCHES
        raise NotMeasured(_TOUCHES, f"{what} No more passes are made")

    def _words_of_touched(self, touched: Touched, operations: list[str]) -> str:
        wheres = {".grad": touched.gradients, "the values": touched.parameters, "the numbers": touched.attributes}
        what = "; ".join(f"{where} of {some(names)}" for where, names in wheres.items() if names)
        hooks = hooked_names(self._model)
        cause = (
            f"Operations that are not torch's own may do it, by a backward within theirs: {some(operations)}."
            if operations
            else f"Hooks may do it, on {some(hooks)}."
            if hooks
            else "No operation or hook that is not torch's own was found."
        )
        back = (
            f"{some(touched.lost)} could not be put back. " if touched.lost else "All of it was put back, bit for bit. "
        )
        return (
            f"a backward pass that is to make one task's gradient alone writes into {what}: the passes of a probe "
            f"would change what the optimizer steps on. {back}{cause}"
        )

    def _words_of_one_backward(self, hooks: list[str], error: Exception) -> str:
        hooked = hooked_names(self._model)
        cause = (
            f"hooks on saved tensors hand each out once ({some(hooks)})"
            if hooks
            else f"backward hooks on {some(hooked)} may use up what the forward left for them"
            if hooked
            else "an operation of the graph gives away what it saved"
        )
        return (
            f"a second backward pass through the same forward fails, and the first does not go through again: {cause}. "
            f"torch said: {type(error).__name__}: {error}."
        )

    @staticmethod
    def _words_of_untried(hooks: list[str]) -> str:
        return (
            f"hooks on saved tensors ({some(hooks)}) are at work that were not at the first measured row. They may "
            "hand each tensor out once, and the probe's passes would leave none to the training: rows with them are "
            "not measured. Attach the probe when they are there, and it will try them"
        )

    # ---- the joint gradient

    def before_backward(self) -> ParameterValues:
        """What the parameters are before the joint backward of a measured row, which may move them."""
        parameters = parameters_of(self._model)
        may_step = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
        closely = not self._rows["rows"] & (self._rows["rows"] - 1) or may_step
        return ParameterValues(parameters, closely=closely and not self.moves)

    def hold_against_joint(
        self, found: JointDifference, tolerance: float, layers: Sequence[str], losses: Sequence[Tensor]
    ) -> None:
        """Mark rows from here on, or no more, by how far the tasks' gradients are from adding up to the joint one."""
        if not found.largest > tolerance:
            if found.largest <= tolerance:
                self.mark = ""
            return
        self.mark = _NOT_THE_JOINT_ONE
        if not self._told:
            self._told = True
            self._warn(
                _words_of_difference(found, layers, custom_operations(_reachable(losses)), hooked_names(self._model))
            )


def _reachable(losses: Sequence[Tensor]) -> list[Node]:
    """Every operation below some losses, in no order."""
    stack = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen: set[Node] = set(stack)
    nodes: list[Node] = []
    while stack:
        node = stack.pop()
        nodes.append(node)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return nodes


_NOT_THE_JOINT_ONE = "the tasks' gradients do not add up to the joint one"
"""Status of rows from the one on that has found it, until a later one finds that they do."""
EXACT, COARSE = 1e-3, 5e-2
"""How far apart rounding may bring them, of the norms: in float32 and wider; and in half types, autocast or TF32."""
_LEAST = 1e-2
"""Of the norms over all layers. The gradient of a layer that is smaller than this part may be the remainder of large
terms within it, rounding and nothing else: as of a bias in front of a BatchNorm."""


def joint_weights(weights: Array) -> Array:
    """(T,) with which to make a joint loss that tells whether something adds to gradients.

    The weights in force, doubled where they sum up to about 1: what is added to each task's gradient and to the joint
    one alike would not show then.

    >>> joint_weights(np.array([0.5, 0.5])), joint_weights(np.array([1.0, 1.0]))
    (array([1., 1.]), array([1., 1.]))
    """
    if not np.isfinite(weights).all() or not weights.any():
        return np.ones_like(weights)
    return weights * 2 if abs(weights.sum() - 1) < 0.25 else weights


def joint_loss(losses: Sequence[Tensor], weights: Array) -> Tensor:
    """The weighted sum of the losses that have a graph."""
    terms = [loss * float(weight) for loss, weight in zip(losses, weights, strict=True) if loss.requires_grad]
    return sum(terms[1:], start=terms[0]) if terms else losses[0]


@dataclass(frozen=True)
class JointDifference:
    """How far the joint gradient is from the weighted sum of the tasks', of which every number is a part.

    Backward passes are linear where every operation's backward is. One that clips, normalises, or adds a gradient of
    its own (of an auxiliary loss, say) gives each task's pass something that is not that task's.

    Attributes:
        share: (L,) of each layer, relative to the root of the summed squares of the weighted gradients there, but
            at least to a hundredth of that over all layers; NaN where a gradient is not finite.
    """

    share: Array

    @property
    def largest(self) -> float:
        """Over the layers; NaN where nothing is known."""
        known = self.share[~np.isnan(self.share)]
        return float(known.max()) if len(known) else float("nan")

    def worst(self, names: Sequence[str]) -> str:
        """The layers where it is largest, in words."""
        order = np.argsort(-np.nan_to_num(self.share))[:3]
        return ", ".join(
            f"{names[place]} ({self.share[place]:.0%})" for place in order if self.share[place] > self.largest / 100
        )


def joint_difference(gram: Array, weights: Array) -> JointDifference:
    """From the Gramians of the tasks' gradients and the joint one, which is the last.

    Args:
        gram: (L, T + 1, T + 1). NaN where there is no gradient, which counts as 0; infinite where one is not finite.
        weights: (T,) of the joint loss.
    """
    if not gram.size:
        return JointDifference(np.zeros(0))
    norms = np.diagonal(gram, axis1=-2, axis2=-1)
    # A task without a gradient adds nothing; where one's is not finite, the joint one is not either.
    unknown = np.isinf(norms).any(axis=-1) | (np.isnan(norms[:, -1]) & ~np.isnan(norms).all(axis=-1))
    factors = np.append(-np.asarray(weights, dtype=np.float64), 1.0)
    with np.errstate(invalid="ignore", over="ignore"):
        left = np.einsum("i,lij,j->l", factors, np.nan_to_num(gram), factors)
        square = np.nansum(np.square(factors[:-1]) * np.maximum(norms[:, :-1], 0), axis=-1)
        scale = np.sqrt(np.maximum(square, _LEAST**2 * np.sum(square[~unknown])))
        # A gradient that the joint loss alone has is as large as itself.
        scale = np.where(scale > 0, scale, np.sqrt(np.maximum(np.nan_to_num(norms[:, -1]), 0)))
        share = np.sqrt(np.maximum(left, 0)) / np.where(scale > 0, scale, 1.0)
    return JointDifference(np.where(unknown, np.nan, share))


def _words_of_difference(
    found: JointDifference, layers: Sequence[str], operations: Sequence[str], hooks: Sequence[str]
) -> str:
    """What a person should know of gradients that do not add up."""
    causes = [f"operations that are not torch's own ({some(operations)})"] * bool(operations)
    causes += [f"hooks on {some(hooks)}"] * bool(hooks)
    unnamed = "hooks on tensors, a part that is recomputed and draws anew, or kernels that are not deterministic"
    cause = " or ".join(causes) or unnamed
    return (
        f"the tasks' gradients do not add up to the joint one: they differ by {found.largest:.1%} of their norms, most "
        f"in {found.worst(layers)}. Something in the backward clips, scales or adds gradients, as auxiliary losses of "
        f"experts do: {cause} may. Each task's own pass gets it too, so norms and cosines of these layers are wrong by "
        "about as much. Make what is added a loss of its own, a task or a term of one, or measure with it off; until a "
        "later check finds that they add up, the rows' status says so"
    )
