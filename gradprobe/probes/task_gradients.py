"""Measures the Gramians of one step, by whichever passes are right for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradprobe import measures
from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes.blocks import by_blocks
from gradprobe.probes.calls import Losses
from gradprobe.probes.gramian import LossScale
from gradprobe.probes.graph import LossGraph, refuse, trace
from gradprobe.probes.guard import (
    COARSE,
    EXACT,
    MOVED,
    Guard,
    JointDifference,
    NotMeasured,
    joint_difference,
    joint_loss,
    joint_weights,
)
from gradprobe.probes.passes import (
    EXACT_TYPES,
    DerivedMeasurement,
    Gradients,
    MicroSum,
    Step,
    computed_exactly,
    difference,
    explicit,
    largest_cancellation,
    may_be_derived,
    task_to_derive,
    tolerance,
)
from gradprobe.probes.shared_layers import Selection, SharedLayers
from gradprobe.probes.sharing import Sharing
from gradprobe.probes.sketch import Draw, SketchedMeasurement, Sketching, SketchSize, sketched
from gradprobe.probes.state import ParameterValues, parameters_of
from gradprobe.processes import OneProcess, remember_wrapper

__all__ = ["TaskGradients"]


class TaskGradients:
    """Knows the shared layers, and what the last row tells about the next.

    Args:
        model: Whose parameters are shared.
        selection: Which of them count.
        memory: "normal", or "low": block by block, see :mod:`gradprobe.probes.blocks`.
        warn: Is told what the user should know.
        differs: Is told once by how much a derived gradient differs from the explicit one, where it is too much.
        ranks: The processes whose gradients are averaged.
        sketch: How much is kept of each gradient, see :mod:`gradprobe.probes.sketch`; None: all.

    Attributes:
        model: Whose gradients are measured; of DDP the module inside.
        ranks: The processes whose gradients are averaged.
        guard: Stands around all passes.
        shared: The shared layers; None before the first measurement.
        grown: Whether the last :meth:`find` or :meth:`counted` has changed the layers, or who reaches them.
        last_gram: (L, T, T) of the last row that was measured; None before.
        kept: (T) gradients of the last measurement, scaled as the losses were; None: nobody wants them, see
            :meth:`keep`. Of one in micro-batches: the means.
        kept_micro: (m, T) gradients of each micro-batch of this process, likewise; empty after a measurement as a
            whole.
        shares: (m,) of the last measurement's micro-batches in the batch of all processes; [1.0] as a whole.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        memory: str,
        warn: Callable[[str], None],
        ranks: OneProcess | None = None,
        sketch: SketchSize | None = None,
        differs: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.model, self.ranks, self._differs = model, ranks or OneProcess(), differs
        self.guard = Guard(model, warn, self.ranks)
        self._selection, self._memory, self._warn = selection, memory, warn
        self._sketching = Sketching(sketch) if sketch is not None else None
        self._sharing: Sharing | None = None
        self.shared: SharedLayers | None = None
        self.grown = False
        self._graph: tuple[Sequence[Tensor], LossGraph] | None = None
        self._derived, self._trusted = 0, True  # rows with a derived task; whether these equal explicit ones
        self._state: Mapping[str, Any] | None = None
        self.last_gram: Array | None = None
        self.kept: list[Gradients] | None = None
        self.kept_micro: list[list[Gradients]] | None = None
        self.shares: list[float] = [1.0]

    def keep(self, *, micro: bool = False) -> None:
        """From now on keep every task's gradients of a measurement, T copies of the shared parameters.

        Args:
            micro: Also those of every micro-batch, m T copies more, where there are some.

        Raises:
            ProbeError: They are not made, or memory was to stay low.
        """
        self._refuse_sketch("updates= and ledger= need every task's gradients")
        if self._memory == "low":
            raise ProbeError("updates= and ledger= need every task's gradients: leave memory='low' out.")
        self.kept = []
        if micro:
            self.kept_micro = []

    @property
    def keeps(self) -> bool:
        """Whether every task's gradients are made as a whole, and could be kept."""
        return self._memory != "low"

    def state_dict(self) -> dict[str, Any]:
        """What a later one needs to measure as this one would have, to the last digit."""
        return {
            "last_gram": None if self.last_gram is None else self.last_gram.tolist(),
            "derived": (self._derived, self._trusted),
            "sketched": self._sketching.row if self._sketching is not None else 0,
            "guard": self.guard.state_dict(),
            "sharing": self._sharing.state_dict() if self._sharing is not None else self._state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped."""
        gram = state["last_gram"]
        self._state = state.get("sharing")
        if self._sharing is not None and self._state is not None:
            self._sharing.load_state_dict(self._state)
            self.shared = self._sharing.shared
        self.last_gram = None if gram is None else np.array(gram, dtype=np.float64)
        self._derived, self._trusted = state["derived"]
        if self._sketching is not None:
            self._sketching.row = state.get("sketched", 0)
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The model's that are trained."""
        return [p for p in parameters_of(self.model) if p.requires_grad]

    def find(self, losses: Losses) -> SharedLayers:
        """The shared layers; searched for once, and followed when their parameters are replaced.

        Args:
            losses: In the order of the tasks.

        Raises:
            ProbeError: Something hides gradients, or a shared parameter is gone.
        """
        if self._sharing is None:
            refuse(self.model, list(losses.values()))
            self._sharing = Sharing(self.model, self._selection, self.ranks, len(losses), self._warn)
            if self._state is not None:
                self._sharing.load_state_dict(self._state)
        graph = self._walk(list(losses.values()))
        if self.shared is None:
            remember_wrapper(self.model, graph.nodes)
        self.shared = shared = self._sharing.look(losses, graph)
        self.grown = self._sharing.joined or self._sharing.changed
        return shared

    def counted(self, gram: Array) -> NDArray[np.bool_]:
        """(L, T) whose gradient counts on which layer of a row; see :meth:`Sharing.row`."""
        assert self._sharing is not None
        found = self._sharing.row(gram)
        self.shared, self.grown = self._sharing.shared, self._sharing.joined or self._sharing.changed
        return found

    def tell(self) -> None:
        """No further row will come: say what is known of layers by now."""
        if self._sharing is not None:
            self._sharing.tell(last=True)

    def _known_graph(self, losses: Sequence[Tensor]) -> LossGraph | None:
        """The graph of these losses, where it was walked through already."""
        if self._graph is None:
            return None
        known, graph = self._graph
        return graph if len(known) == len(losses) and all(map(is_, known, losses)) else None

    def _walk(self, losses: Sequence[Tensor]) -> LossGraph:
        graph = self._known_graph(losses) or trace(losses)
        self._graph = losses, graph
        return graph

    def let_go(self) -> None:
        """Of the step's graph, which would be alive as long as this holds it."""
        self._graph = None

    def check_micro(self) -> None:
        """Whether it can be measured in micro-batches.

        Raises:
            ProbeError: Not in the way that was chosen.
        """
        self._refuse_sketch("micro-batches and a probe loader are measured by every task's gradients")
        if self._memory == "low":
            raise ProbeError(
                "micro-batches are measured by every task's gradients on each of them: leave memory='low' out."
            )

    def in_micro_batches(
        self,
        shared: SharedLayers,
        losses: Iterable[Sequence[Tensor]],
        shares: Sequence[float],
        tasks: int,
        weights: Array | None = None,
        *,
        aside: bool = False,
    ) -> tuple[Array, Array]:
        """The Gramians and their noise parts, (L, T, T) each, by passes of their own.

        Args:
            shared: From :meth:`find`.
            losses: (m, T); asked for one micro-batch after the other, so that each may be made and let go of.
            shares: (m,) of this process's batch.
            tasks: T.
            weights: (T,) in force, for the check that gradients add up to the joint one; None: there is none.
            aside: It is no measurement of the training's own batch: nothing of it is kept.
        """
        seen: list[Tensor] = []

        held: list[JointDifference] = []

        def passes(closely: bool) -> tuple[Array, Array]:
            factors = joint_weights(weights) if closely and weights is not None else None
            if self.kept_micro is not None and not aside:
                self.kept_micro = []
            kept = None if aside else self.kept_micro
            total = MicroSum(self.model, shared, tasks + (factors is not None), self.ranks, kept)

            def all_passes() -> None:
                for one, share in zip(losses, shares, strict=True):
                    seen[:] = one
                    total.add(one if factors is None else [*one, joint_loss(one, factors)], share)

            self.ranks.together(all_passes)
            gram, noise = total.result()
            if not aside:
                self.shares = total.shares
                if self.kept is not None:
                    self.kept[:] = total.means[:tasks]
                for gradients in self.kept_micro or ():
                    del gradients[tasks:]
            if factors is not None:
                held[:] = [joint_difference(gram, factors)]
            return gram[:, :tasks, :tasks], noise[:, :tasks, :tasks]

        if isinstance(losses, Sequence):
            seen += [loss for one in losses for loss in one]
        found = self.guard.passes(seen, passes, kind="aside" if aside else "rows")
        self._hold_against_joint(held, shared, seen)
        return found

    def explicit(self, shared: SharedLayers, losses: Sequence[Tensor], weights: Array | None = None) -> Array:
        """The Gramians (L, T, T) by passes of their own.

        At the 1st, 2nd, 4th, 8th, ... row one pass more tells whether the tasks' gradients add up to the joint one.

        Args:
            shared: From :meth:`find`.
            losses: (T,).
            weights: (T,) in force; default 1 each.
        """
        self._as_a_whole()
        step = self._step(shared, losses, np.ones(len(losses)) if weights is None else weights)
        return self._by_passes(step, self._next_draw(shared))

    def _step(self, shared: SharedLayers, losses: Sequence[Tensor], weights: Array) -> Step:
        weights = np.where([loss.requires_grad for loss in losses], weights, 0.0)  # an absent one has no graph
        return Step(self.model, shared, losses, weights, self.ranks, self._known_graph(losses), self.kept)

    def _next_draw(self, shared: SharedLayers) -> Draw | None:
        return self._sketching.next(shared) if self._sketching is not None and shared.layers else None

    def _by_passes(self, step: Step, draw: Draw | None, *, check: bool = False) -> Array:
        """By a pass for every task, and one more that tells whether they add up, at rows that are checked closely."""
        tasks = len(step.losses)
        if not step.shared.layers:
            return np.zeros((0, tasks, tasks))
        way = partial(sketched, draw=draw) if draw is not None else by_blocks if self._memory == "low" else explicit
        factors, held = joint_weights(step.weights), list[JointDifference]()

        def passes(closely: bool) -> Array:
            if not (closely or check):
                return way(step)
            gram = way(replace(step, losses=[*step.losses, joint_loss(step.losses, factors)], graph=None))
            if self.kept is not None:
                del self.kept[tasks:]
            if self.ranks.parts is not None:
                self.ranks.parts = self.ranks.parts[:, :tasks, :tasks]
            held[:] = [joint_difference(gram, factors)]
            return gram[:, :tasks, :tasks]

        gram = self.guard.passes(step.losses, passes)
        self._hold_against_joint(held, step.shared, step.losses)
        return gram

    def _hold_against_joint(
        self, held: Sequence[JointDifference], shared: SharedLayers, losses: Sequence[Tensor]
    ) -> None:
        for found in held:
            exact = all(p.dtype in EXACT_TYPES for p in shared.parameters) and computed_exactly(
                shared, self._known_graph(losses) or trace(losses)
            )
            names = [layer.name for layer in shared.layers]
            self.guard.hold_against_joint(found, EXACT if exact else COARSE, names, losses)

    def begin(self, shared: SharedLayers, losses: Sequence[Tensor], weights: Array) -> Array | DerivedMeasurement:
        """Either the Gramians, or a measurement that the joint backward completes.

        Args:
            shared: From :meth:`find`.
            losses: (T,), multiplied by the loss scale where the joint one is.
            weights: (T,) in force.
        """
        self._as_a_whole()
        guard, step = self.guard, self._step(shared, losses, weights)
        derived = self._to_derive(step)
        draw = self._next_draw(shared)
        if derived is None:
            return self._by_passes(step, draw)
        # The first row of a session is looked at besides: its numbers are those that a run in one go would have.
        explicit = not (self._derived + 1) & self._derived or guard.scheduled()
        if guard.proven and not explicit:
            return guard.passes(losses, lambda _: self.ranks.together(lambda: _derived(step, derived, draw)))
        by_passes = self._by_passes(step, draw, check=True)
        if explicit:
            step = replace(step, kept=None)
        measurement = self.ranks.together(lambda: _derived(step, derived, draw))
        measurement.by_passes, measurement.explicit = by_passes, explicit
        return measurement

    def _to_derive(self, step: Step) -> int | None:
        """The task that is to be derived from the joint backward; None: none can be, or nobody knows yet."""
        if (
            self._memory == "low"
            or self.last_gram is None
            or not self._trusted
            or self.guard.mark
            or not step.shared.layers
        ):
            return None
        derived = task_to_derive(self.last_gram, step.weights, largest_cancellation(step.shared))
        if derived is None or self._sharing is None or not self._sharing.proven(derived):
            return None
        may = may_be_derived(step) and self._as_at_first(step) and not self.guard.moves
        return derived if self.ranks.all(may) else None

    def finish(
        self, measurement: DerivedMeasurement, losses: Sequence[Tensor], before: ParameterValues | None = None
    ) -> Array:
        """The Gramians once the joint backward has run, and kept the graph for a second look.

        Args:
            measurement: From :meth:`begin`.
            losses: As there.
            before: Tells whether the joint backward has moved the parameters: no pass can be made then.

        Raises:
            NotMeasured: A pass would have to be made.
        """
        shared, by_passes, parts = measurement.step.shared, measurement.by_passes, self.ranks.parts
        gram = measurement.result()
        if by_passes is not None:
            self._derived += 1
            if gram is not None:
                self._compare(gram, by_passes, shared)
            if gram is not None and not measurement.explicit:
                return gram
            self.ranks.parts = parts
            return by_passes
        if gram is not None:
            self._derived += 1
            return gram
        if not self.ranks.all(before is None or not before.moved()):
            raise NotMeasured(MOVED)
        return self.explicit(shared, losses)

    def _compare(self, gram: Array, by_passes: Array, shared: SharedLayers) -> None:
        """Derive no more where a derived gradient is not the explicit one to the last digits; say by how much."""
        found = difference(gram, by_passes)
        if found <= tolerance(shared):
            return
        self._trusted = False
        self._differs(found)

    def _as_a_whole(self) -> None:
        self.shares = [1.0]
        if self.kept_micro is not None:
            self.kept_micro = []

    def _as_at_first(self, step: Step) -> bool:
        """Whether tasks reach what they did at first: of several processes with different paths none can be derived."""
        return self.ranks.size == 1 or all(
            any(step.traced.reached(task, layer.parameters)) == there
            for layer, reach in zip(step.shared.layers, step.shared.reach, strict=True)
            for task, there in enumerate(reach)
        )

    def _refuse_sketch(self, why: str) -> None:
        if self._sketching is not None:
            raise ProbeError(f"{why}, of which sketch= keeps {self._sketching.size.numbers} numbers: leave it out.")


def _derived(step: Step, task: int, draw: Draw | None) -> DerivedMeasurement:
    """The measurement whose last task the joint backward tells."""
    return DerivedMeasurement(step, task) if draw is None else SketchedMeasurement(step, task, draw)


SELF_CHECKED = 2
"""Micro-batches that are looked at."""
_SELF_CHECK_TOLERANCE = 1e-6


def cosines_with_itself(
    gradients: TaskGradients, scale: LossScale, tasks: Sequence[str], losses: Sequence[Losses]
) -> tuple[float, float]:
    """Cosines over all shared layers of a task with its own copy and with its negative, measured as tasks are.

    Args:
        gradients: Has found the shared layers.
        scale: Of the losses.
        tasks: Each is looked at.
        losses: (m,) of a few micro-batches.

    Returns:
        Of all tasks the one that is farthest from +1, and the one farthest from -1. NaN where no task has a gradient.
    """
    assert gradients.shared is not None
    shares, found = [1 / len(losses)] * len(losses), []
    for task in tasks:
        three = [scale.all([one[task], one[task] * 1.0, -one[task]]) for one in losses]
        gram, _ = gradients.in_micro_batches(gradients.shared, three, shares, 3, aside=True)
        cosine = measures.cosine(np.nansum(gram, axis=0))
        if np.isfinite(cosine[0, 1]):
            found.append((float(cosine[0, 1]), float(cosine[0, 2])))
    if not found:
        return float("nan"), float("nan")
    return min(copy for copy, _ in found), max(negative for _, negative in found)


def self_check_fault(found: tuple[float, float]) -> str:
    """What is wrong with them; empty where nothing is, or nothing is known."""
    copy, negative = found
    if np.isnan(copy) or (abs(copy - 1) <= _SELF_CHECK_TOLERANCE and abs(negative + 1) <= _SELF_CHECK_TOLERANCE):
        return ""
    return (
        f"the self-check failed: a task's cosine with its own copy is {copy:.9g} and with its negative {negative:.9g}, "
        "not +1 and -1. A second backward pass through one graph gives another gradient here (recomputed activations "
        "that draw anew, kernels that are not deterministic), so that no cosine of this run can be relied on"
    )
