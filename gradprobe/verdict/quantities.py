"""What a comparison takes the difference of: how a run gives each quantity, and what it takes to believe it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from gradprobe.errors import UsageError
from gradprobe.ledger.windows import Gate, Window
from gradprobe.measures import Array
from gradprobe.messages import Message
from gradprobe.metric import MAIN, lower_is_better, task_of
from gradprobe.statistics import (
    Contrast,
    difference_of_ratios,
    jackknife_variance,
    paired,
    ratio_of_means,
    ratio_parts,
    t_interval,
    welch,
    widened,
)
from gradprobe.verdict import evidence, gates
from gradprobe.verdict.answers import DIRECTION, DOMINANCE, INTERFERENCE, OUTCOME, AgainstAlone, Direct
from gradprobe.verdict.conditions import ArmRuns
from gradprobe.verdict.evidence import Evidence, Pair, Span


@dataclass(frozen=True, eq=False)
class Sides:
    """The runs of an arm and of the baseline.

    Attributes:
        arm: Name.
        baseline, treated: Runs; where ``same_seed``, of one seed each in the same order.
        again: Groups of runs that were made twice.
        same_seed: Whether they are paired.
        vouched: Whether the user says that they belong together, so that none has to be made twice.
    """

    arm: str
    baseline: Sequence[Evidence]
    treated: Sequence[Evidence]
    again: Sequence[Sequence[Evidence]]
    same_seed: bool
    vouched: bool

    @property
    def runs(self) -> list[Evidence]:
        """Of both."""
        return [*self.baseline, *self.treated]

    def layers(self, tasks: Sequence[str]) -> list[str]:
        """Those that all of these tasks reach in every run of both, in the baseline's order."""
        common = set.intersection(*(evidence.shared_layers(run, tasks) for run in self.runs))
        return [name for name in self.baseline[0].layers if name in common]

    def contrast(self, baseline: Array, arm: Array) -> Contrast:
        """Arm minus baseline over seeds."""
        return paired(arm - baseline) if self.same_seed else welch(arm, baseline)


def sides(baseline: ArmRuns, arm: ArmRuns, paired: bool | None) -> Sides:
    """The runs of both that are compared; ``paired`` as in :func:`gradprobe.verdict.conditions.refusal`."""
    same_seed = paired is not False
    seeds = [seed for seed in arm.runs if seed in baseline.runs]
    one, other = (
        [group.runs[seed] for seed in seeds] if same_seed else list(group.runs.values()) for group in (baseline, arm)
    )
    return Sides(arm.name, one, other, [*baseline.again, *arm.again], same_seed, paired is True)


@dataclass(frozen=True, eq=False)
class Reading:
    """What the runs of both sides of a comparison give.

    Attributes:
        baseline, arm: (n,) of each run; NaN: none.
        gates: What they had to pass.
        contrast: Arm minus baseline; None: a gate is closed.
        of_means: Whether the effect is a difference of ratios of means over seeds, and not a mean of differences; each
            run's number is then what it adds to its arm's ratio.
    """

    baseline: Array
    arm: Array
    gates: Sequence[Gate]
    contrast: Contrast | None = None
    of_means: bool = False


