"""What a run's probe loader says of the true gradients, over all steps and shared layers, in numbers and in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradprobe import measures
from gradprobe.messages import Message
from gradprobe.runfile import Run, schema, thin


def summarise(run: Run) -> dict[str, Any] | None:
    """For :func:`gradprobe.summary.summarise`; None where nothing was measured on a probe loader."""
    run = thin.whole(run)
    rows = run.count(schema.PROBE_LOADER)
    if not rows:
        return None
    found = run.estimate()
    status = run[schema.PROBE_LOADER.path("status")]
    return {
        "rows": rows,
        "not_measured": {run.status_names[c]: int(n) for c, n in enumerate(np.bincount(status)) if n and c},
        "split": str(run.provenance.get("probe_loader.split", "")) or None,
        "pairs": {
            pair: {
                "cosine": measures.known(found.cosine[i]),
                "low": measures.known(found.low[i]),
                "high": measures.known(found.high[i]),
                "noise_correlation": measures.known(found.noise_correlation[i]),
                "rows": int(found.rows[i]),
            }
            for i, pair in enumerate(run.pairs)
        },
        "tasks": {
            task: {
                "noise_scale": measures.known(found.noise_scale[i]),
                "low": measures.known(found.noise_scale_low[i]),
                "high": measures.known(found.noise_scale_high[i]),
            }
            for i, task in enumerate(run.tasks)
        },
    }


def messages(found: dict[str, Any] | None) -> list[Message]:
    if found is None:
        return []
    cosines = [_cosine(pair.split("|"), value) for pair, value in found["pairs"].items()]
    scales = [
        Message("summary.unknown", name=task)
        if value["noise_scale"] is None
        else Message("summary.value", name=task, value=value["noise_scale"])
        for task, value in found["tasks"].items()
    ]
    said = Message("summary.probe", rows=found["rows"], cosines=cosines, scales=scales)
    if split := found["split"]:
        said = Message("summary.probe_split", split=split, rows=found["rows"], cosines=cosines, scales=scales)
    missing = found["not_measured"]
    if not missing:
        return [said]
    why = [Message("summary.why", reason=reason, n=count) for reason, count in missing.items()]
    return [said, Message("summary.probe_missing", n=sum(missing.values()), why=why)]


def _cosine(tasks: list[str], pair: dict[str, Any]) -> Message:
    if pair["cosine"] is None or pair["low"] is None:
        return Message("summary.probe_hidden", tasks=tasks)
    return Message("summary.probe_cosine", tasks=tasks, cosine=pair["cosine"], low=pair["low"], high=pair["high"])
