"""Gradient surgery as functions of the Gramian alone: TorchJD's weightings behind one door.

All of these methods combine task gradients by T weights that depend on nothing but the T x T Gramian. So they can be
asked live (:mod:`gradprobe.trainers.surgery`) and about a recorded Gramian (``gradprobe replay``).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradprobe.errors import MissingExtraError
from gradprobe.measures import Array

__all__ = ["METHODS", "STATEFUL_METHODS", "Weighting"]


METHODS = ("pcgrad", "gradvac", "cagrad", "mgda", "upgrad", "imtl", "aligned", "fairgrad", "nash")
STATEFUL_METHODS = ("gradvac", "nash")
"""Their weights depend on the steps before, too."""


class Weighting:
    """One method.

    Args:
        name: One of :data:`METHODS`.
        tasks: T.
        seed: What is drawn at a step depends on this and the step alone, so that it can be drawn again in a replay.
        cagrad_c: CAGrad's c: how far, in norms of the mean gradient, it may go from that; the paper used 0.2 to 0.5.

    Raises:
        MissingExtraError: TorchJD, or the solver that this method needs, is not installed.
    """

    def __init__(self, name: str, tasks: int, *, seed: int = 0, cagrad_c: float = 0.4) -> None:
        self.name, self._tasks, self._seed = name, tasks, seed
        self._made = _make(name, tasks, cagrad_c)

    def __call__(self, gram: Array, step: int) -> Array | None:
        """The weights.

        Args:
            gram: (T, T), finite.
            step: The training step, for methods that draw.

        Returns:
            (T,), of the method's own scale and any sign; None where the method has no answer (its solver failed, or
            the answer is not finite). Random streams of the process are left as they were.
        """
        try:
            with _drawing(self._seed, step), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # solvers of convex programs tell of inaccurate solutions
                found = self._weights(torch.from_numpy(np.array(gram, dtype=np.float64)))
        except (ValueError, ArithmeticError, RuntimeError):
            return None
        values: Array = found.detach().double().numpy()
        return values if np.isfinite(values).all() else None

    def _weights(self, gram: Tensor) -> Tensor:
        if self.name != "nash":
            return self._made(gram)  # type: ignore[no-any-return]
        # It asks for gradients; any with this Gramian will do.
        values, vectors = torch.linalg.eigh(gram)
        return self._made(vectors * values.clamp(min=0).sqrt())  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        """What the stateful ones keep from step to step."""
        if self.name == "nash":
            return {"alpha": [float(a) for a in self._made.prvs_alpha]}
        if self.name == "gradvac" and self._made._phi_t is not None:
            return {"phi": self._made._phi_t.clone()}
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "alpha" in state:
            alpha = np.array(state["alpha"], dtype=np.float64)
            if alpha.shape != np.shape(self._made.prvs_alpha) or not np.isfinite(alpha).all():
                raise ValueError(f"alpha is {alpha.tolist()}, not a number for each task")
            self._made.prvs_alpha = alpha
        if "phi" in state:
            phi = state["phi"].clone()
            if phi.shape != (self._tasks, self._tasks) or not phi.isfinite().all():
                raise ValueError(f"phi has the shape {tuple(phi.shape)}, of {self._tasks} tasks, or is not finite")
            self._made._phi_t = phi
            self._made._state_key = (len(phi), phi.dtype)


def _make(name: str, tasks: int, cagrad_c: float) -> Any:
    why = f"--trainer {name}" if name != "nash" else "--trainer nash, whose solver is no part of `surgery`,"
    try:
        torchjd: Any = importlib.import_module("torchjd.aggregation")
    except ModuleNotFoundError as error:
        raise MissingExtraError("torchjd", "surgery" if name != "nash" else "nash", why) from error
    kinds: dict[str, Callable[[], Any]] = {
        "pcgrad": lambda: torchjd.PCGradWeighting(),
        "gradvac": lambda: torchjd.GradVacWeighting(),
        "cagrad": lambda: torchjd.CAGradWeighting(c=cagrad_c),
        "mgda": lambda: torchjd.MGDAWeighting(),
        "upgrad": lambda: torchjd.UPGradWeighting(),
        "imtl": lambda: torchjd.IMTLGWeighting(),
        "aligned": lambda: torchjd.AlignedMTLWeighting(),
        "fairgrad": lambda: torchjd.FairGradWeighting(alpha=1.0),
        "nash": lambda: torchjd.NashMTL(n_tasks=tasks, max_norm=0.0).weighting,  # our scale is set elsewhere
    }
    try:
        return kinds[name]()
    except ImportError as error:  # says which solver
        package = "ecos" if name == "nash" else {"cagrad": "cvxpy", "upgrad": "quadprog"}.get(name, "torchjd")
        raise MissingExtraError(package, "nash" if name == "nash" else "surgery", why) from error


@contextmanager
def _drawing(seed: int, step: int) -> Iterator[None]:
    """Draw from a stream that the seed and the step decide; the process's own goes on where it was."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
        yield