@dataclass(frozen=True, eq=False)
class Quantity(ABC):
    """One number of a run, which is to fall.

    Attributes:
        question: Which it answers.
        by_layers: Whether each layer has a number of its own.
        level_needs_gates: Whether its size in an arm is not told where a gate is closed.
        subject, name: As ``subject`` and ``quantity`` of :class:`gradprobe.verdict.answers.Answer`.
        margin: Smallest difference that matters.
        span: Steps that count.
        tasks: Whose gradients it is of; empty: it is of no gradients.
        task: Of an outcome: whose metric it is; empty: of all.
    """

    question: ClassVar[str]
    by_layers: ClassVar[bool] = False
    level_needs_gates: ClassVar[bool] = True

    subject: str
    name: Message
    margin: float
    span: Span
    tasks: tuple[str, ...] = ()
    task: str = ""

    @abstractmethod
    def lacking(self, runs: Sequence[Evidence]) -> Message | None:
        """What these runs lack, so that there is no number; None: nothing."""

    @abstractmethod
    def read(self, run: Evidence, layers: Sequence[str]) -> float | None:
        """The number over some layers together; None or NaN: there is none."""

    def values(self, runs: Sequence[Evidence], layers: Sequence[str]) -> Array:
        """(n,) of each run; NaN: there is none."""
        found = [self.read(run, layers) for run in runs]
        return np.array([math.nan if value is None else value for value in found], dtype=np.float64)

    def gates(self, runs: Sequence[Evidence], layers: Sequence[str]) -> list[Gate]:
        """What the number has to pass, of the worst run each."""
        return []

    def reading(self, s: Sides, layers: Sequence[str]) -> Reading:
        """The numbers of all runs, their gates, and arm minus baseline."""
        baseline, arm = (self.values(runs, layers) for runs in (s.baseline, s.treated))
        found = [*self.gates(s.runs, layers), *self._same_twice(s, lambda run: self.read(run, layers))]
        return Reading(baseline, arm, found, self.contrast(s, baseline, arm) if gates.passed(found) else None)

    def level(self, runs: Sequence[Evidence], layers: Sequence[str]) -> tuple[list[float], tuple[float, float, float]]:
        """The number of each run of an arm, NaN where a gate is closed; and mean and 95 % interval over them.

        NaN where a run has no number: those are no random ones, and the others would be a selection.
        """
        open_ = [not self.level_needs_gates or gates.passed(self.gates([run], layers)) for run in runs]
        values = np.where(open_, self.values(runs, layers), math.nan)
        mean, low, high = map(float, t_interval(values))
        return values.tolist(), (mean, low, high) if np.isfinite(values).all() else (math.nan,) * 3

    def _same_twice(self, s: Sides, read: Callable[[Evidence], float | None]) -> list[Gate]:
        """The gate on a run made twice; none where runs are not paired."""
        if not s.same_seed:
            return []
        if s.vouched and not s.again:
            return [gates.first_losses_equal(s.baseline, s.treated)]
        first = s.baseline[0]
        wanted = f"{first.arm}-s{first.seed}-again.h5"
        return [gates.same_twice(s.again, read, self.margin, wanted)]

    def contrast(self, s: Sides, baseline: Array, arm: Array) -> Contrast:
        """Arm minus baseline, of the numbers of each run."""
        return s.contrast(baseline, arm)

    def remarks(self, s: Sides, layers: Sequence[str], found: Reading) -> list[Message]:
        """What has to be known to read a difference."""
        return []

    def direct(self, s: Sides, layers: Sequence[str]) -> Direct | None:
        """See :class:`gradprobe.verdict.answers.Direct`; None: there is none."""
        return None

    def against_alone(self, s: Sides, layers: Sequence[str]) -> AgainstAlone | None:
        """See :class:`gradprobe.verdict.answers.AgainstAlone`; None: there is none."""
        return None

    def by_layer(self, run: Evidence, layers: Sequence[str]) -> Array:
        """(L',) one number for each of these layers, where ``by_layers``."""
        raise NotImplementedError


def of_gradients(tasks: Sequence[str], pairs: Sequence[Pair], margin: float, span: Span) -> list[Quantity]:
    """Direction of every pair, interference of every ordered one, and dominance.

    Args:
        tasks: Of the baseline; of all where there is none.
        pairs: Ordered ones.
        margin, span: As in :class:`Quantity`.
    """
    unordered = list({frozenset((p.task, p.by)): p for p in reversed(pairs)}.values())[::-1]
    return [
        *(_direction(pair, tasks, margin, span) for pair in unordered),
        *(_interference(pair, margin, span) for pair in pairs),
        _Dominance("largest share", Message("quantity.dominance"), margin, span, tuple(tasks)),
    ]


