"""The numbers of a row that a logger of scalars gets, and what the sinks of scalars have in common."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np

from gradprobe import measures
from gradprobe.measures import Array
from gradprobe.rows import FEATURES, FeatureRow, Header, Provenance, Row

GROUPS = ("loss", "weight", "shared_grad_norm", "shared_cosine", "feature_grad_norm", "feature_cosine")
"""What the names of a row's scalars begin with."""


def scalars(header: Header, row: Row | FeatureRow) -> dict[str, float]:
    """One row as named numbers.

    Returns:
        ``loss/TASK`` and ``weight/TASK``; over all shared layers together ``shared_grad_norm/TASK`` (loss per unit of
        parameter) and ``shared_cosine/TASK|TASK`` in [-1, 1]. A norm or cosine that is NaN, which means that it was not
        measured, is left out; a loss is there even where it is NaN, which then is its value. Of a feature row
        ``feature_grad_norm/FEATURE/TASK`` and ``feature_cosine/FEATURE/TASK|TASK``, in the same way.
    """
    if isinstance(row, FeatureRow):
        return _of_features(header, row)
    norm, cosine = row.shared(header.reach)
    pairs = [f"{first}|{second}" for first, second in combinations(header.tasks, 2)]
    measured = {**_named("shared_grad_norm", header.tasks, norm), **_named("shared_cosine", pairs, cosine)}
    return {
        **_named("loss", header.tasks, row.loss),
        **_named("weight", header.tasks, row.weight),
        **{name: value for name, value in measured.items() if not np.isnan(value)},
    }


def _of_features(header: Header, row: FeatureRow) -> dict[str, float]:
    pairs = [f"{first}|{second}" for first, second in combinations(header.tasks, 2)]
    norm, cosine = measures.norm(row.gram), measures.pair_cosine(row.gram)
    found: dict[str, float] = {}
    for place, feature in enumerate(header.feature_names):
        found |= _named(f"feature_grad_norm/{feature}", header.tasks, norm[place])
        found |= _named(f"feature_cosine/{feature}", pairs, cosine[place])
    return {name: value for name, value in found.items() if not np.isnan(value)}


def _named(group: str, names: Iterable[str], values: Array) -> dict[str, float]:
    return {f"{group}/{name}": float(value) for name, value in zip(names, values, strict=True)}


class ScalarSink:
    """A sink that knows the header of the rows to come."""

    tables = (FEATURES.name,)
    _header: Header

    def start(self, header: Header) -> None:
        """Rows follow."""
        self._header = header

    def grow(self, header: Header) -> None:
        """Rows of more layers, or of features, follow."""
        self._header = header

    def annotate(self, values: Provenance) -> None:
        """Not handed on: what a run file says of data and machine stays there."""
