"""What a run's probe loader says of the true gradients, over all steps and shared layers, in numbers and in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradprobe import measures
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


def sentences(found: dict[str, Any] | None) -> list[str]:
    """The same in words."""
    if found is None:
        return []
    of = f"{found['split']}, " if found["split"] else ""
    cosines = "; ".join(f"{pair.replace('|', ' and ')} {_cosine(value)}" for pair, value in found["pairs"].items())
    scales = ", ".join(
        f"{task} {'unknown' if value['noise_scale'] is None else format(value['noise_scale'], '.3g')}"
        for task, value in found["tasks"].items()
    )
    said = [
        f"On independent samples ({of}{found['rows']} rows of the probe loader), less their noise, over all steps: "
        f"cosine of {cosines}. Batch at which noise and gradient are equally long, in samples: {scales}."
    ]
    if missing := found["not_measured"]:
        why = "; ".join(f"{reason} ({count})" for reason, count in missing.items())
        said.append(f"{sum(missing.values())} of these rows hold less than a measurement: {why}.")
    return said


def _cosine(pair: dict[str, Any]) -> str:
    if pair["cosine"] is None or pair["low"] is None:
        return "cannot be told from noise"
    return f"{pair['cosine']:+.2f} (95 % interval of this run {pair['low']:+.2f} to {pair['high']:+.2f})"
