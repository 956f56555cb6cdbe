"""What the tasks pay for training together: deficits on the test split against a task trained alone.

A deficit is ``metric_alone - metric_arm``, above 0 where sharing costs something. Higher metrics are better ones.
Training loss is never one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradprobe.errors import UsageError
from gradprobe.measures import Array
from gradprobe.messages import Message
from gradprobe.metric import MAIN, lower_is_better, task_of
from gradprobe.statistics import Contrast, jackknife_variance, paired, welch, widened
from gradprobe.verdict.evidence import Evidence

MARGIN = 0.02
"""The default of the smallest difference of a metric that matters."""

DELTA_M = "Delta-m"
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


def untested(runs: Sequence[Evidence], chosen: Mapping[str, str]) -> Message | None:
    """The first file that lacks one of its metrics; None: none does."""
    for run in runs:
        for metric, task in chosen.items():
            if metric not in run.tested.values and run.single in ("", task):
                return Message("reason.untested", file=run.file, metric=metric)
    return None


@dataclass(frozen=True)
class Deficits:
    """Deficits of the runs of one arm, in the order of its seeds.

    Attributes:
        values: (n,); NaN: no control of that seed, or no number.
        without: (n, K) with one cluster of the test split left out; K = 0: not recorded.
    """

    values: Array
    without: Array


Controls = Mapping[str, Mapping[int, Evidence]]
"""Task -> seed -> its run alone."""


def deficits(runs: Sequence[Evidence], controls: Controls, chosen: Mapping[str, str], *, same_seed: bool) -> Deficits:
    """The deficit in one metric, or with several the mean over tasks of the relative one (:data:`DELTA_M`).

    Args:
        runs: Of one arm.
        controls: The tasks alone.
        chosen: Metric -> task; one, or those of Delta-m.
        same_seed: Whether a run is held against the control of its own seed, or against the mean of all.
    """
    values = np.array([_deficit(run, controls, chosen, same_seed, None) for run in runs])
    clusters = _clusters([*runs, *(one for task in controls.values() for one in task.values())])
    without = np.array(
        [[_deficit(run, controls, chosen, same_seed, k) for k in range(len(clusters))] for run in runs]
    ).reshape(len(runs), len(clusters))
    return Deficits(values, without)


def _clusters(runs: Sequence[Evidence]) -> tuple[str, ...]:
    """Those of the test split, where all runs were tested on the same."""
    named = {run.tested.clusters for run in runs}
    return named.pop() if len(named) == 1 else ()


def _value(run: Evidence, metric: str, left_out: int | None) -> float:
    if left_out is None:
        return run.tested.values.get(metric, math.nan)
    column = run.tested.without.get(metric)
    return math.nan if column is None else float(column[left_out])


def _deficit(
    run: Evidence, controls: Controls, chosen: Mapping[str, str], same_seed: bool, left_out: int | None
) -> float:
    by_task: dict[str, list[float]] = {}
    for metric, task in chosen.items():
        alone = _alone(controls.get(task, {}), run.seed, metric, same_seed, left_out)
        lost = alone - _value(run, metric, left_out)
        if len(chosen) > 1:
            lost = lost / alone if alone else math.nan
        by_task.setdefault(task, []).append(lost)
    return float(np.mean([np.mean(lost) for lost in by_task.values()])) if by_task else math.nan


def _alone(runs: Mapping[int, Evidence], seed: int | None, metric: str, same_seed: bool, left_out: int | None) -> float:
    if same_seed:
        return _value(runs[seed], metric, left_out) if seed is not None and seed in runs else math.nan
    values = [_value(run, metric, left_out) for run in runs.values()]
    return float(np.mean(values)) if values else math.nan


def contrast(baseline: Deficits, arm: Deficits, *, same_seed: bool) -> Contrast:
    """Arm minus baseline, with an interval for other seeds and, where clusters are known, for other test images."""
    found = paired(arm.values - baseline.values) if same_seed else welch(arm.values, baseline.values)
    clusters = arm.without.shape[1]
    if clusters < 2 or baseline.without.shape[1] != clusters:
        return found
    if same_seed:
        apart = _column_means(arm.without - baseline.without)
    else:
        apart = _column_means(arm.without) - _column_means(baseline.without)
    return widened(found, jackknife_variance(apart), clusters - 1.0)


def _column_means(without: Array) -> Array:
    known = without[np.isfinite(without).all(axis=1)]
    return known.mean(axis=0) if len(known) else np.full(without.shape[1], math.nan)