def _direction(pair: Pair, order: Sequence[str], margin: float, span: Span) -> Quantity:
    place = {task: k for k, task in enumerate(order)}
    one, other = sorted((pair.task, pair.by), key=lambda task: place.get(task, len(place)))
    message = Message("quantity.direction", task=one, other=other)
    return Direction(f"{one}|{other}", message, margin, span, (one, other))


def _interference(pair: Pair, margin: float, span: Span) -> Quantity:
    message = Message("quantity.interference", task=pair.task, by=pair.by)
    return _Interference(pair.name, message, margin, span, (pair.task, pair.by))


def _no_noise(runs: Sequence[Evidence]) -> Message | None:
    without = next((run for run in runs if evidence.gradient_rows(run) is None), None)
    return None if without is None else Message("reason.no_noise", file=without.file)


class Direction(Quantity):
    """Minus the noise-corrected cosine of a pair."""

    question = DIRECTION
    by_layers = True

    def lacking(self, runs: Sequence[Evidence]) -> Message | None:
        """Gradients whose noise was recorded."""
        return _no_noise(runs)

    def read(self, run: Evidence, layers: Sequence[str]) -> float | None:
        """Of the pooled estimate."""
        found = evidence.estimate(run, layers, self.tasks, self.span)
        return None if found is None else -float(found.cosine[0])

    def gates(self, runs: Sequence[Evidence], layers: Sequence[str]) -> list[Gate]:
        """Told from noise, of a large training set, and of a probe that finds a copy."""
        return [
            gates.resolved(runs, layers, self.tasks, self.span),
            *(gates.enough_samples(runs, layers, task, self.span) for task in self.tasks),
            gates.self_check(runs),
        ]

    def remarks(self, s: Sides, layers: Sequence[str], found: Reading) -> list[Message]:
        """What it rests on."""
        streamed = [] if all(run.probed is not None for run in s.runs) else [Message("remark.stream")]
        return [*streamed, Message("remark.direction")]

    def by_layer(self, run: Evidence, layers: Sequence[str]) -> Array:
        """NaN where a gradient on the layer cannot be distinguished from noise."""
        found = evidence.estimate(run, layers, self.tasks, self.span, apart=True)
        assert found is not None
        own = [run.layers[i] for i in evidence.layer_places(run, layers)]
        result: Array = -found.cosine[[own.index(name) for name in layers], 0]
        return result

    def similarity(self, run: Evidence, layers: Sequence[str]) -> float:
        """How alike the two gradients are in length."""
        found = evidence.estimate(run, layers, self.tasks, self.span)
        return math.nan if found is None else float(found.magnitude_similarity[0])


class _Dominance(Quantity):
    """The largest task's share of the squared weighted gradient."""

    question = DOMINANCE
    level_needs_gates = False  # its answers are held back by them, its size in an arm is told as it is

    def lacking(self, runs: Sequence[Evidence]) -> Message | None:
        """Gradients whose noise was recorded."""
        return _no_noise(runs)

    def read(self, run: Evidence, layers: Sequence[str]) -> float | None:
        """Of the shares over the run."""
        found = evidence.shares(run, layers, self.span)
        return None if found is None else found.largest

    def gates(self, runs: Sequence[Evidence], layers: Sequence[str]) -> list[Gate]:
        """Every task distinguished from noise, of a large training set."""
        return [
            gates.resolved(runs, layers, self.tasks, self.span),
            *(gates.enough_samples(runs, layers, task, self.span) for task in self.tasks),
        ]

    def remarks(self, s: Sides, layers: Sequence[str], found: Reading) -> list[Message]:
        """The shares of all tasks."""
        return [*self._shares(s, layers), Message("remark.dominance")]

    def _shares(self, s: Sides, layers: Sequence[str]) -> list[Message]:
        message = []
        for name, runs in ((Message("term.baseline"), s.baseline), (s.arm, s.treated)):
            shares = np.array([one.share for run in runs if (one := evidence.shares(run, layers, self.span))])
            if len(shares) and np.isfinite(shares).all():
                each = zip(runs[0].tasks, shares.mean(axis=0).tolist(), strict=True)
                parts = [Message("remark.share", task=task, share=share) for task, share in each]
                message.append(Message("remark.shares_of", arm=name, shares=parts))
        return [Message("remark.shares", arms=message)] if message else []


