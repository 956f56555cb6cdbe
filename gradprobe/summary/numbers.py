"""What one run holds, in numbers. Everything here is a reading of single minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe import measures
from gradprobe.measures import Array
from gradprobe.metric import lower_is_better
from gradprobe.rows import MEASURED
from gradprobe.runfile import Run, schema, thin
from gradprobe.summary import estimated, ledger, updates, words

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
        **updates.by_pair(run.tasks, median(measures.effect(gram, weight))),
        "updates": updates.summarise(run, seen, updates.gradient_share(gram, weight)),
        "ledger": ledger.summarise(run),
        "probe_loader": estimated.summarise(run),
        "audit": _audit(run),
        "metrics": _metrics(run),
        "overhead": _overhead(run),
    }


def not_measured(run: Run) -> dict[str, int]:
    """How many rows hold less than a measurement, by the reason that they give."""
    counts = np.bincount(thin.whole(run)["status"])
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
    low, middle, high = quantiles(shared, (0.25, 0.5, 0.75))
    rate = conflict_rate(shared)
    return {
        pair: {
            "cosine": {
                "median": measures.known(middle[i]),
                "q25": measures.known(low[i]),
                "q75": measures.known(high[i]),
                "rows": int(np.isfinite(shared[:, i]).sum()),
            },
            "stochastic_conflict_rate": measures.known(rate[i]),
            "lowest_layers": _lowest(run, by_layer[:, :, i]),
        }
        for i, pair in enumerate(run.pairs)
    }


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
    low, middle, high = quantiles(cosine, (0.25, 0.5, 0.75))
    return [
        {
            "feature": name,
            "numbers": int(size[f]),
            "tasks": {task: {"grad_norm": {"median": measures.known(norm[f, i])}} for i, task in enumerate(run.tasks)},
            "pairs": {
                pair: {
                    "cosine": {
                        "median": measures.known(middle[f, i]),
                        "q25": measures.known(low[f, i]),
                        "q75": measures.known(high[f, i]),
                        "rows": int(np.isfinite(cosine[:, f, i]).sum()),
                    }
                }
                for i, pair in enumerate(run.pairs)
            },
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


def sentences(run: Run, summary: dict[str, Any] | None = None) -> list[str]:
    """What the run shows, in words: plain, with units and numbers of rows, and cautious.

    Args:
        run: Any run; unfinished and empty ones too.
        summary: Its :func:`summarise`, where that is at hand already.
    """
    return list(map(str, words.messages(summarise(run) if summary is None else summary)))
