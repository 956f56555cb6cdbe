"""Probes: what measures task gradients while a model trains. Needs torch; knows nothing of files."""

from __future__ import annotations

from gradprobe.probes.probe import GradientProbe

__all__ = ["GradientProbe"]
