"""What the parts of one step's update did to each task's loss; functions on long vectors of parameters.

Term ij is half the inner product of task i's gradient at both ends of the step with source j's part of the update. The
left end's gradient and the part share a batch, by whose noise the product is too low; micro-batches tell that noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradprobe.measures import Array

__all__ = ["correction", "effects", "in_float64", "noise_products", "own_effects", "products", "term"]


_TINY = 1e-30
"""Squared lengths below are no longer exact in float32."""


def products(rows: Tensor, sizes: Sequence[int]) -> Array:
    """Inner products of every two rows, layer by layer.

    Args:
        rows: (K, n), side by side the numbers of parameters.
        sizes: How many of the n belong to each layer, in their order.

    Returns:
        (layers, K, K) float64.
    """
    found = torch.stack([piece @ piece.T for piece in rows.split(list(sizes), dim=1)])
    squares = torch.diagonal(found, dim1=1, dim2=2)
    if rows.dtype != torch.float64 and bool(((squares < _TINY) | ~squares.isfinite()).any()):
        # Too small or large for products in the parameters' own type. Exact zeros come here too, and stay zero.
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        found = torch.stack([(p := piece.to(wide)) @ p.T for piece in rows.split(list(sizes), dim=1)])
    return found.cpu().double().numpy()


def effects(gradients: Tensor, parts: Tensor, sizes: Sequence[int]) -> Array:
    """What each part changes each task's loss by, to first order, layer by layer.

    Args:
        gradients: (T, n) of the unweighted losses.
        parts: (S, n) of the update.
        sizes: As for :func:`products`.

    Returns:
        (layers, T, S) float64, in units of loss.
    """
    gradients, parts = in_float64(gradients), in_float64(parts)
    pieces = zip(gradients.split(list(sizes), dim=1), parts.split(list(sizes), dim=1), strict=True)
    found = torch.stack([g @ p.T for g, p in pieces])
    return found.cpu().double().numpy()


def in_float64(numbers: Tensor) -> Tensor:
    """Themselves where they are; in float32 on a device that has no wider type."""
    return numbers.to(torch.float32 if numbers.device.type == "mps" else torch.float64)


def own_effects(gradients: Tensor, parts: Tensor, sizes: Sequence[int]) -> Array:
    """The diagonal of :func:`effects`, of parts of the tasks: (layers, T)."""
    found = [piece.sum(dim=1) for piece in (in_float64(gradients) * in_float64(parts)).split(list(sizes), dim=1)]
    return torch.stack(found).cpu().double().numpy()


def noise_products(
    mean: Tensor, micro: Sequence[Tensor], shares: Sequence[float], sizes: Sequence[int], factor: Tensor | float = 1.0
) -> Array:
    """The part of gradients' inner products that is their common noise, layer by layer: unbiased.

    Args:
        mean: (T, n) of the batch: ``sum(share * gradients of the micro-batch)``.
        micro: (m) of (T, n), one per micro-batch; they are independent.
        shares: (m) of the samples, which sum to 1.
        sizes: As for :func:`products`.
        factor: (n,) or a number, not negative: by which each number's product is multiplied.

    Returns:
        (layers, T, T), in (loss per unit of parameter)^2 times ``factor``; NaN with fewer than two micro-batches.
    """
    square = float(np.square(shares).sum())
    if len(micro) < 2 or not square < 1:
        return np.full((len(sizes), len(mean), len(mean)), np.nan)
    root = factor.sqrt() if isinstance(factor, Tensor) else factor**0.5
    whole = products(mean * root, sizes)
    apart = sum(products(g * root, sizes) * share**2 for g, share in zip(micro, shares, strict=True))
    return (apart - square * whole) / (1 - square)


def correction(noise: Array, weights: Array, scale: float, sources: int) -> Array:
    """What the left end lacks for its gradient and the update being of one batch.

    Args:
        noise: (L, T, T) from :func:`noise_products`, with the ``factor`` of
            :func:`gradprobe.ledger.update_parts.own_factor`.
        weights: (T,) in force.
        scale: What the optimizer was given over the weighted sum of the gradients.
        sources: S, of which the first T are the tasks.

    Returns:
        (L, T, S) to be added to the left end; 0 for sources that are not of this batch.
    """
    layers, tasks = noise.shape[:2]
    found = np.zeros((layers, tasks, sources))
    found[..., :tasks] = noise * (scale * np.asarray(weights, dtype=np.float64))
    return found


def term(left: Array, correction: Array, right: Array) -> Array:
    """The mean of both ends; NaN where one is unknown."""
    return 0.5 * (left + correction + right)
