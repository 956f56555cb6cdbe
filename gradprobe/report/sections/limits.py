"""What this does not show: said once, for every report, and once more for what these files lack."""

from __future__ import annotations

from gradprobe.report.chart import Prose, Section
from gradprobe.report.sections.common import Context

_ALWAYS = ("loss", "reweighting", "one_setting", "first_order", "seeds", "cause")


def section(context: Context) -> Section:
    """Points that always hold, and those that hold here."""
    words = context.words
    points = [words(f"limits.{name}") for name in (*here(context), *_ALWAYS)]
    return Section("limits", words("limits.title"), words("limits.lead"), [Prose(points, points=True)])


def here(context: Context) -> list[str]:
    """The keys of the limits that these files have."""
    study, comparison = context.study, context.comparison
    fewest = min(len(arm.runs) for arm in study.arms)
    found = {
        "no_control": not comparison.controls,
        "one_arm": len(study.arms) < 2,
        "few_seeds": fewest < 3,
        "naive": any(arm.layers and not arm.corrected for arm in study.arms),
        "no_ledger": not study.any("ledger"),
        "no_probe": not study.any("probe"),
        "no_test": bool(study.runs) and not all(run.test for run in study.runs),
        "unfinished": not all(run.complete for run in study.runs),
    }
    return [name for name, holds in found.items() if holds]
