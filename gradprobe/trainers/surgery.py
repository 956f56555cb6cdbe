"""Gradient surgery: the task gradients of the shared layers are combined by weights made from their own Gramian.

The methods are TorchJD's (https://torchjd.org, extra `surgery`); this file gives them the Gramian of the present step
and makes runs comparable.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradprobe import measures
from gradprobe.errors import TrainingError
from gradprobe.measures import Array
from gradprobe.probes.gramian import GramianSum
from gradprobe.probes.shared_layers import SharedLayers, by_module, find_shared
from gradprobe.probes.state import state_kept
from gradprobe.processes import everybody, replicas
from gradprobe.trainers.balancer import Balancer, Setup, check_static, restored_count
from gradprobe.trainers.settings import Settings
from gradprobe.trainers.weightings import Weighting
from gradprobe.updates.heads import private_parameters

__all__ = ["choose"]


class Surgery(Balancer):
    """One method of :data:`gradprobe.trainers.weightings.METHODS`.

    The weights are those of this step's gradients. They hold for the shared layers, as in the papers: private layers
    (the heads) learn with the static weights, because a weight of 0 would stop a head, and a negative one drive it
    uphill. After the backward, :meth:`after_backward` sees to that.

    Under data parallelism the gradients are averaged over the processes first, so that all take the same step: with a
    DDP model, and in a training that averages gradients by itself over all processes. Under a GradScaler, set
    ``loss_scale`` to its scale before each step.

    Where the method has no answer (its solver failed, a gradient is not finite), the static weights are taken, with a
    warning.

    Args:
        method: Such as ``"pcgrad"``.
        model: Its shared layers are found from the graph of the first losses. DDP, or any module.
        static: Task -> weight of the joint step: its norm is the scale, and its heads' weights are kept.
        match_norm: Scale the weights so that the combined gradient is as long as the joint one. The methods' own
            scales differ (PCGrad's weights sum to T and more, MGDA's to 1), and would act as learning rates.
        seed: For the methods that draw.
        cagrad_c: See :class:`gradprobe.trainers.weightings.Weighting`.

    Raises:
        MissingExtraError: TorchJD or a solver is not installed.
    """

    same_step = True
    signed = True

    def __init__(
        self,
        method: str,
        model: nn.Module,
        static: Mapping[str, float],
        *,
        match_norm: bool = True,
        seed: int = 0,
        cagrad_c: float = 0.4,
    ) -> None:
        self._static = check_static(static)
        self._tasks = tuple(self._static)
        self._method = Weighting(method, len(self._tasks), seed=seed, cagrad_c=cagrad_c)
        own = None if isinstance(model, DistributedDataParallel) else everybody()
        self._model, self._ranks = replicas(model, own)
        self._match = match_norm
        self._weights = dict(self._static)
        self._count = 0
        self._warned = False
        self._shared: SharedLayers | None = None
        self._private: list[list[nn.Parameter]] = []
        self._heads: list[tuple[nn.Parameter, Tensor]] = []

    def weights(self) -> dict[str, float]:
        """Task -> weight on the shared layers; of any sign."""
        return dict(self._weights)

    def update(self, losses: Mapping[str, Tensor]) -> None:
        """T explicit backward passes, their Gramian, and the method's answer to it."""
        gram = self._measure([losses[task] for task in self._tasks])
        found = choose(self._method, gram, self._count, np.array(list(self._static.values())), match=self._match)
        if found is None:
            self._warn()
            self._weights = dict(self._static)
        else:
            self._weights = dict(zip(self._tasks, found.tolist(), strict=True))
        self._count += 1

    def after_backward(self) -> None:
        """Give private parameters their gradient with the static weight."""
        for parameter, gradient in self._heads:
            parameter.grad = gradient
        self._heads = []

    def _measure(self, losses: list[Tensor]) -> Array:
        if self._shared is None:
            self._find(losses)
        assert self._shared is not None
        shared = self._shared.parameters
        total = GramianSum(self._shared.layers, len(losses))
        found = []
        with state_kept(self._model) as back:
            for loss, own in zip(losses, self._private, strict=True):
                parameters = [*shared, *own]
                scaled = loss * self.loss_scale if self.loss_scale != 1 else loss
                gradients = torch.autograd.grad(scaled, parameters, retain_graph=True, allow_unused=True)
                found.append(self._ranks.average(gradients, parameters))
                back()
        for index in range(len(shared)):
            total.add(index, [gradients[index] for gradients in found])
        self._heads = [
            (parameter, gradient.view_as(parameter) * weight)
            for own, gradients, weight in zip(self._private, found, self._static.values(), strict=True)
            for parameter, gradient in zip(own, gradients[len(shared) :], strict=True)
            if gradient is not None
        ]
        return measures.over_all(total.result() / self.loss_scale**2, np.array(self._shared.reach))

    def _find(self, losses: list[Tensor]) -> None:
        self._shared = find_shared(by_module(self._model), dict(zip(self._tasks, losses, strict=True)))
        if not self._shared.layers:
            raise TrainingError(f"{self._method.name}: the tasks share no layer, so there is nothing to combine.")
        self._private = private_parameters(self._model, self._shared, losses)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._method.name} had no answer at step {self._count} (a gradient is not finite, or its solver "
                "failed); the static weights are taken where that is so.",
                RuntimeWarning,
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """The step, on which what is drawn depends, and what a stateful method keeps."""
        return {"count": self._count, "weights": dict(self._weights), "method": self._method.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._count, self._weights = (
            restored_count(state, "count"),
            {task: float(w) for task, w in state["weights"].items()},
        )
        self._method.load_state_dict(state["method"])

    @classmethod
    def require(cls, settings: Settings) -> None:
        """TorchJD, and this method's solver."""
        Weighting(settings.trainer, len(settings.task_weights))

    @classmethod
    def create(cls, model: nn.Module, setup: Setup) -> Balancer:
        """The method that ``--trainer`` names."""
        s = setup.settings
        return cls(s.trainer, model, setup.static, match_norm=s.match_norm, seed=s.seed, cagrad_c=s.cagrad_c)


def choose(method: Weighting, gram: Array, step: int, static: Array, *, match: bool) -> Array | None:
    """The weights of one step, live or replayed.

    Args:
        method: Asked for weights.
        gram: (T, T) over the shared layers.
        step: The training step.
        static: (T,) weights of the joint step.
        match: Whether to scale to the norm of the joint step.

    Returns:
        (T,), or None where there is no answer.
    """
    if not np.isfinite(gram).all():
        return None
    size = float(np.trace(gram)) / len(gram)
    if not match or size == 0:
        return method(gram, step)
    # Only ratios matter then, and solvers have thresholds of their own that small gradients would fall below.
    found = method(gram / size, step)
    return None if found is None else measures.match_norm(gram, found, static)
