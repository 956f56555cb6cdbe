"""Interference removed by removing sharing: a backbone or layers of its own for each task, or a detached head.

What a second backbone costs is parameters and operations, which the run file holds (`model.parameters`,
`model.flops_per_image`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, cast

from torch import nn

from gradprobe.errors import UsageError
from gradprobe.trainers.balancer import Setup
from gradprobe.trainers.joint import Joint
from gradprobe.trainers.settings import Settings


class Dual(Joint):
    """Static weights; the layers of the trunk behind ``--share-until`` are doubled, by default all."""

    @classmethod
    def divides(cls, settings: Settings) -> bool:
        """Unless some layers stay shared."""
        return not settings.share_until

    @classmethod
    def prepare(cls, model: Any, setup: Setup) -> nn.Module:
        """The divided model; both copies start from the reference."""
        layers = model.trunk_layers(setup.settings.imgsz)
        return cast(nn.Module, model.divide(_layers_after(layers, setup.settings.share_until)))


class Split(Joint):
    """Static weights; the layers that an earlier run showed in conflict are doubled (``--from``, ``--top-k``).

    Shi et al., "Recon: Reducing Conflicting Gradients from the Root for Multi-Task Learning", ICLR 2023, with the score
    of ``gradprobe advise`` in the place of a fixed threshold.
    """

    @classmethod
    def prepare(cls, model: Any, setup: Setup) -> nn.Module:
        """The divided model; both copies start from the reference.

        Raises:
            UsageError: A layer is not there, or has another size than in the run.
        """
        s = setup.settings
        layers = model.trunk_layers(s.imgsz)
        chosen = _layers_at(layers, s.double, f"--from {s.from_run}: layer")
        for name, recorded in zip(s.double, s.double_sizes, strict=False):  # none in runs that are gone on with
            size = sum(parameter.numel() for parameter in model.get_submodule(name).parameters(recurse=False))
            if size != recorded:
                raise UsageError(
                    f"--from {s.from_run}: was recorded from another architecture: its layer {name} has {recorded:,} "
                    f"parameters, this model's {size:,}. Record a joint run of this one first."
                )
        return cast(nn.Module, model.divide(chosen))


class Detach(Joint):
    """Static weights, on a model whose classification head learns from a detached trunk, which detection alone shapes.

    No gradient can interfere, by construction: a control for what the second task's gradients do to the first. The
    tasks share no layer then, and the run file holds none: interference is not applicable, which is not the same as 0.
    """

    @classmethod
    def divides(cls, settings: Settings) -> bool:
        """Always."""
        return True

    @classmethod
    def prepare(cls, model: Any, setup: Setup) -> nn.Module:
        """The same model, its classification head detached."""
        model.detached = True
        return model  # type: ignore[no-any-return]


def _layers_after(layers: Sequence[str], last: str) -> tuple[str, ...]:
    """The layers behind the last one at or below the module ``last``; all where ``last`` is empty.

    Raises:
        UsageError: No layer is called so; lists the near ones.
    """
    if not last:
        return tuple(layers)
    chosen = _layers_at(layers, [last], "--share-until")
    return tuple(layers[layers.index(chosen[-1]) + 1 :])


def _layers_at(layers: Sequence[str], names: Iterable[str], flag: str) -> tuple[str, ...]:
    """The layers at or below some modules, in the order of ``layers``.

    Raises:
        UsageError: There is none at one of the names; lists the near ones.
    """
    chosen: set[str] = set()
    for name in names:
        found = [layer for layer in layers if layer == name or layer.startswith(name + ".")]
        if not found:
            parts = {".".join(layer.split(".")[:n]) for layer in layers for n in range(2, layer.count(".") + 2)}
            near = get_close_matches(name, sorted(parts), n=3, cutoff=0.5) or list(layers[:3])
            raise UsageError(f"{flag} {name!r}: the trunk has no such layer (near: {', '.join(near)}).")
        chosen.update(found)
    return tuple(layer for layer in layers if layer in chosen)