class _Interference(Quantity):
    """C of an ordered pair, from the ledger: what the second task cancels of the first one's progress."""

    question = INTERFERENCE
    by_layers = True

    @property
    def pair(self) -> Pair:
        """Who, and by whom."""
        return Pair(*self.tasks)

    def lacking(self, runs: Sequence[Evidence]) -> Message | None:
        """A ledger."""
        silent = next((run for run in runs if not run.ledger), None)
        return None if silent is None else Message("reason.no_ledger", file=silent.file)

    def read(self, run: Evidence, layers: Sequence[str]) -> float | None:
        """NaN where a gate of its window is closed."""
        found = evidence.ledger_window(run, layers, self.span)
        if found is None:
            return None
        return float(found.interference[run.tasks.index(self.pair.task), run.tasks.index(self.pair.by)])

    def gates(self, runs: Sequence[Evidence], layers: Sequence[str]) -> list[Gate]:
        """Those of the window, a large training set, and a probe that finds a copy."""
        return [
            *gates.of_the_ledger(runs, layers, self.pair, self.span),
            gates.enough_samples(runs, layers, self.pair.task, self.span, of_ledger=True),
            gates.self_check(runs),
        ]

    def reading(self, s: Sides, layers: Sequence[str]) -> Reading:
        """Where nothing but a run's own progress is in doubt, C is a ratio of means over seeds.

        A run whose own progress is near 0 has no C of its own; over all seeds there may be enough to divide by.
        """
        found = self.gates(s.runs, layers)
        own = next((gate for gate in found if gate.name == gates.OWN_PROGRESS and not gate.passed), None)
        others = [gate for gate in found if gate.name != gates.OWN_PROGRESS]
        if own is None or not s.same_seed or not gates.passed(others):
            return super().reading(s, layers)
        sides = [_Together(self, runs, layers) for runs in (s.baseline, s.treated)]
        baseline, arm = sides
        contrast = difference_of_ratios(arm.above, arm.below, baseline.above, baseline.below)
        together = gates.worst(side.gate(own.limit) for side in sides)
        twice = self._same_twice(s, lambda run: sides[run.arm == s.arm].read(run))
        found = [*others, together, gates.bounded(contrast, self.pair.task), *twice]
        return Reading(baseline.values, arm.values, found, contrast if gates.passed(found) else None, of_means=True)

    def level(self, runs: Sequence[Evidence], layers: Sequence[str]) -> tuple[list[float], tuple[float, float, float]]:
        """As of a comparison: a ratio of means where nothing but a run's own progress is in doubt."""
        found = self.gates(runs, layers)
        shut = [gate for gate in found if not gate.passed]
        if len(runs) < 2 or [gate.name for gate in shut] != [gates.OWN_PROGRESS]:
            return super().level(runs, layers)
        side = _Together(self, runs, layers)
        ratio = ratio_of_means(side.above, side.below)
        if not gates.passed([side.gate(shut[0].limit), gates.bounded(ratio, self.pair.task)]):
            return super().level(runs, layers)
        low, high = ratio.interval()
        return side.values.tolist(), (float(ratio.effect), float(low), float(high))

    def remarks(self, s: Sides, layers: Sequence[str], found: Reading) -> list[Message]:
        """What the terms do not explain, and whether weights are the same."""
        worst = next((gate for gate in found.gates if gate.name == "residual" and math.isfinite(gate.value)), None)
        residual = [] if worst is None else [Message("remark.residual", task=self.pair.task, part=worst.value)]
        means = [self._of_means(s, layers, found)] if found.of_means else []
        same = [Message("remark.same_weights")] if _same_weights(s) else []
        return [*residual, *means, *same, *self._shortened(s, layers)]

    def _of_means(self, s: Sides, layers: Sequence[str], found: Reading) -> Message:
        """What the ratio is; where nothing can be divided by, what C would divide, arm minus baseline."""
        if found.contrast is not None:
            return Message("remark.of_means", task=self.pair.task, by=self.pair.by)
        baseline, arm = (_Together(self, runs, layers).above for runs in (s.baseline, s.treated))
        apart = s.contrast(baseline, arm)
        estimate = tuple(float(one) for one in (apart.effect, *apart.interval()))
        return Message("remark.cancelled", task=self.pair.task, by=self.pair.by, estimate=estimate)

    def _windows(self, runs: Sequence[Evidence], layers: Sequence[str]) -> list[Window]:
        found = [evidence.ledger_window(run, layers, self.span) for run in runs]
        return [one for one in found if one is not None]

    def against_alone(self, s: Sides, layers: Sequence[str]) -> AgainstAlone | None:
        """Of the task that loses."""
        numbers = [
            [float(values[run.tasks.index(self.pair.task)]) for run, values in zip(runs, found, strict=True)]
            for runs in (s.baseline, s.treated)
            for windows in [self._windows(runs, layers)]
            for found in ([w.shrunk for w in windows], [w.lost for w in windows])
        ]
        return AgainstAlone(numbers[0], numbers[2], numbers[1], numbers[3])

    def _shortened(self, s: Sides, layers: Sequence[str]) -> list[Message]:
        """How much of its lone progress the task loses in each arm and by what, which C alone does not tell."""
        task, told, dominated = self.pair.task, [], []
        for name, runs in ((Message("term.baseline"), s.baseline), (s.arm, s.treated)):
            found = [(w, run.tasks.index(task)) for w, run in zip(self._windows(runs, layers), runs, strict=True)]
            shrunk, cancelled = (np.mean([w.shrunk[i] for w, i in found]), np.mean([w.cancelled(i) for w, i in found]))
            if not (np.isfinite(shrunk) and np.isfinite(cancelled)):
                return [Message("remark.alone_unknown", task=task)]
            told.append(Message("remark.alone_of", arm=name, shrunk=float(shrunk), cancelled=float(cancelled)))
            dominated += [name] * all(w.dominated(i, self.margin) for w, i in found)
        named = [Message("remark.shortened", task=task, arms=dominated)] if dominated else []
        return [Message("remark.alone", task=task, arms=told), *named]

    def by_layer(self, run: Evidence, layers: Sequence[str]) -> Array:
        """They sum to C."""
        found = evidence.ledger_window(run, layers, self.span)
        assert found is not None
        return evidence.ledger_by_layer(run, found, self.pair, layers)

    def direct(self, s: Sides, layers: Sequence[str]) -> Direct | None:
        """R under the arm's weights and under the baseline's own, both at the baseline's checkpoints."""
        if not s.same_seed:
            return None
        values = [
            [evidence.direct_effect(one, run, self.pair, layers, self.span) for run in (one, other)]
            for one, other in zip(s.baseline, s.treated, strict=True)
        ]
        found = [[one for one in side if one is not None] for side in zip(*values, strict=True)]
        if any(len(side) < len(values) for side in found):
            return None
        own, under = (np.array([one.value for one in side]) for side in found)
        contrast, told = paired(under - own), np.isfinite([own, under]).all()
        if not told:
            (above, below), (arm_above, arm_below) = (
                np.array([(one.above, one.below) for one in side]).T for side in found
            )
            contrast = difference_of_ratios(arm_above, arm_below, above, below)
            own, under = ratio_parts(above, below), ratio_parts(arm_above, arm_below)
            told = np.isfinite(contrast.interval()).all() and min(below.mean(), arm_below.mean()) > 0
        if not told:
            nothing, message = [math.nan] * len(values), Message("direct.none", task=self.pair.task)
            return Direct(math.nan, math.nan, math.nan, nothing, nothing, message)
        low, high = map(float, contrast.interval())
        effect = float(contrast.effect)
        message = Message("direct.effect", arm=s.arm, by=self.pair.by, task=self.pair.task, effect=effect)
        return Direct(effect, low, high, own.tolist(), under.tolist(), message)


