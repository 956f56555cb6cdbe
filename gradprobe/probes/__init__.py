"""Probes: what measures task gradients while a model trains. Needs torch; knows nothing of files."""

from gradprobe.probes.probe import GradientProbe

__all__ = ["GradientProbe"]
