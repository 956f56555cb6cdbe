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
from gradprobe.probes.binding import Binding, Selection
from gradprobe.probes.blocks import measure_by_blocks
from gradprobe.probes.checks import Losses
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
from gradprobe.probes.ranks import Alone
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
        shared: None before the first measurement.
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
        self._binding: Binding | None = None
        self._looked, self._told = 0, False  # whether more is shared than at first
        self._derived, self._trusted = 0, True  # rows with a derived task; whether these equal explicit ones
        self.shared: SharedLayers | None = None
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
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another meter stopped."""
        gram, ghosts = state["last_gram"], state["ghosts"]
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
        if self.shared is None or self._binding is None:
            refuse(self._model, list(losses.values()))
            self.shared = self._selection.find(losses)
            self._ranks.check_same(self.shared)
            self._binding = Binding(self._model, self.shared)
            self._warn_of_none()
            return self.shared
        replaced = self._binding.replaced(self.shared)
        if replaced:
            refuse(self._model, list(losses.values()))  # they may be shards now
            self.shared = self._binding.again(self.shared)
            self._warn(
                f"{len(replaced)} shared parameters were replaced, {replaced[0]!r} first; the probe goes on with "
                "the new ones. An optimizer made before still updates the old ones: make it anew"
            )
        self._warn_of_more(list(losses.values()))
        return self.shared

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
            return measure_by_blocks(self._model, shared, losses, trace(losses), ranks=self._ranks)
        if not self._ghostly:
            return measure_explicitly(self._model, shared, losses, ranks=self._ranks, kept=self.kept)
        gram = measure_explicitly(self._model, shared, losses, find_ghosts(trace(losses), shared))
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
        derived = task_to_derive(self.last_gram, weights, largest_cancellation(shared))
        if derived is None:
            return self.explicit(shared, losses)
        graph = trace(losses)
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

    def reach_now(self, losses: Sequence[Tensor]) -> NDArray[np.bool_]:
        """Which task's graph reaches which layer at this step: (L, T)."""
        assert self.shared is not None
        graph = trace(losses)
        reach = [
            [any(p.requires_grad and graph.reaches(task, p) for p in layer.parameters) for task in range(len(losses))]
            for layer in self.shared.layers
        ]
        return np.array(reach, dtype=bool).reshape(len(self.shared.layers), len(losses))

    def _warn_of_none(self) -> None:
        assert self.shared is not None
        if not (self.shared.layers or self._selection.nothing or self._selection.divided):
            self._warn(
                "no two tasks reach a parameter in common that is trained, so there is nothing to measure. Begin "
                "recording at a step at which every task has samples, with the trunk not frozen; gradprobe.doctor "
                "tells more"
            )

    def _warn_of_more(self, losses: Sequence[Tensor]) -> None:
        """A file has the layers that it began with. Looked for ever more rarely: it costs a walk of the graph."""
        assert self.shared is not None
        self._looked += 1
        if self._told or not self._selection.open or self._looked & (self._looked - 1):
            return
        layer = self._selection.left_out(trace(losses), {id(p) for p in self.shared.parameters})
        if layer is not None:
            self._told = True
            self._warn(
                f"layer {layer!r} is shared now but was not, or not all of it, when the layers were found, at the "
                "first measured step, and is left out. Close the probe and attach a new one, or begin at a step at "
                "which every task has samples and nothing is frozen that is trained later"
            )

    def _check_ghosts(self, gram: Array, shared: SharedLayers, losses: Sequence[Tensor]) -> Array:
        """Once: whether products without gradients are those of the gradients. Gives the latter."""
        direct = measure_explicitly(self._model, shared, losses)
        self._ghosts_checked = True
        if difference(gram, direct) > tolerance(shared):
            self._ghostly = False
            self._warn("products without gradients differ from those of the gradients, which are made from here on")
        return direct

    def check_reach(self, tasks: Sequence[str], gram: Array) -> None:
        """Warn where a task reaches a layer now that it did not reach when the layers were found.

        What such a step brings there is stored, but left out of quantities over all layers, so that they stay
        comparable from step to step.
        """
        assert self.shared is not None
        reach = np.array(self.shared.reach, dtype=bool).reshape(gram.shape[:2])
        new = np.argwhere(~np.isnan(np.diagonal(gram, axis1=-2, axis2=-1)) & ~reach)
        if len(new):
            layer, task = new[0]
            self._warn(
                f"task {tasks[task]!r} reaches layer {self.shared.layers[layer].name!r} now but did not when the "
                "layers were found, at the first measured step; begin recording at one at which every task has samples"
            )