class _Together:
    """C of an arm as a ratio of means over its runs.

    Attributes:
        above, below: (n,) what C divides, and by what, in units of the loss per measured step.
        values: (n,) what each run adds to the ratio.
    """

    def __init__(self, quantity: _Interference, runs: Sequence[Evidence], layers: Sequence[str]) -> None:
        self._quantity, self._runs, self._layers = quantity, runs, layers
        self._parts = [self._of(run) for run in runs]
        self.above = np.array([part.cancelled for part in self._parts])
        self.below = np.array([part.own for part in self._parts])
        self.values = ratio_parts(self.above, self.below)

    def gate(self, limit: float) -> Gate:
        """On the own progress of all runs together."""
        return gates.own_progress_over_seeds(self._runs, self._parts, self._quantity.pair.task, limit)

    def read(self, run: Evidence) -> float:
        """What this run would add to the ratio."""
        part, own = self._of(run), float(self.below.mean())
        ratio = float(self.above.mean()) / own if own else math.nan
        return ratio + (part.cancelled - ratio * part.own) / own if own else math.nan

    def _of(self, run: Evidence) -> evidence.Cancelled:
        return evidence.cancelled(run, self._layers, self._quantity.pair, self._quantity.span)


def _same_weights(s: Sides) -> bool:
    """Whether both arms have the same weights, so that nothing in a difference can be direct."""
    return s.same_seed and all(
        len(one.step) and np.array_equal(one.weights_at(other.step), other.weight)
        for one, other in zip(s.baseline, s.treated, strict=True)
    )


