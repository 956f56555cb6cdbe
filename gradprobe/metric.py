"""What a metric is, by its name: whose it is, which way is better, and whether it is a score. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

BUNDLED = {
    **dict.fromkeys(("mAP50", "mAP50-95", "precision", "recall", "f1"), "det"),
    **dict.fromkeys(("accuracy", "macro_f1", "auroc"), "cls"),
}
"""Metrics that the bundled detector records, in the order in which they are read, and whose they are."""

MAIN = ("mAP50", "mAP50-95", "accuracy")
"""Those of them that sum a task up."""

_LOSSES = ("loss", "error", "mse", "mae")
"""How words of names end whose lower values are better."""


def lower_is_better(metric: str) -> bool:
    """Whether the name says that lower values are better.

    >>> [lower_is_better(name) for name in ("val/box_loss", "trainLoss", "abs_error", "valRMSE")]
    [True, True, True, True]
    >>> lower_is_better("mAP50-95"), lower_is_better("lossless")
    (False, False)
    """
    return any(word.endswith(_LOSSES) for word in re.split(r"[^a-z0-9]+", metric.lower()))


def task_of(metric: str, tasks: Sequence[str]) -> str:
    """Whose metric it is: the task in its name, between separators, else that of a bundled metric; empty: not known.

    >>> task_of("f1.det", ("det", "cls")), task_of("mAP50", ("det", "cls")), task_of("rmse", ("a", "b"))
    ('det', 'det', '')
    >>> task_of("loss_b_a", ("a", "b_a")), task_of("a_to_b", ("a", "b"))
    ('b_a', '')
    """
    found = [task for task in tasks if re.search(rf"(^|[_./-]){re.escape(task)}($|[_./-])", metric)]
    longest = max(found, key=len, default=BUNDLED.get(metric, ""))
    return longest if longest in tasks and all(task in longest for task in found) else ""


def is_score(metric: str, values: ArrayLike) -> bool:
    """Whether a metric's values are fractions of what can be reached: within [0, 1], and no loss.

    Args:
        metric: Its name.
        values: (n,), NaN and infinity count as missing; of none nothing is known.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return bool(known.size and known.min() >= 0 and known.max() <= 1) and not lower_is_better(metric)
