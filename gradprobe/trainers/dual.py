"""A backbone of its own for each task, or for some of its layers: it removes interference by removing sharing.

What it costs is parameters and operations, which the run file holds (`model.parameters`, `model.flops_per_image`).
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from gradprobe.errors import UsageError
from gradprobe.trainers.balancer import Setup
from gradprobe.trainers.joint import Joint
from gradprobe.trainers.models.names import after, at_or_below
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
        return cast(nn.Module, model.divide(after(layers, setup.settings.share_until)))


class Split(Joint):
    """Static weights; the layers that an earlier run showed in conflict are doubled (``--from``, ``--top-k``).

    Shi et al., "Recon: Reducing Conflicting Gradients from the Root for Multi-Task Learning", ICLR 2023, with the score
    of :mod:`gradprobe.verdict.layers` in the place of a fixed threshold.
    """

    @classmethod
    def prepare(cls, model: Any, setup: Setup) -> nn.Module:
        """The divided model; both copies start from the reference.

        Raises:
            UsageError: A layer is not there, or has another size than in the run.
        """
        s = setup.settings
        layers = model.trunk_layers(s.imgsz)
        chosen = at_or_below(layers, s.double, f"--from {s.from_run}: layer")
        for name, recorded in zip(s.double, s.double_sizes, strict=False):  # none in runs that are gone on with
            size = sum(parameter.numel() for parameter in model.get_submodule(name).parameters(recurse=False))
            if size != recorded:
                raise UsageError(
                    f"--from {s.from_run}: was recorded from another architecture: its layer {name} has {recorded:,} "
                    f"parameters, this model's {size:,}. Record a joint run of this one first."
                )
        return cast(nn.Module, model.divide(chosen))