CLUSTERS = "remark.clusters"
"""The key of what is said of an interval that also covers other test images."""

OUTCOME_MARGIN = 0.02
"""The default of the smallest difference of a metric that matters."""

_DELTA_M = "Delta-m"
"""Mean over tasks of the deficit against the task alone, relative to what tasks alone reach on average over seeds.

Source: Maninis et al., "Attentive Single-Tasking of Multiple Tasks", 2019, equation 4, with the sign of a deficit.
"""


def compared_metrics(runs: Sequence[Evidence], tasks: Sequence[str], wanted: Sequence[str] = ()) -> dict[str, str]:
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
class Deficit(Quantity):
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

    def remarks(self, s: Sides, layers: Sequence[str], found: Reading) -> list[Message]:
        """On how many independent parts of the test split it rests."""
        count = len(self._clusters(s.treated))
        known = Message("remark.no_clusters") if count < 2 else Message(CLUSTERS, n=count)
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
                whole = self._mean_alone(task, metric, left_out)
                lost = lost / whole if whole else math.nan
            by_task.setdefault(task, []).append(lost)
        return float(np.mean([np.mean(lost) for lost in by_task.values()]))

    def _reached_alone(self, task: str, seed: int | None, metric: str, left_out: int | None) -> float:
        runs = self.controls[task]
        if self.same_seed:
            return _value(runs[seed], metric, left_out) if seed is not None and seed in runs else math.nan
        return self._mean_alone(task, metric, left_out)

    def _mean_alone(self, task: str, metric: str, left_out: int | None) -> float:
        """Over all seeds: a seed at which the task alone reached nothing is no reason to divide by 0."""
        return float(np.mean([_value(run, metric, left_out) for run in self.controls[task].values()]))


def deficits(
    chosen: Mapping[str, str], tasks: Sequence[str], controls: Mapping[str, ArmRuns], margin: float, *, same_seed: bool
) -> list[Deficit]:
    """One of every metric, and Delta-m where every task has one.

    Args:
        chosen: Metric -> task.
        tasks: Of the baseline.
        controls: Task -> its runs alone.
        margin: Smallest difference of a metric that matters.
        same_seed: As in :class:`Outcome`.
    """
    alone = {task: group.runs for task, group in controls.items()}

    def one(subject: str, message: Message, task: str, of: Mapping[str, str]) -> Deficit:
        return Deficit(subject, message, margin, None, task=task, chosen=of, controls=alone, same_seed=same_seed)

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
