"""A backbone of its own for each task, or for some of its layers: it removes interference by removing sharing.

What it costs is parameters and operations, which the run file holds (`model.parameters`, `model.flops_per_image`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

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
        from gradprobe.trainers.models.divided import DividedModel, after, trunk_layers

        layers = trunk_layers(model, setup.settings.imgsz)
        return DividedModel(model, after(layers, setup.settings.share_until))


class Split(Joint):
    """Static weights; the layers that an earlier run showed in conflict are doubled (``--from``, ``--top-k``).

    Shi et al., "Recon: Reducing Conflicting Gradients from the Root for Multi-Task Learning", ICLR 2023, with the score
    of :mod:`gradprobe.verdict.layers` in the place of a fixed threshold.
    """

    @classmethod
    def prepare(cls, model: Any, setup: Setup) -> nn.Module:
        """The divided model; both copies start from the reference."""
        from gradprobe.trainers.models.divided import DividedModel, at_or_below, trunk_layers

        layers = trunk_layers(model, setup.settings.imgsz)
        flag = f"--from {setup.settings.from_run}: layer"
        return DividedModel(model, at_or_below(layers, setup.settings.double, flag))
