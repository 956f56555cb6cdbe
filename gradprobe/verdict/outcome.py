"""What the tasks pay for training together: deficits on the test split against a task trained alone.

A deficit is ``metric_alone - metric_arm``, above 0 where sharing costs something. Higher metrics are better ones.
Training loss is never one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gradprobe.errors import UsageError
from gradprobe.ledger.windows import Gate
from gradprobe.measures import Array
from gradprobe.messages import Message
from gradprobe.metric import MAIN, lower_is_better, task_of
from gradprobe.statistics import Contrast, jackknife_variance, widened
from gradprobe.verdict.answers import OUTCOME
from gradprobe.verdict.conditions import Group
from gradprobe.verdict.evidence import Evidence
from gradprobe.verdict.quantities import Quantity, Sides

MARGIN = 0.02
"""The default of the smallest difference of a metric that matters."""

_DELTA_M = "Delta-m"
"""Mean over tasks of the relative deficit against the task alone.

Source: Maninis et al., "Attentive Single-Tasking of Multiple Tasks", 2019, equation 4, with the sign of a deficit.
"""


def metrics(runs: Sequence[Evidence], tasks: Sequence[str], wanted: Sequence[str] = ()) -> dict[str, str]:
    """The metrics to look at, and whose each is: those asked for, else the main ones of the runs of several tasks.

    Raises:
        UsageError: It is not known whose metric one is.
    """
    together = [run for run in runs if not run.single]
    named = dict.fromkeys(name for run in together for name in run.tested.values)
    main = [name for name in named if (name in MAIN or name.rpartition("_")[2] in tasks) and not lower_is_better(name)]
    found = {name: task_of(name, tasks) for name in (wanted or main)}
    unknown = next((name for name, task in found.items() if not task), None)
    if unknown is not None:
        raise UsageError(f"--metrics {unknown}: whose is it? Its name holds none of the tasks {', '.join(tasks)}.")
    return found


@dataclass(frozen=True, eq=False)
class Outcome(Quantity):
    """The deficit in one metric, or with several the mean over tasks of the relative one (:data:`_DELTA_M`).

    Attributes:
        chosen: Metric -> task; one, or those of Delta-m; empty: nothing was tested.
        controls: Task -> seed -> its run alone.
        same_seed: Whether a run is held against the control of its own seed, or against the mean of all.
    """

    question = OUTCOME

    chosen: Mapping[str, str] = field(default_factory=dict)
    controls: Mapping[str, Mapping[int, Evidence]] = field(default_factory=dict)
    same_seed: bool = True

    def lacking(self, runs: Sequence[Evidence]) -> Message | None:
        """A test, a task alone, or a metric in one of the files."""
        if not self.chosen:
            return Message("reason.no_test")
        missing = sorted(set(self.chosen.values()) - set(self.controls))
        if missing:
            return Message("reason.no_control", tasks=missing, task=missing[0])
        for run in [*runs, *self._alone]:
            for metric, task in self.chosen.items():
                if metric not in run.tested.values and run.single in ("", task):
                    return Message("reason.untested", file=run.file, metric=metric)
        return None

    def read(self, run: Evidence, layers: Sequence[str]) -> float | None:
        """Above 0 where sharing costs something."""
        return self._deficit(run, None)

    def contrast(self, s: Sides, baseline: Array, arm: Array) -> Contrast:
        """With an interval for other seeds and, where clusters are known, for other test images."""
        found = s.contrast(baseline, arm)
        one, other = self._without(s.baseline), self._without(s.treated)
        clusters = other.shape[1]
        if clusters < 2 or one.shape[1] != clusters:
            return found
        apart = _column_means(other - one) if s.same_seed else _column_means(other) - _column_means(one)
        return widened(found, jackknife_variance(apart), clusters - 1.0)

    def remarks(self, s: Sides, layers: Sequence[str], found: Sequence[Gate]) -> list[Message]:
        """On how many independent parts of the test split it rests."""
        count = len(self._clusters(s.treated))
        known = Message("remark.no_clusters") if count < 2 else Message("remark.clusters", n=count)
        return [known, Message("remark.outcome")]

    @property
    def _alone(self) -> list[Evidence]:
        return [run for task in dict.fromkeys(self.chosen.values()) for run in self.controls[task].values()]

    def _clusters(self, runs: Sequence[Evidence]) -> tuple[str, ...]:
        """Those of the test split, where all runs were tested on the same."""
        named = {run.tested.clusters for run in [*runs, *self._alone]}
        return named.pop() if len(named) == 1 else ()

    def _without(self, runs: Sequence[Evidence]) -> Array:
        """(n, K) deficits with one cluster of the test split left out; K = 0: not recorded."""
        count = len(self._clusters(runs))
        return np.array([[self._deficit(run, k) for k in range(count)] for run in runs]).reshape(len(runs), count)

    def _deficit(self, run: Evidence, left_out: int | None) -> float:
        by_task: dict[str, list[float]] = {}
        for metric, task in self.chosen.items():
            alone = self._reached_alone(task, run.seed, metric, left_out)
            lost = alone - _value(run, metric, left_out)
            if len(self.chosen) > 1:
                lost = lost / alone if alone else math.nan
            by_task.setdefault(task, []).append(lost)
        return float(np.mean([np.mean(lost) for lost in by_task.values()]))

    def _reached_alone(self, task: str, seed: int | None, metric: str, left_out: int | None) -> float:
        runs = self.controls[task]
        if self.same_seed:
            return _value(runs[seed], metric, left_out) if seed is not None and seed in runs else math.nan
        return float(np.mean([_value(run, metric, left_out) for run in runs.values()]))


def outcomes(
    chosen: Mapping[str, str], tasks: Sequence[str], controls: Mapping[str, Group], margin: float, *, same_seed: bool
) -> list[Outcome]:
    """One of every metric, and Delta-m where every task has one.

    Args:
        chosen: Metric -> task.
        tasks: Of the baseline.
        controls: Task -> its runs alone.
        margin: Smallest difference of a metric that matters.
        same_seed: As in :class:`Outcome`.
    """
    alone = {task: group.runs for task, group in controls.items()}

    def one(subject: str, said: Message, task: str, of: Mapping[str, str]) -> Outcome:
        return Outcome(subject, said, margin, None, task=task, chosen=of, controls=alone, same_seed=same_seed)

    if not chosen:
        return [one("test split", Message("quantity.untested"), "", {})]
    found = [
        one(metric, Message("quantity.outcome", metric=metric, task=task), task, {metric: task})
        for metric, task in chosen.items()
    ]
    if set(chosen.values()) >= set(tasks):
        found.append(one(_DELTA_M, Message("quantity.delta_m", metric=_DELTA_M), "", chosen))
    return found


def _value(run: Evidence, metric: str, left_out: int | None) -> float:
    if left_out is None:
        return run.tested.values.get(metric, math.nan)
    column = run.tested.without.get(metric)
    return math.nan if column is None else float(column[left_out])


def _column_means(without: Array) -> Array:
    known = without[np.isfinite(without).all(axis=1)]
    return known.mean(axis=0) if len(known) else np.full(without.shape[1], math.nan)
