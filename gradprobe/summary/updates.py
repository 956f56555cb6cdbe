"""What the optimizer made of the gradients, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradprobe import measures
from gradprobe.measures import Array
from gradprobe.messages import Message, Value
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


def effect(run: Run) -> Array:
    """(m, T, T) of the real updates, see :func:`gradprobe.measures.update_effect`."""
    parts = run["update/effect"]
    there = ~np.isnan(parts).all(axis=-1) | (run["update/status"] != 0)[:, None, None]  # else no path at that step
    return measures.update_effect(measures.loss_change(parts, run.shared_reach & there))


def by_pair(tasks: Sequence[str], effects: Array) -> dict[str, Any]:
    """Effects of every task on every other, for JSON.

    Args:
        tasks: T names.
        effects: (T, T); [i, j] is what j adds (+) to i's own progress, or cancels (-).

    Returns:
        The list as ``effect``; and as ``interference``, its name until 0.1, which ``renamed`` marks.
    """
    found = [
        {"task": task, "by": other, "median": measures.known(effects[i, j])}
        for i, task in enumerate(tasks)
        for j, other in enumerate(tasks)
        if i != j
    ]
    return {"effect": found, "interference": found, "renamed": {"interference": "effect"}}


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
    part, cosine, middle_effect = (
        _middle(values) for values in (seen["update/clip_share"], seen["update/shared_cosine"], effect(seen))
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
        **by_pair(run.tasks, middle_effect),
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


def messages(found: dict[str, Any] | None) -> list[Message]:
    if found is None:
        return []
    said = [*_taken_apart(found), *_compared(found)]
    clip, batches = found["clipping"], found["batchnorm"]["batches_per_step"]
    if clip["clipped"]:
        parts, least = _shares(clip["share"]), clip["scale"]["min"]
        said.append(Message("summary.clipped", n=clip["clipped"], rows=clip["rows"], least=least, parts=parts))
    if found["skipped_steps"]:
        said.append(Message("summary.skipped", n=found["skipped_steps"]))
    if batches is not None and batches > 1:
        said.append(Message("summary.batchnorm", batches=batches))
    return said


def _shares(values: dict[str, float | None]) -> Value:
    """Of each task, or in few words of many."""
    if crowd.many(values):
        return crowd.spread(values, shares=True)
    return [Message("summary.share", name=name, value=value) for name, value in values.items() if value is not None]


def _taken_apart(found: dict[str, Any]) -> list[Message]:
    missing = found["not_taken_apart"]
    if not missing:
        return []
    why = [Message("summary.why", reason=reason, n=count) for reason, count in missing.items()]
    return [Message("summary.update_unknown", n=sum(missing.values()), rows=found["rows"], why=why)]


def _compared(found: dict[str, Any]) -> list[Message]:
    shares = {name: value for name, value in found["share"].items() if value is not None}
    if not shares:
        return []
    few = not crowd.many(found["gradient_share"])
    update = _shares(shares) if few else crowd.spread(shares, shares=True)
    said = [Message("summary.update_shares", update=update, gradient=_shares(found["gradient_share"]))]
    pairs = {pair: value for pair, value in found["cosine"].items() if value is not None}
    if pairs and len(pairs) <= 3:
        cosines = [Message("summary.cosine_of", tasks=pair.split("|"), value=value) for pair, value in pairs.items()]
        said.append(Message("summary.update_cosines", values=cosines))
    effects = [
        Message("summary.effect", by=e["by"], task=e["task"], value=e["median"])
        for e in found["effect"]
        if e["median"] is not None
    ]
    if effects and len(shares) <= 5:
        said.append(Message("summary.update_effects", values=effects))
    return said


def _middle(values: Array) -> Array:
    """Medians over rows of the values that are known; NaN where none is."""
    from gradprobe.summary.numbers import median

    return median(values)


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _least(values: Array) -> float | None:
    return float(values.min()) if values.size else None
