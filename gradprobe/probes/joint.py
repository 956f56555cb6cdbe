"""Whether the tasks' gradients add up to the joint one, of which every number that is measured is a part.

Backward passes are linear where every operation's backward is. One that clips, normalises, or adds a gradient of its
own (of an auxiliary loss, say) gives each task's pass something that is not that task's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gradprobe.measures import Array
from gradprobe.probes.custom import some

MARK = "the tasks' gradients do not add up to the joint one"
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
class Apart:
    """How far the joint gradient is from the weighted sum of the tasks'.

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


def apart(gram: Array, weights: Array) -> Apart:
    """From the Gramians of the tasks' gradients and the joint one, which is the last.

    Args:
        gram: (L, T + 1, T + 1). NaN where there is no gradient, which counts as 0; infinite where one is not finite.
        weights: (T,) of the joint loss.
    """
    if not gram.size:
        return Apart(np.zeros(0))
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
    return Apart(np.where(unknown, np.nan, share))


def words(found: Apart, layers: Sequence[str], operations: Sequence[str], hooks: Sequence[str]) -> str:
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
