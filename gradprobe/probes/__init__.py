"""Probes: what measures task gradients while a model trains. Needs torch; knows nothing of files."""

from gradprobe.probes.calls import mean_losses
from gradprobe.probes.probe import GradientProbe
from gradprobe.probes.probe_options import ProbeOptions

__all__ = ["GradientProbe", "ProbeOptions", "mean_losses"]
