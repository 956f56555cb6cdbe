"""What a loss ledger says of the whole run, and whether to believe it."""

from __future__ import annotations

from typing import Any

from gradprobe import measures
from gradprobe.ledger.windows import window
from gradprobe.messages import Message
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


def messages(found: dict[str, Any] | None) -> list[Message]:
    """In words; empty where there is no ledger."""
    if found is None:
        return []
    said = [Message("summary.ledger", n=found["counted"], rows=found["rows"])]
    for pair in found["cancelled"]:
        if (c := pair["c"]) is not None:
            key = "summary.cancelled" if c > 0 else "summary.added"
            said.append(Message(key, by=pair["by"], task=pair["task"], part=abs(c), c=c))
    for task, about in found["tasks"].items():
        shut = [gate["sentence"] for gate in about["gates"] if not gate["passed"]]
        if shut:
            said.append(Message("summary.ledger_shut", task=task, gates=shut))
    return said
