"""GradNorm: task weights learned so that all tasks train at a similar rate.

Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
Networks", ICML 2018, arXiv:1711.02257.

What it can and cannot do: at fixed parameters a reweighting changes no cosine, only magnitudes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from gradprobe.errors import UsageError
from gradprobe.processes import mean_over_processes
from gradprobe.trainers.balancer import Balancer, Setup, loss_values, restored_tensor
from gradprobe.trainers.optim import restore_optimizer

__all__ = ["GradNorm"]


def weight_gradient(weight: Tensor, norm: Tensor, loss_ratio: Tensor, alpha: float) -> Tensor:
    """The gradient of GradNorm's loss with respect to the weights, in closed form.

    For w > 0 the weighted gradient norm is ``G_i = w_i n_i``, so with the targets held constant
    ``d/dw_i sum_k |G_k - target_k| = sign(G_i - target_i) n_i``: no double backward is needed.

    Args:
        weight: (T,) > 0.
        norm: (T,) n_i = |grad_W L_i|, the norms of the *unweighted* losses' gradients on W.
        loss_ratio: (T,) L_i(t) / L_i(0).
        alpha: Strength of the pull towards equal rates; 0: equal norms.

    Returns:
        (T,). Zero for a task that is exactly on its target.
    """
    weighted = weight * norm
    rate = loss_ratio / loss_ratio.mean()  # the inverse training rate: above 1 the task lags behind
    target = weighted.mean() * rate**alpha
    return torch.sign(weighted - target) * norm


def project(weight: Tensor, total: float, lowest: float, highest: float) -> Tensor:
    """Rescale weights to a sum, within bounds.

    Where no bound is met this is the paper's renormalisation ``w_i total / sum w``. Else the factor is the one for
    which the *clipped* weights have the sum.

    Args:
        weight: (T,), any sign.
        total: What they sum to afterwards.
        lowest, highest: Bounds of each.

    Returns:
        (T,), summing to ``total``, each within the bounds.

    Raises:
        UsageError: No weights within the bounds have that sum.
    """
    count = len(weight)
    if not count * lowest <= total <= count * highest or lowest > highest:
        raise UsageError(
            f"no {count} weights between --min-weight {lowest} and --max-weight {highest} sum to --weight-sum {total}."
        )
    # A weight that Adam pushed to 0 or below keeps a trace, so that it can grow again.
    positive = weight.clamp(min=1e-12 * float(weight.max().clamp(min=1e-12)))
    plain = positive * (total / positive.sum())
    if plain.min() >= lowest and plain.max() <= highest:
        return plain
    return _clipped_scaling(positive, total, lowest, highest)


def _clipped_scaling(weight: Tensor, total: float, lowest: float, highest: float) -> Tensor:
    """``clip(c w)`` for the c that gives the sum, which is piecewise linear and growing in c."""

    def clipped(factor: Tensor) -> Tensor:
        return (factor * weight).clamp(lowest, highest)

    bends = torch.cat([lowest / weight, highest / weight])
    bends = bends[bends.isfinite()].sort().values
    below = [c for c in bends if clipped(c).sum() <= total]
    start = below[-1] if below else torch.zeros((), dtype=weight.dtype)
    above = [c for c in bends if c > start]
    inside = (start + above[0]) / 2 if above else start * 2 + 1
    free = (inside * weight > lowest) & (inside * weight < highest)
    if not free.any():
        return clipped(start)
    fixed = clipped(inside)[~free].sum()
    factor = (total - fixed) / weight[free].sum()
    return torch.where(free, factor * weight, clipped(inside))


class GradNorm(Balancer):
    """The balancer; usable in anyone's loop.

    Args:
        initial: Task -> first weight; scaled to ``total``, their ratio kept.
        parameters: W, the weights of the last shared layer.
        alpha: Strength of the pull towards equal training rates; the paper used 0.12 to 1.5, and calls 3 unstable.
        lr: Of the weights' own Adam.
        momentum: Its beta1.
        total: What the weights sum to at every step; default the number of tasks.
        lowest, highest: Bounds of every weight.
        initial_losses: Task -> L(0); default the first losses seen. For C-way cross-entropy log C is an alternative.

    Raises:
        UsageError: The bounds allow no such sum; or, at the first update, a task does not reach W.

    Example:
        >>> balancer = GradNorm({"det": 1.0, "cls": 1.0}, trunk[-1].parameters())  # doctest: +SKIP
        ... weights = balancer.weights()
        ... balancer.update(losses)
        ... sum(weights[t] * losses[t] for t in losses).backward()
    """

    def __init__(
        self,
        initial: Mapping[str, float],
        parameters: Sequence[nn.Parameter],
        *,
        alpha: float = 1.5,
        lr: float = 0.025,
        momentum: float = 0.9,
        total: float | None = None,
        lowest: float = 1e-3,
        highest: float = float("inf"),
        initial_losses: Mapping[str, float] | None = None,
    ) -> None:
        self._tasks = tuple(initial)
        self._parameters = list(parameters)
        self._alpha = alpha
        self._total = float(len(self._tasks)) if total is None else total
        self._bounds = (lowest, highest)
        first = torch.tensor([initial[t] for t in self._tasks], dtype=torch.float64)
        self._weight = nn.Parameter(project(first, self._total, *self._bounds))
        # No decay, and nothing shared with the model's optimizer: else the weights would move by themselves.
        self._optimizer = torch.optim.Adam([self._weight], lr=lr, betas=(momentum, 0.999))
        self._initial_losses: Tensor | None = None
        if initial_losses is not None:
            self._initial_losses = torch.tensor([initial_losses[t] for t in self._tasks], dtype=torch.float64)

    def weights(self) -> dict[str, float]:
        """Task -> weight; positive, summing to ``total``."""
        return dict(zip(self._tasks, self._weight.tolist(), strict=True))

    def update(self, losses: Mapping[str, Tensor]) -> None:
        """One step of Adam on the weights, then the projection; Adam's moments are kept as they are.

        A step whose losses or norms are not finite leaves the weights where they are. Under data parallelism losses
        and gradients are those of the whole batch, so that all ranks keep the same weights.
        """
        norms = torch.stack([self._norm(t, losses[t]) for t in self._tasks])
        self.advance(loss_values(losses, self._tasks), norms.cpu())

    def advance(self, values: Tensor, norms: Tensor) -> None:
        """The same from numbers alone: losses (T,) and norms (T,) of their gradients on W, float64, on the CPU."""
        if not (values.isfinite().all() and norms.isfinite().all()):
            return  # nor may such a step become L(0)
        if self._initial_losses is None:
            self._initial_losses = values
        gradient = weight_gradient(self._weight.detach(), norms, values / self._initial_losses, self._alpha)
        if not gradient.isfinite().all():  # a first loss of 0 has no ratio
            return
        self._weight.grad = gradient
        self._optimizer.step()
        with torch.no_grad():
            self._weight.copy_(project(self._weight.detach(), self._total, *self._bounds))

    def _norm(self, task: str, loss: Tensor) -> Tensor:
        scaled = loss * self.loss_scale if self.loss_scale != 1 else loss
        gradients = torch.autograd.grad(scaled, self._parameters, retain_graph=True, allow_unused=True)
        if self._initial_losses is None and all(gradient is None for gradient in gradients):
            raise UsageError(
                f"GradNorm's layer is not shared: task {task!r} does not reach it. Choose one that all tasks use "
                "(--gradnorm-layer), best the last."
            )
        pairs = zip(gradients, self._parameters, strict=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1).double() for g, p in pairs])
        norm: Tensor = torch.linalg.vector_norm(mean_over_processes(flat)) / self.loss_scale
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Weights, Adam's moments and L(0)."""
        return {
            "weight": self._weight.detach().clone(),
            "optimizer": self._optimizer.state_dict(),
            "initial_losses": self._initial_losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another GradNorm stopped."""
        with torch.no_grad():
            self._weight.copy_(restored_tensor(state, "weight", self._weight))
        restore_optimizer(self._optimizer, state["optimizer"])
        self._initial_losses = None
        if state["initial_losses"] is not None:
            self._initial_losses = restored_tensor(state, "initial_losses", self._weight)

    @classmethod
    def create(cls, model: Any, setup: Setup) -> Balancer:
        """With the ``--gradnorm-...`` settings."""
        s = setup.settings
        return cls(
            setup.static,
            _layer_parameters(model, s.gradnorm_layer or model.last_shared_layer),
            alpha=s.gradnorm_alpha,
            lr=s.gradnorm_lr,
            momentum=s.gradnorm_momentum,
            total=s.weight_sum,
            lowest=s.min_weight,
            highest=s.max_weight,
        )


def _layer_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of the module called ``name``.

    Raises:
        UsageError: No module is called so, or it has none; lists the near ones.
    """
    modules = {n: m for n, m in model.named_modules() if n and any(True for _ in m.parameters())}
    if name not in modules:
        near = get_close_matches(name, list(modules), n=3)
        raise UsageError(f"--gradnorm-layer {name!r}: the model has no such layer (near: {', '.join(near) or 'none'}).")
    return list(modules[name].parameters())
