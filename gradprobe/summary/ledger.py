"""What a loss ledger says of the whole run, and whether to believe it."""

from __future__ import annotations

from typing import Any

from gradprobe import measures
from gradprobe.ledger.windows import window
from gradprobe.runfile import schema
from gradprobe.runfile.reader import Run


def summarise(run: Run) -> dict[str, Any] | None:
    """For :func:`gradprobe.summary.summarise`; None where no ledger was kept.

    Of all rows of the run, not of every k-th: sums are what counts.
    """
    if not run.count(schema.LEDGER):
        return None
    found = window(run.ledger, run.tasks)
    return {
        "rows": run.count(schema.LEDGER),
        "counted": len(found.rows),
        "left_out": dict(found.left_out),
        "ends": run.provenance.get("probe.ledger.ends"),
        "samples": run.provenance.get("probe.ledger.samples"),
        "tasks": {
            task: {
                "change": measures.known(found.change[i]),
                "residual": measures.known(found.residual[i]),
                "size": measures.known(found.size[i]),
                "own_progress": measures.known(found.own[i]),
                "gates": [
                    {
                        "name": gate.name,
                        "passed": gate.passed,
                        "value": measures.known(gate.value),
                        "limit": gate.limit,
                        "sentence": str(gate.sentence),
                    }
                    for gate in found.gates[i]
                ],
            }
            for i, task in enumerate(run.tasks)
        },
        "cancelled": [
            {"task": task, "by": other, "c": measures.known(found.interference[i, j])}
            for i, task in enumerate(run.tasks)
            for j, other in enumerate(run.tasks)
            if i != j
        ],
    }


def sentences(found: dict[str, Any] | None) -> list[str]:
    """In words; empty where there is no ledger."""
    if found is None:
        return []
    said = [f"Loss ledger: {found['counted']} of {found['rows']} rows count."]
    for pair in found["cancelled"]:
        if pair["c"] is None:
            continue
        verb = "cancelled" if pair["c"] > 0 else "added"
        said.append(
            f"{pair['by']}'s part of the updates {verb} {abs(pair['c']):.0%} of {pair['task']}'s own progress (C = "
            f"{pair['c']:+.2f}), of this run alone."
        )
    for task, about in found["tasks"].items():
        shut = [gate for gate in about["gates"] if not gate["passed"]]
        if shut:
            said.append(f"What others did to {task} cannot be told: {'; '.join(gate['sentence'] for gate in shut)}.")
    return said
