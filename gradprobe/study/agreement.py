"""Whether the runs of a study are what they should be: the same conditions in all arms, and twice the same twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.runfile import Run, schema

SAME = ("data.fingerprint", "model.reference", "batches.hash", "batches.count")
"""Provenance that has to be equal in all runs of a seed."""

_TIMES = ("time", "overhead")


def unequal(paths: Sequence[Path]) -> list[str]:
    """Names among :data:`SAME` in which the runs of one seed differ, or which one of them does not tell."""
    told: list[dict[str, Any]] = []
    for path in paths:
        with Run(path) as run:
            told.append({name: run.provenance.get(name) for name in SAME})
    return [name for name in SAME if any(one[name] is None or one[name] != told[0][name] for one in told)]


def differing(one: Path, other: Path) -> list[str]:
    """Names of what differs between two recordings of the same run, bit for bit; nothing: they are identical.

    Times are left out, and where the files come from.
    """
    with Run(one) as a, Run(other) as b:
        names = sorted({*a.names(), *b.names()})
        skipped = {table.path(name) for table in schema.TABLES for name in _TIMES}
        found = [name for name in names if name not in skipped and not _equal(a, b, name)]
        values = [{**_tested(run), **_epochs(run)} for run in (a, b)]
    found += sorted(name for name in {**values[0], **values[1]} if not _same(values[0].get(name), values[1].get(name)))
    return found


def _equal(a: Run, b: Run, name: str) -> bool:
    return name in a and name in b and _same(a[name], b[name])


def _same(one: Any, other: Any) -> bool:
    first, second = np.asarray(one), np.asarray(other)
    if first.dtype.kind != "f":
        return bool(np.array_equal(first, second))
    return first.shape == second.shape and first.tobytes() == second.tobytes()


def _tested(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.provenance.items() if name.startswith(("test.", "batches."))}


def _epochs(run: Run) -> dict[str, Any]:
    return {f"epochs/{name}": values for name, values in run.epochs.items()}
