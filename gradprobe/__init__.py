"""Measures whether tasks trained together interfere, and whether a remedy reduced it.

The names below are imported when they are first used, so that ``import gradprobe`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gradprobe.attachment import attach
    from gradprobe.errors import GradprobeError
    from gradprobe.probes.doctor import doctor
    from gradprobe.probes.probe import GradientProbe
    from gradprobe.probes.probe_samples import ProbeLoader
    from gradprobe.runfile import Run, RunWriter, open_run
    from gradprobe.updates import Ledger, Updates

_HOME = {
    "attach": "gradprobe.attachment",
    "doctor": "gradprobe.probes.doctor",
    "open_run": "gradprobe.runfile",
    "GradientProbe": "gradprobe.probes.probe",
    "GradprobeError": "gradprobe.errors",
    "ProbeLoader": "gradprobe.probes.probe_samples",
    "Run": "gradprobe.runfile",
    "RunWriter": "gradprobe.runfile",
    "Ledger": "gradprobe.updates",
    "Updates": "gradprobe.updates",
}

__all__ = [
    "GradientProbe",
    "GradprobeError",
    "Ledger",
    "ProbeLoader",
    "Run",
    "RunWriter",
    "Updates",
    "attach",
    "doctor",
    "open_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradprobe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
