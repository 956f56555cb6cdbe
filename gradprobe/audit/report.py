"""An audit as plain data, as rows of a table, and as the section of a report; pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradprobe.audit.attribution import DoorFinding
from gradprobe.audit.audit import Audit
from gradprobe.audit.compare import growth

COLUMNS = ("door", "state", "contribution", "left when shut", "evidence", "how to shut it")


def plain(found: Audit) -> dict[str, Any]:
    """All of it as what JSON can hold; numbers that are not finite are null."""
    outcome, attribution, dose = found.outcome, found.attribution, found.dose
    return {
        "task": found.task,
        "others": list(found.others),
        "weight": found.options.weight,
        "steps": outcome.steps,
        "clean": found.clean,
        "class": outcome.kind,
        "sentence": found.sentence,
        "same_twice": found.same_twice.kind,
        "tolerance_ulp": number(found.same_twice.ulp.max(initial=0.0)),
        "displacement": [number(d) for d in outcome.displacement],
        "ulp": [number(u) for u in outcome.ulp],
        "growth_exponent": number(growth(list(outcome.displacement))),
        "steps_in_one_arm_alone": outcome.skipped,
        "first_differences": [
            {
                "step": s.step,
                "stage": s.stage,
                "tensor": s.name,
                "largest": number(s.size.largest),
                "relative": number(s.size.relative),
                "ulp": number(s.size.ulp),
                "what": str(s.size),
            }
            for s in outcome.sightings
        ],
        "effect": {
            mode: {name: {"without": number(a), "with": number(b)} for name, (a, b) in values.items()}
            for mode, values in outcome.effect.items()
        },
        "explained": attribution.explained if attribution else None,
        "left_with_all_shut": attribution.remainder if attribution else None,
        "doors": [door(finding) for finding in attribution.findings] if attribution else [],
        "dose": {
            "weights": list(dose.weights),
            "displacement": [number(d) for d in dose.displacement],
            "classes": dose.kinds,
            "kind": dose.kind,
            "slope": number(dose.slope),
        }
        if dose
        else None,
        "notes": found.notes,
    }


def door(finding: DoorFinding) -> dict[str, Any]:
    """One door as plain data."""
    return {
        "door": finding.name,
        "state": finding.state,
        "contribution": number(finding.contribution),
        "left_when_shut": number(finding.closed),
        "explains_alone": finding.restores,
        "evidence": finding.evidence,
        "what": finding.door.title,
        "how_to_shut": finding.door.remedy,
    }


def number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if math.isfinite(value) else None


def rows(found: Audit) -> list[tuple[str, ...]]:
    """One row per door, in the order of :data:`COLUMNS`."""
    findings: Sequence[DoorFinding] = found.attribution.findings if found.attribution else ()
    return [
        (
            f.name,
            f.state,
            _short(f.contribution),
            _short(f.closed),
            f.evidence,
            f.door.remedy if f.state == "open" else "",
        )
        for f in findings
    ]


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def lines(found: Audit) -> list[str]:
    """What stands around the table."""
    outcome = found.outcome
    said = [found.sentence, *found.notes]
    if not found.clean:
        power = growth(list(outcome.displacement))
        pace = "" if math.isnan(power) else f", growing as steps^{power:.2g}"
        trained = f"Displacement of what {', '.join(found.others)} trains, relative to how far it came"
        said.append(f"{trained}: {outcome.last:.3g} after {outcome.steps} steps{pace}.")
        said.append("First seen:")
        said += [f"  {sighting}" for sighting in outcome.sightings]
    for mode, values in outcome.effect.items():
        for name, (a, b) in values.items():
            said.append(
                f"{name} in {mode} mode after {outcome.steps} steps: {a:.7g} without {found.task}, {b:.7g} with it"
            )
    if found.dose:
        pairs = zip(found.dose.weights, found.dose.displacement, strict=True)
        said.append("Dose: " + ", ".join(f"{w:g}: {d:.2g}" for w, d in pairs) + f". {found.dose.kind}")
    return said


def section(found: Audit) -> str:
    """The audit as a section of a report, in Markdown."""
    body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows(found))
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    text = "\n".join(lines(found)[1:])
    return f"## Audit of {found.task}\n\n{found.sentence}\n\n{head}\n{body}\n\n```\n{text}\n```\n"
