"""Every metric of a test split with one cluster of samples left out, for intervals that respect clusters.

Images of one clip or patient resemble each other, so that 200 of them say less than 200 patients would. With K clusters
and the metric m_k without cluster k, the variance of the metric is about (K - 1) / K * sum (m_k - mean)^2: the
delete-one-cluster jackknife (Quenouille; Efron and Stein, "The Jackknife Estimate of Variance", 1981).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradprobe.rows import TestClusters
from gradprobe.trainers.problems import Scores

MOST = 50
"""Clusters that are left out one by one; where there are more, they are put together into so many groups."""

FEWEST = 10
"""Groups, however many images there are."""

IMAGES = 10_000
"""Images that are looked at again, over all clusters: half a minute of COCO's average precision."""


def leave_out(scores: Scores, clusters: Sequence[str]) -> TestClusters | None:
    """The metrics without each cluster; None where there are fewer than two.

    Args:
        scores: Of a test split; the model is not asked again.
        clusters: (N,) what each of the samples belongs to.
    """
    order = list(dict.fromkeys(clusters))
    if len(order) < 2:
        return None
    groups = grouped(order, max(FEWEST, min(MOST, IMAGES // len(clusters))))
    place = {cluster: index for index, group in enumerate(groups) for cluster in group}
    belongs = np.array([place[cluster] for cluster in clusters])
    without = [scores.metrics(np.flatnonzero(belongs != index).tolist()) for index in range(len(groups))]
    return TestClusters(
        tuple(_called(group) for group in groups),
        np.bincount(belongs, minlength=len(groups)),
        tuple(without[0]),
        np.array([list(values.values()) for values in without], dtype=np.float64),
    )


def grouped(clusters: Sequence[str], most: int) -> list[tuple[str, ...]]:
    """At most ``most`` groups of whole clusters, as even in number as can be, dealt out in turn.

    >>> grouped(["a", "b", "c", "d", "e"], 2)
    [('a', 'c', 'e'), ('b', 'd')]
    """
    count = min(most, len(clusters))
    return [tuple(clusters[start::count]) for start in range(count)]


def _called(group: Sequence[str]) -> str:
    return group[0] if len(group) == 1 else f"{group[0]} and {len(group) - 1} more"
