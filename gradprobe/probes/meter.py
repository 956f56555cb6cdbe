"""Measures the Gramians of one step, by whichever passes are right for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradprobe.errors import ProbeError
from gradprobe.measures import Array
from gradprobe.probes import walk
from gradprobe.probes.binding import Selection
from gradprobe.probes.blocks import measure_by_blocks
from gradprobe.probes.checks import Losses, is_present
from gradprobe.probes.derived import (
    DerivedMeasurement,
    difference,
    largest_cancellation,
    may_be_derived,
    task_to_derive,
    tolerance,
)
from gradprobe.probes.ghost import find_ghosts
from gradprobe.probes.graph import SharedLayers
from gradprobe.probes.limits import refuse
from gradprobe.probes.micro import MicroSum
from gradprobe.probes.passes import Gradients, measure_explicitly
from gradprobe.probes.ranks import Alone, remember_wrapper
from gradprobe.probes.sharing import Sharing
from gradprobe.probes.sketch import Size
from gradprobe.probes.sketched import SketchedMeasurement, Sketching, measure_sketched
from gradprobe.probes.trace import Trace, trace

MEMORY = ("normal", "low")
PRODUCTS = ("direct", "ghost")


class Meter:
    """Knows the shared layers, and what the last row tells about the next.

    Args:
        model: Whose parameters are shared.
        selection: Which of them count.
        memory: "normal", or "low": block by block, see :mod:`gradprobe.probes.blocks`.
        products: "direct", or "ghost": some weights' without their gradients, see :mod:`gradprobe.probes.ghost`.
        warn: Is told what the user should know.
        ranks: The processes whose gradients are averaged.
        sketch: How much is kept of each gradient, see :mod:`gradprobe.probes.sketched`; None: all.

    Attributes:
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
        products: str,
        warn: Callable[[str], None],
        ranks: Alone | None = None,
        sketch: Size | None = None,
    ) -> None:
        if memory not in MEMORY:
            raise ProbeError(f"memory={memory!r}: there are {' and '.join(map(repr, MEMORY))}.")
        if products not in PRODUCTS:
            raise ProbeError(f"products={products!r}: there are {' and '.join(map(repr, PRODUCTS))}.")
        if sketch is not None and products == "ghost":
            raise ProbeError("sketch= and products='ghost' exclude each other: a sketch is made of every gradient.")
        if (memory, products) == ("low", "ghost"):
            raise ProbeError("memory='low' and products='ghost' exclude each other: blocks make every gradient.")
        self._ranks = ranks or Alone()
        if products == "ghost" and self._ranks.size > 1:
            raise ProbeError("products='ghost' under data parallelism: averages need every gradient; leave it out.")
        self._model, self._selection, self._memory, self._warn = model, selection, memory, warn
        self._sketching = Sketching(sketch) if sketch is not None else None
        self._ghostly, self._ghosts_checked = products == "ghost", False
        self._sharing: Sharing | None = None
        self._graph: tuple[Sequence[Tensor], Trace] | None = None
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
        if self._memory == "low" or self._ghostly:
            raise ProbeError(
                "updates= and ledger= need every task's gradients: leave memory='low' and products='ghost' out."
            )
        self.kept = []
        if micro:
            self.kept_micro = []

    @property
    def keeps(self) -> bool:
        """Whether every task's gradients are made as a whole, and could be kept."""
        return self._memory != "low" and not self._ghostly

    def state_dict(self) -> dict[str, Any]:
        """What a later meter needs to measure as this one would have, to the last digit."""
        return {
            "last_gram": None if self.last_gram is None else self.last_gram.tolist(),
            "derived": (self._derived, self._trusted),
            "ghosts": (self._ghostly, self._ghosts_checked),
            "sketched": self._sketching.row if self._sketching is not None else 0,
            "sharing": self._sharing.state_dict() if self._sharing is not None else self._state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another meter stopped."""
        gram, ghosts = state["last_gram"], state["ghosts"]
        self._state = state.get("sharing")
        if self._sharing is not None and self._state is not None:
            self._sharing.load_state_dict(self._state)
        self.last_gram = None if gram is None else np.array(gram, dtype=np.float64)
        self._derived, self._trusted = state["derived"]
        if self._sketching is not None:
            self._sketching.row = state.get("sketched", 0)
        self._ghostly, self._ghosts_checked = self._ghostly and ghosts[0], ghosts[1]

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next((p.device for p in self._model.parameters()), torch.device("cpu"))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The model's that are trained."""
        return [p for p in walk.parameters(self._model) if p.requires_grad]

    @property
    def ranks(self) -> Alone:
        """The processes whose gradients are averaged."""
        return self._ranks

    def find(self, losses: Losses) -> SharedLayers:
        """The shared layers; searched for once, and followed when their parameters are replaced.

        Args:
            losses: In the order of the tasks.

        Raises:
            ProbeError: Something hides gradients, or a shared parameter is gone.
        """
        if self._sharing is None:
            refuse(self._model, list(losses.values()))
            self._sharing = Sharing(self._model, self._selection, self._ranks, len(losses))
            if self._state is not None:
                self._sharing.load_state_dict(self._state)
        replaced = self._sharing.replaced()
        if replaced:
            refuse(self._model, list(losses.values()))  # they may be shards now
            self._warn(
                f"{len(replaced)} shared parameters were replaced, {replaced[0]!r} first; the probe goes on with "
                "the new ones. An optimizer made before still updates the old ones: make it anew"
            )
        weights = self._sharing.weights
        graph = self._traced(list(losses.values()), keep=True)
        if self.shared is None:
            remember_wrapper(self._model, graph)
        shared = self._sharing.look(losses, graph)
        self._warn_of_none()
        if self._sharing.weights != weights:
            self._warn(
                f"{', '.join(map(repr, self._sharing.weights))} only weigh losses, and no feature depends on them: "
                "learned weights are no shared layer, and are left out"
            )
        return shared

    @property
    def shared(self) -> SharedLayers | None:
        """The shared layers; None before the first measurement."""
        return self._sharing.shared if self._sharing is not None else None

    @property
    def grown(self) -> bool:
        """Whether the last :meth:`find` or :meth:`counted` has changed the layers, or who reaches them."""
        return self._sharing is not None and (self._sharing.joined or self._sharing.changed)

    def counted(self, gram: Array) -> NDArray[np.bool_]:
        """(L, T) whose gradient counts on which layer of a row; see :meth:`Sharing.row`."""
        assert self._sharing is not None
        found = self._sharing.row(gram)
        self.tell()
        return found

    def tell(self, *, last: bool = False) -> None:
        """Say once of layers that they are shared by the graph alone."""
        names = self._sharing.untold(last=last) if self._sharing is not None else []
        if names:
            listed = ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            self._warn(
                f"{listed}: shared by the graph alone, since no two tasks have had a gradient other than 0 there. Kept "
                "in the file, and left out of every sum over shared layers until a second task has one"
            )

    def _traced(self, losses: Sequence[Tensor], *, keep: bool = False) -> Trace:
        """The graph of these losses; walked once where they are asked for again."""
        if self._graph is not None:
            known, graph = self._graph
            if len(known) == len(losses) and all(a is b for a, b in zip(known, losses, strict=True)):
                return graph
        graph = trace(losses)
        if keep:
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
        if self._memory == "low" or self._ghostly:
            raise ProbeError(
                "micro-batches are measured by every task's gradients on each of them: leave memory='low' and "
                "products='ghost' out."
            )

    def in_micro_batches(
        self,
        shared: SharedLayers,
        losses: Iterable[Sequence[Tensor]],
        shares: Sequence[float],
        tasks: int,
        *,
        aside: bool = False,
    ) -> tuple[Array, Array]:
        """The Gramians and their noise parts, (L, T, T) each, by passes of their own.

        Args:
            shared: From :meth:`find`.
            losses: (m, T); asked for one micro-batch after the other, so that each may be made and let go of.
            shares: (m,) of this process's batch.
            tasks: T.
            aside: It is no measurement of the training's own batch: nothing of it is kept.
        """
        if self.kept_micro is not None and not aside:
            self.kept_micro = []
        total = MicroSum(self._model, shared, tasks, self._ranks, None if aside else self.kept_micro)

        def all_passes() -> None:
            for one, share in zip(losses, shares, strict=True):
                total.add(one, share)

        self._ranks.together(all_passes)
        gram, noise = total.result()
        if aside:
            return gram, noise
        self.shares = total.shares
        if self.kept is not None:
            self.kept[:] = total.means
        return gram, noise

    def explicit(self, shared: SharedLayers, losses: Sequence[Tensor]) -> Array:
        """The Gramians by passes of their own.

        Args:
            shared: From :meth:`find`.
            losses: (T,).
        """
        self._as_a_whole()
        if not shared.layers:
            return np.zeros((0, len(losses), len(losses)))
        if self._sketching is not None:
            return measure_sketched(self._model, shared, losses, self._sketching.next(shared), self._ranks)
        if self._memory == "low":
            return measure_by_blocks(self._model, shared, losses, self._traced(losses), ranks=self._ranks)
        if not self._ghostly:
            return measure_explicitly(self._model, shared, losses, ranks=self._ranks, kept=self.kept)
        gram = measure_explicitly(self._model, shared, losses, find_ghosts(self._traced(losses), shared))
        return gram if self._ghosts_checked else self._check_ghosts(gram, shared, losses)

    def begin(self, shared: SharedLayers, losses: Sequence[Tensor], weights: Array) -> Array | DerivedMeasurement:
        """Either the Gramians, or a measurement that the joint backward completes.

        Args:
            shared: From :meth:`find`.
            losses: (T,), multiplied by the loss scale where the joint one is.
            weights: (T,) in force.
        """
        self._as_a_whole()
        if self._memory == "low" or self.last_gram is None or not self._trusted or not shared.layers:
            return self.explicit(shared, losses)
        present = np.array([is_present(loss) for loss in losses])
        derived = task_to_derive(self.last_gram, np.where(present, weights, 0.0), largest_cancellation(shared))
        if derived is None or self._sharing is None or not self._sharing.proven(derived):
            return self.explicit(shared, losses)
        weights = np.where(present, weights, 0.0)
        graph = self._traced(losses)
        if not self._ranks.all(may_be_derived(self._model, shared, graph) and self._as_at_first(shared, graph)):
            return self.explicit(shared, losses)
        ghosts = find_ghosts(graph, shared) if self._ghostly else []
        model, ranks, kept = self._model, self._ranks, self.kept
        if self._sketching is not None:
            draw = self._sketching.next(shared)
            return ranks.together(
                lambda: SketchedMeasurement(model, shared, losses, weights, derived, graph, draw, ranks)
            )
        return ranks.together(
            lambda: DerivedMeasurement(model, shared, losses, weights, derived, graph, ghosts, ranks, kept)
        )

    def finish(self, measurement: DerivedMeasurement, losses: Sequence[Tensor]) -> Array:
        """The Gramians once the joint backward has run, and kept the graph for a second look."""
        shared, gram = measurement.shared, measurement.result()
        if gram is None:
            return self.explicit(shared, losses)
        self._derived += 1
        if self._derived & (self._derived - 1):  # checked at the 1st, 2nd, 4th, 8th, ...
            return gram
        by_passes = self._by_passes(measurement, losses)
        apart = difference(gram, by_passes)
        if apart > tolerance(shared):
            self._trusted = False
            self._warn(
                f"a gradient derived from the joint one differs from the explicit one by {apart:.1e} of the norms, "
                f"more than {tolerance(shared):.0e}: by rounding within this model's layers, or because the joint "
                "gradient is not the weighted sum of the tasks' own (an operation that clips gradients, say). Every "
                "task gets a pass of its own from here on"
            )
        return by_passes

    def _as_a_whole(self) -> None:
        self.shares = [1.0]
        if self.kept_micro is not None:
            self.kept_micro = []

    def _as_at_first(self, shared: SharedLayers, graph: Trace) -> bool:
        """Whether tasks reach what they did at first: of several processes with different paths none can be derived."""
        return self._ranks.size == 1 or all(
            any(graph.reaches(task, p) for p in layer.parameters) == there
            for layer, reach in zip(shared.layers, shared.reach, strict=True)
            for task, there in enumerate(reach)
        )

    def _by_passes(self, measurement: DerivedMeasurement, losses: Sequence[Tensor]) -> Array:
        """The same measurement without a derived task; of sketches with the same draw."""
        if isinstance(measurement, SketchedMeasurement):
            return measure_sketched(self._model, measurement.shared, losses, measurement.draw, self._ranks)
        return self.explicit(measurement.shared, losses)

    def _refuse_sketch(self, why: str) -> None:
        if self._sketching is not None:
            raise ProbeError(f"{why}, of which sketch= keeps {self._sketching.size.numbers} numbers: leave it out.")

    def _warn_of_none(self) -> None:
        assert self.shared is not None
        assert self._sharing is not None
        if self._sharing.all_seen and not (self.shared.layers or self._selection.nothing or self._selection.divided):
            self._warn(
                "no two tasks reach a parameter in common that is trained, so there is nothing to measure yet. Layers "
                "are measured from the step on at which they are shared; gradprobe.doctor tells more"
            )

    def _check_ghosts(self, gram: Array, shared: SharedLayers, losses: Sequence[Tensor]) -> Array:
        """Once: whether products without gradients are those of the gradients. Gives the latter."""
        direct = measure_explicitly(self._model, shared, losses)
        self._ghosts_checked = True
        if difference(gram, direct) > tolerance(shared):
            self._ghostly = False
            self._warn("products without gradients differ from those of the gradients, which are made from here on")
        return direct
