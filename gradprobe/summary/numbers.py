"""What one run holds, in numbers. Everything here is a reading of single minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe import measures
from gradprobe.ledger.windows import window
from gradprobe.measures import Array
from gradprobe.metric import lower_is_better
from gradprobe.rows import MEASURED
from gradprobe.runfile import Run, schema, thin

__all__ = ["CLIPPED", "gradient_share", "update_effect"]


_LOWEST_LAYERS = 3
_SUMMED = 1 << 23
"""Entries of Gramians in memory at a time, where they have to be made from norms and cosines."""


def quantiles(values: ArrayLike, probabilities: Sequence[float], axis: int = 0) -> Array:
    """Quantiles over the finite values along one axis, interpolated linearly.

    Args:
        values: (..., n, ...). NaN and infinity count as missing.
        probabilities: (Q,), in [0, 1].
        axis: The axis of length n.

    Returns:
        (Q, ...), in the unit of ``values``; NaN where no value is finite. Never warns.

    >>> quantiles([1.0, np.nan, 3.0], [0.5])
    array([2.])
    """
    data = np.moveaxis(np.asarray(values, dtype=np.float64), axis, -1)
    if data.shape[-1] == 0:
        return np.full((len(probabilities), *data.shape[:-1]), np.nan)
    data = np.sort(np.where(np.isfinite(data), data, np.nan), axis=-1)  # NaN goes last
    last = np.maximum(np.isfinite(data).sum(axis=-1, keepdims=True) - 1, 0)
    result = []
    for probability in probabilities:
        place = probability * last
        low = np.take_along_axis(data, np.floor(place).astype(np.intp), axis=-1)
        high = np.take_along_axis(data, np.ceil(place).astype(np.intp), axis=-1)
        result.append((low + (high - low) * (place % 1))[..., 0])
    return np.stack(result)


def median(values: ArrayLike, axis: int = 0) -> Array:
    """:func:`quantiles` at one half: (..., n, ...) -> (...)."""
    result: Array = quantiles(values, [0.5], axis)[0]
    return result


def conflict_rate(cosines: ArrayLike) -> Array:
    """The stochastic conflict rate: the share of the measured steps whose cosine is below 0.

    Args:
        cosines: (n, ...), NaN where not measured.

    Returns:
        (...), in [0, 1]; NaN where nothing was measured. Mostly noise: near one half for any two gradients
        that are close to orthogonal.
    """
    below = measures.conflict(cosines)
    measured = (~np.isnan(below)).sum(axis=0)
    return np.where(measured > 0, np.nansum(below, axis=0) / np.maximum(measured, 1), np.nan)


def shared_gram(run: Run) -> Array:
    """The Gramian over all shared layers together, (n, T, T); NaN where it was not measured.

    Where some tasks share only some of the layers, an inner product is summed over those that both reach.
    """
    tasks, counts = len(run.tasks), run.counts()
    if len(run.layers) and (counts == counts[..., :1]).all():
        return measures.from_norms(run.norm(), run.cosine())
    pieces, done = [np.zeros((0, tasks, tasks))], 0
    for block in run.blocks(len(run), max(1, _SUMMED // max(len(run.layers) * tasks**2, 1))):
        gram = measures.from_norms(block["grad_norm"], block["cosine"])
        pieces.append(measures.over_counted(gram, counts[done : done + len(gram)]))
        done += len(gram)
    return np.concatenate(pieces)


def summarise(run: Run) -> dict[str, Any]:
    """The run in numbers, ready for JSON: what is unknown, or not finite, is None.

    Losses and weights have no unit of ours; norms are in loss per unit of parameter; cosine, dominance,
    effects and shares are dimensionless. Docs: docs/run-file.md.

    Counts, losses, weights and times are of all rows. What is of gradients (norms, cosines, dominance,
    effects, conflict rates) is of all rows of a run of up to :data:`gradprobe.runfile.thin.ROWS`, and of
    every k-th row of a longer one: ``looked_at`` says which k, and how many rows that were.
    """
    run, seen = thin.whole(run), thin.thin(run)
    gram, weight = shared_gram(seen), seen["weight"].astype(np.float64)
    trainer, shared = run.provenance.get("trainer"), run.shared_reach.any(axis=1)
    return {
        "file": run.path.name,
        "complete": run.complete,
        "end": run.end,
        "trainer": str(trainer) if trainer else None,
        "rows": len(run),
        "looked_at": {"every": seen.every, "rows": len(seen)},
        "rows_dropped": run.rows_dropped,
        "rows_not_measured": not_measured(run),
        "steps": {"first": int(run["step"][0]), "last": int(run["step"][-1])} if len(run) else None,
        "level": run.provenance.get("probe.level", "parameters"),
        "sketch": _sketch(run),
        "joint_difference": _joint_difference(run),
        "layers": int(shared.sum()),
        "parameters": int(run.layer_size[shared].sum()),
        "layers_by_graph_only": list(run.graph_only),
        "layers_joined": run.joined,
        "lacking": {"rows": run.gaps.rows, "layers": run.lacking()},
        "tasks": _tasks(run, seen, measures.dominance(gram, weight)),
        "pairs": _pairs(seen),
        "features": _features(seen),
        **_effects_by_pair(run.tasks, median(measures.effect(gram, weight))),
        "updates": _updates(run, seen, gradient_share(gram, weight)),
        "ledger": _ledger(run),
        "probe_loader": _probe_loader(run),
        "audit": _audit(run),
        "metrics": _metrics(run),
        "overhead": _overhead(run),
    }


def not_measured(run: Run) -> dict[str, int]:
    """How many rows hold less than a measurement, by the reason that they give."""
    return _reasons(run, thin.whole(run)["status"])


def _reasons(run: Run, status: NDArray[Any]) -> dict[str, int]:
    """How many rows give each reason for holding less than a measurement; (n,) codes."""
    counts = np.bincount(status)
    return {run.status_names[c]: int(n) for c, n in enumerate(counts) if n and run.status_names[c] != MEASURED}


def _sketch(run: Run) -> int | None:
    """Numbers that were kept of each gradient on a layer; None: all."""
    found = run.provenance.get("probe.sketch")
    return None if found is None else int(found)


def _joint_difference(run: Run) -> dict[str, float] | None:
    """By how much a gradient derived from the joint one differed from the explicit one; None: by too little."""
    step, value = (run.provenance.get(f"probe.joint_difference.{name}") for name in ("step", "value"))
    return None if step is None or value is None else {"step": float(step), "value": float(value)}


def _tasks(run: Run, seen: Run, dominance: Array) -> dict[str, Any]:
    loss, weight = run["loss"], run["weight"]
    tenth = max(1, len(run) // 10)
    first, last = median(loss[:tenth]), median(loss[-tenth:])
    norm, share = median(seen.norm()), median(dominance)
    return {
        task: {
            "loss": {"first": measures.known(first[i]), "last": measures.known(last[i])},
            "weight": _ends(weight[:, i]),
            "grad_norm": {"median": measures.known(norm[i])},
            "dominance": {"median": measures.known(share[i])},
        }
        for i, task in enumerate(run.tasks)
    }


def _ends(values: NDArray[Any]) -> dict[str, float | None]:
    """First, last, least and greatest of the finite values."""
    known = values[np.isfinite(values)]
    if not known.size:
        return dict.fromkeys(("first", "last", "min", "max"))
    return {
        "first": float(known[0]),
        "last": float(known[-1]),
        "min": float(known.min()),
        "max": float(known.max()),
    }


def _pairs(run: Run) -> dict[str, Any]:
    shared, by_layer = run.cosine(), run["cosine"]
    rate = conflict_rate(shared)
    return {
        pair: {
            "cosine": _quartiles(shared[:, i]),
            "stochastic_conflict_rate": measures.known(rate[i]),
            "lowest_layers": _lowest(run, by_layer[:, :, i]),
        }
        for i, pair in enumerate(run.pairs)
    }


def _quartiles(values: NDArray[Any]) -> dict[str, Any]:
    """Of (n,) values, and how many are known."""
    low, middle, high = map(measures.known, quantiles(values, (0.25, 0.5, 0.75)))
    return {"median": middle, "q25": low, "q75": high, "rows": int(np.isfinite(values).sum())}


def _lowest(run: Run, cosines: NDArray[Any]) -> list[dict[str, Any]]:
    middle = median(cosines)
    order = [i for i in np.argsort(middle, kind="stable") if np.isfinite(middle[i])]
    return [
        {"layer": run.layers[i], "parameters": int(run.layer_size[i]), "cosine_median": float(middle[i])}
        for i in order[:_LOWEST_LAYERS]
    ]


def measures_parameters(run: Run) -> bool:
    """Whether gradients on parameters were to be measured, and not at features alone."""
    return bool(run.provenance.get("probe.level") != "features")


def _features(run: Run) -> list[dict[str, Any]]:
    """Norms and cosines where the tasks part, by feature; empty where they were not measured."""
    if not run.feature_names:
        return []
    size, norm = run["features/feature_size"], median(run["features/grad_norm"])
    cosine = run["features/cosine"]
    return [
        {
            "feature": name,
            "numbers": int(size[f]),
            "tasks": {task: {"grad_norm": {"median": measures.known(norm[f, i])}} for i, task in enumerate(run.tasks)},
            "pairs": {pair: {"cosine": _quartiles(cosine[:, f, i])} for i, pair in enumerate(run.pairs)},
        }
        for f, name in enumerate(run.feature_names)
    ]


def _metrics(run: Run) -> dict[str, Any]:
    table = run.epochs
    epoch = table.pop("epoch")
    found = {}
    for name, values in table.items():
        known = np.flatnonzero(np.isfinite(values))
        lower = lower_is_better(name)
        best = (np.argmin if lower else np.argmax)(values[known]) if known.size else None
        places = {"first": known[0], "best": known[best], "last": known[-1]} if best is not None else {}
        at = {k: {"epoch": int(epoch[i]), "value": float(values[i])} for k, i in places.items()}
        found[name] = {
            "first": at.get("first"),
            "best": at.get("best"),
            "last": at.get("last"),
            "best_is": "lowest" if lower else "highest",
        }
    return found


def _audit(run: Run) -> dict[str, Any] | None:
    """What an audit found, where the file holds one."""
    found = run.audit
    if found is None:
        return None
    keys = ("door", "state", "contribution", "left_when_shut", "evidence", "how_to_shut")
    return {
        **found["about"],
        "steps": len(found["step"]),
        "displacement": measures.known(found["displacement"][-1]) if len(found["step"]) else None,
        "doors": [
            {k: value if isinstance(value, str) else measures.known(value) for k, value in zip(keys, row, strict=True)}
            for row in zip(*(found[key] for key in keys), strict=True)
        ],
    }


def _overhead(run: Run) -> dict[str, float | None]:
    spent = [run[table.path("overhead")] for table in schema.TABLES if run.count(table)]
    seconds = float(sum(np.nansum(each, dtype=np.float64) for each in spent))
    elapsed = float(np.max(run["time"], initial=0.0))
    return {"seconds": seconds, "share": measures.known(seconds / elapsed) if elapsed > 0 else None}


CLIPPED = 1 - 1e-4
"""A scale below is no rounding."""


def gradient_share(gram: Array, weight: Array) -> Array:
    """Each task's share of the joint gradient, read as its share of the update: (n, T), summing to 1.

    Args:
        gram: (n, T, T) over all shared layers.
        weight: (n, T).
    """
    return measures.share(gram * weight[:, :, None] * weight[:, None, :])


def update_effect(run: Run) -> Array:
    """(m, T, T) of the real updates, see :func:`gradprobe.measures.update_effect`."""
    parts = run["update/effect"]
    there = ~np.isnan(parts).all(axis=-1) | (run["update/status"] != 0)[:, None, None]  # else no path at that step
    return measures.update_effect(measures.loss_change(parts, run.shared_reach & there))


def _effects_by_pair(tasks: Sequence[str], effects: Array) -> dict[str, Any]:
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


def _updates(run: Run, seen: Run, gradient: Array) -> dict[str, Any] | None:
    """For :func:`gradprobe.summary.summarise`; None where updates were not recorded.

    Args:
        run: The run.
        seen: What is looked at of a long one.
        gradient: (n, T) from :func:`gradient_share`, of what is looked at.
    """
    if not run.count(schema.UPDATES):
        return None
    status, scale = run["update/status"], run["update/clip_scale"]
    known = scale[np.isfinite(scale)]
    share, middle = median(seen["update/shared_share"]), median(gradient)
    part, cosine, middle_effect = (
        median(values) for values in (seen["update/clip_share"], seen["update/shared_cosine"], update_effect(seen))
    )
    return {
        "rows": len(status),
        "not_taken_apart": _reasons(run, status),
        "looked_at": {"every": thin.every(seen), "rows": seen.count(schema.UPDATES)},
        "share": {source: measures.known(share[i]) for i, source in enumerate(run.sources)},
        "gradient_share": {task: measures.known(middle[i]) for i, task in enumerate(run.tasks)},
        "cosine": {pair: measures.known(cosine[i]) for i, pair in enumerate(run.pairs)},
        **_effects_by_pair(run.tasks, middle_effect),
        "clipping": {
            "rows": len(known),
            "clipped": int((known < CLIPPED).sum()),
            "scale": {"median": measures.known(np.median(known)) if known.size else None, "min": _least(known)},
            "share": {task: measures.known(part[i]) for i, task in enumerate(run.tasks)},
        },
        "skipped_steps": int(run["update/skipped"].max(initial=0)),
        "batchnorm": {
            "mean_drift": measures.known(median(run["update/bn_mean_drift"][:, None])[0]),
            "variance_drift": measures.known(median(run["update/bn_variance_drift"][:, None])[0]),
            "batches_per_step": measures.known(median(run["update/bn_batches"][:, None])[0]),
        },
    }


def _least(values: Array) -> float | None:
    return float(values.min()) if values.size else None


def _ledger(run: Run) -> dict[str, Any] | None:
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
                "alone_progress": measures.known(found.alone[i]),
                "shrunk": measures.known(found.shrunk[i]),
                "shrunk_error": measures.known(found.shrunk_error[i]),
                "lost": measures.known(found.lost[i]),
                "dominated": found.dominated(i),
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


def _probe_loader(run: Run) -> dict[str, Any] | None:
    """For :func:`gradprobe.summary.summarise`; None where nothing was measured on a probe loader."""
    run = thin.whole(run)
    rows = run.count(schema.PROBE_LOADER)
    if not rows:
        return None
    found = run.estimate()
    return {
        "rows": rows,
        "not_measured": _reasons(run, run[schema.PROBE_LOADER.path("status")]),
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
