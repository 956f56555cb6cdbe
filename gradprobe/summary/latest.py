"""What a run shows just now, from its last rows alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.runfile import Run, lock
from gradprobe.summary.numbers import conflict_rate, median

__all__ = ["latest"]


_WINDOW = 256
_RECENT = 40


def latest(run: Run, window: int = _WINDOW) -> dict[str, Any]:
    """The last rows in numbers, ready for JSON: what is unknown, or not finite, is None.

    Args:
        run: Finished or not. However long it is, only its end is read.
        window: Rows over which medians and the stochastic conflict rate go.

    Returns:
        ``state`` (:func:`gradprobe.runfile.lock.recording_state`), ``rows``, ``step``, ``epoch``, ``age_seconds``
        (since the last row reached the disk), ``window_rows``, per task ``loss``, ``weight`` and ``grad_norm`` of the
        last row and their last values, per pair the ``cosine`` over all shared layers, its median and the stochastic
        conflict rate over the window, and the metrics of the last epoch. Each is a reading of single minibatches.
    """
    names = ("step", "epoch", "loss", "weight", "shared_grad_norm", "shared_cosine")
    tail = {name: run.read(name, start=-window) for name in names}
    rows = len(tail["step"])
    return {
        "file": run.path.name,
        "state": lock.recording_state(run),
        "end": run.end,
        "rows": len(run),
        "rows_dropped": run.rows_dropped,
        "step": int(tail["step"][-1]) if rows else None,
        "epoch": int(tail["epoch"][-1]) if rows else None,
        "age_seconds": round(lock.seconds_unchanged(run), 1),
        "window_rows": rows,
        "tasks": {
            task: {
                "loss": _last(tail["loss"][:, i]),
                "weight": _last(tail["weight"][:, i]),
                "grad_norm": _last(tail["shared_grad_norm"][:, i]),
                "recent": {
                    "loss": _recent(tail["loss"][:, i]),
                    "weight": _recent(tail["weight"][:, i]),
                    "grad_norm": _recent(tail["shared_grad_norm"][:, i]),
                },
            }
            for i, task in enumerate(run.tasks)
        },
        "pairs": {pair: _pair(tail["shared_cosine"][:, i]) for i, pair in enumerate(run.pairs)},
        "metrics": _metrics(run),
    }


def _pair(cosines: NDArray[Any]) -> dict[str, Any]:
    return {
        "cosine": _last(cosines),
        "median": measures.known(float(median(cosines))),
        "measured_rows": int(np.isfinite(cosines).sum()),
        "stochastic_conflict_rate": measures.known(float(conflict_rate(cosines))),
        "recent": _recent(cosines),
    }


def _metrics(run: Run) -> dict[str, Any] | None:
    epochs = run.epochs
    number = epochs.pop("epoch")
    if not number.size:
        return None
    return {"epoch": int(number[-1]), **{name: measures.known(values[-1]) for name, values in epochs.items()}}


def _last(values: NDArray[Any]) -> float | None:
    return measures.known(values[-1]) if values.size else None


def _recent(values: NDArray[Any]) -> list[float | None]:
    return [measures.known(value) for value in values[-_RECENT:]]
