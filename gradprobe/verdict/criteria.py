"""What a comparison goes by: what is asked for, else what was planned in the files, else the defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradprobe.errors import UsageError
from gradprobe.metric import lower_is_better
from gradprobe.verdict import decision
from gradprobe.verdict.conditions import ArmRuns
from gradprobe.verdict.evidence import Pair, Span
from gradprobe.verdict.quantities import OUTCOME_MARGIN

__all__ = ["Criteria"]


@dataclass(frozen=True)
class Criteria:
    """What a comparison goes by. None, or empty: as planned in the files, else the default.

    Attributes:
        baseline: Name of the arm that the others are compared with.
        controls: Names of the arms that train one task alone; empty: those of the trainer ``single``.
        margin, outcome_margin: Smallest differences that matter.
        window: Steps that count.
        pairs: Such as ``cls>det``.
        metrics: Of the test split.
        paired: See :func:`gradprobe.verdict.conditions.refusal`.
    """

    baseline: str = ""
    controls: Sequence[str] = ()
    margin: float | None = None
    outcome_margin: float | None = None
    window: tuple[int, int] | None = None
    pairs: Sequence[str] = ()
    metrics: Sequence[str] = ()
    paired: bool | None = None


@dataclass(frozen=True)
class Resolved:
    """The same with everything decided."""

    baseline: str
    margin: float
    outcome_margin: float
    window: Span
    pairs: list[Pair]
    metrics: list[str]
    paired: bool | None

    def by_the_plans_names(self) -> dict[str, Any]:
        """The same as a plan says it."""
        found: dict[str, Any] = {
            "baseline": self.baseline,
            "margin": self.margin,
            "outcome_margin": self.outcome_margin,
            "pairs": [pair.name for pair in self.pairs],
            "metrics": self.metrics,
        }
        return {**found, "window": list(self.window)} if self.window is not None else found


_NUMBERS = {"margin": 1, "outcome_margin": 1, "window": 2, "seeds": 0}
"""Of a plan, what is numbers, and how many; 0: any."""


def _check_plan(plan: Mapping[str, Any]) -> None:
    """The files may be a stranger's.

    Raises:
        UsageError: Something in the plan is of another kind than in one of ours.
    """
    for name, count in _NUMBERS.items():
        value = plan.get(name)
        each = value if isinstance(value, list) else [value]
        plain = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in each)
        if value is not None and not (
            plain and (isinstance(value, list) == (count != 1)) and count in (0, 1, len(each))
        ):
            raise UsageError(
                f"the plan in these files says {name} {str(value)[:80]!r}: no plan of `gradprobe study` does."
            )


def resolve(asked: Criteria, plan: Mapping[str, Any], tasks: Sequence[str]) -> Resolved:
    """Decide all of it.

    Args:
        asked: By the user.
        plan: What the files say was fixed before the runs.
        tasks: Names.

    Raises:
        UsageError: An unknown pair, a margin or a metric that cannot be.
    """
    _check_plan(plan)
    window = asked.window
    if window is None and np.size(plan.get("window", ())) == 2:
        start, stop = np.ravel(plan["window"])
        window = int(start), int(stop)
    margin = asked.margin if asked.margin is not None else float(plan.get("margin", decision.MARGIN))
    other = asked.outcome_margin
    other = other if other is not None else float(plan.get("outcome_margin", OUTCOME_MARGIN))
    if not (0 < margin < math.inf and 0 < other < math.inf):
        raise UsageError(f"--margin {margin:g}, --outcome-margin {other:g}: margins are finite numbers above 0.")
    named = list(asked.pairs) or [str(name) for name in np.ravel(plan.get("pairs", []))]
    metrics = list(asked.metrics) or [str(name) for name in np.ravel(plan.get("metrics", []))]
    losses = [name for name in metrics if lower_is_better(name)]
    if losses:
        raise UsageError(f"{losses[0]} is a loss: a loss is no evidence here. Take a metric of the test split.")
    return Resolved(
        asked.baseline or str(plan.get("baseline", "joint")),
        margin,
        other,
        window,
        _parse_pairs(named, tasks),
        metrics,
        asked.paired,
    )


def _parse_pairs(named: Sequence[str], tasks: Sequence[str]) -> list[Pair]:
    """``cls>det`` as what cls does to det; none: every ordered pair.

    Raises:
        UsageError: A task is unknown, or a pair is not written so.
    """
    if not named:
        return [Pair(task, by) for task in tasks for by in tasks if task != by]
    found = []
    for name in named:
        by, arrow, task = name.partition(">")
        if not arrow or by == task or by not in tasks or task not in tasks:
            raise UsageError(f"--pairs {name!r}: write what does it, >, and to whom; the tasks are {', '.join(tasks)}.")
        found.append(Pair(task, by))
    return found


def controls(asked: Criteria, groups: Mapping[str, ArmRuns], tasks: Sequence[str]) -> dict[str, ArmRuns]:
    """Task -> the runs that train it alone.

    Raises:
        UsageError: An arm is unknown, or of no known task.
    """
    unknown = [name for name in asked.controls if name not in groups]
    if unknown:
        raise UsageError(f"--control {unknown[0]}: no such arm (there are: {', '.join(groups)}).")
    found: dict[str, ArmRuns] = {}
    for name, group in groups.items():
        if name in asked.controls or (not asked.controls and group.single):
            task = group.single or next((task for task in tasks if task in name.split("-")), "")
            if not task:
                raise UsageError(f"--control {name}: its files do not say which task they train alone.")
            found[task] = group
    return found
