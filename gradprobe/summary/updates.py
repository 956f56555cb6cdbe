"""What the optimizer made of the gradients, in numbers and in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradprobe import measures
from gradprobe.measures import Array
from gradprobe.rows import MEASURED
from gradprobe.runfile import Run, schema, thin
from gradprobe.summary import crowd

CLIPPED = 1 - 1e-4
"""A scale below is no rounding."""


def gradient_share(gram: Array, weight: Array) -> Array:
    """Each task's share of the joint gradient, read as its share of the update: (n, T), summing to 1.

    Args:
        gram: (n, T, T) over all shared layers.
        weight: (n, T).
    """
    return measures.share(gram * weight[:, :, None] * weight[:, None, :])


def interference(run: Run) -> Array:
    """(m, T, T) of the real updates, see :func:`gradprobe.measures.update_interference`."""
    effect = run["update/effect"]
    there = ~np.isnan(effect).all(axis=-1) | (run["update/status"] != 0)[:, None, None]  # else no path at that step
    return measures.update_interference(measures.update_effect(effect, run.shared_reach & there))


def summarise(run: Run, seen: Run, gradient: Array) -> dict[str, Any] | None:
    """For :func:`gradprobe.summary.summarise`; None where updates were not recorded.

    Args:
        run: The run.
        seen: What is looked at of a long one.
        gradient: (n, T) from :func:`gradient_share`, of what is looked at.
    """
    if not run.count(schema.UPDATES):
        return None
    status, scale = run["update/status"], run["update/clip_scale"]
    counts = np.bincount(status, minlength=1)
    known = scale[np.isfinite(scale)]
    share, middle = _middle(seen["update/shared_share"]), _middle(gradient)
    part, cosine, effect = (
        _middle(values) for values in (seen["update/clip_share"], seen["update/shared_cosine"], interference(seen))
    )
    return {
        "rows": len(status),
        "not_taken_apart": {
            run.status_names[c]: int(n) for c, n in enumerate(counts) if n and run.status_names[c] != MEASURED
        },
        "looked_at": {"every": thin.every(seen), "rows": seen.count(schema.UPDATES)},
        "share": {source: _number(share[i]) for i, source in enumerate(run.sources)},
        "gradient_share": {task: _number(middle[i]) for i, task in enumerate(run.tasks)},
        "cosine": {pair: _number(cosine[i]) for i, pair in enumerate(run.pairs)},
        "interference": [
            {"task": task, "by": other, "median": _number(effect[i, j])}
            for i, task in enumerate(run.tasks)
            for j, other in enumerate(run.tasks)
            if i != j
        ],
        "clipping": {
            "rows": len(known),
            "clipped": int((known < CLIPPED).sum()),
            "scale": {"median": _number(np.median(known)) if known.size else None, "min": _least(known)},
            "share": {task: _number(part[i]) for i, task in enumerate(run.tasks)},
        },
        "skipped_steps": int(run["update/skipped"].max(initial=0)),
        "batchnorm": {
            "mean_drift": _number(_middle(run["update/bn_mean_drift"][:, None])[0]),
            "variance_drift": _number(_middle(run["update/bn_variance_drift"][:, None])[0]),
            "batches_per_step": _number(_middle(run["update/bn_batches"][:, None])[0]),
        },
    }


def sentences(found: dict[str, Any] | None) -> list[str]:
    """The same in words."""
    if found is None:
        return []
    said = [*_taken_apart(found), *_compared(found)]
    clip, bn = found["clipping"], found["batchnorm"]
    if clip["clipped"]:
        parts = ", ".join(f"{task} {_percent(v)}" for task, v in clip["share"].items() if v is not None)
        parts = crowd.spread(clip["share"], _percent) if crowd.many(clip["share"]) else parts
        said.append(
            f"The gradient was scaled down before {clip['clipped']} of {clip['rows']} updates, to "
            f"{clip['scale']['min']:.2g} at the least; parts in its squared norm, median: {parts}."
        )
    if found["skipped_steps"]:
        said.append(f"{found['skipped_steps']} steps changed nothing.")
    if (batches := bn["batches_per_step"]) is not None and batches > 1:
        said.append(
            f"BatchNorm averaged {batches:.3g} batches per step: each step has more than one forward, so running "
            "statistics are a mix of their data."
        )
    return said


def _taken_apart(found: dict[str, Any]) -> list[str]:
    missing = found["not_taken_apart"]
    if not missing:
        return []
    why = "; ".join(f"{reason} ({count})" for reason, count in missing.items())
    return [f"{sum(missing.values())} of {found['rows']} updates were not taken apart by task: {why}."]


def _compared(found: dict[str, Any]) -> list[str]:
    shares = {name: value for name, value in found["share"].items() if value is not None}
    if not shares:
        return []
    text = ", ".join(f"{name} {_percent(value)}" for name, value in shares.items())
    gradient = ", ".join(f"{n} {_percent(v)}" for n, v in found["gradient_share"].items() if v is not None)
    if crowd.many(found["gradient_share"]):
        text, gradient = crowd.spread(shares, _percent), crowd.spread(found["gradient_share"], _percent)
    said = [f"Share of the update (after momentum and preconditioning, median): {text}; of the gradient: {gradient}."]
    pairs = {pair: value for pair, value in found["cosine"].items() if value is not None}
    if pairs and len(pairs) <= 3:
        text = "; ".join(f"{pair.replace('|', ' and ')} {value:+.2f}" for pair, value in pairs.items())
        said.append(f"Cosine between the tasks' parts of the update, median: {text}.")
    effects = [e for e in found["interference"] if e["median"] is not None]
    if effects and len(shares) <= 5:
        text = "; ".join(f"{e['by']} on {e['task']} {e['median']:+.2f}" for e in effects)
        said.append(f"Effect of one task's part of the update on another's own progress (first order, median): {text}.")
    return said


def _middle(values: Array) -> Array:
    """Medians over rows of the values that are known; NaN where none is."""
    from gradprobe.summary.numbers import median

    return median(values)


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _least(values: Array) -> float | None:
    return float(values.min()) if values.size else None


def _percent(share: float) -> str:
    return f"{round(100 * share) + 0} %"  # never -0
