"""The questions, one function each: what is compared in one arm, its numbers per seed, and its gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gradprobe.ledger.windows import Gate
from gradprobe.measures import Array
from gradprobe.messages import Message
from gradprobe.statistics import Contrast, paired, welch
from gradprobe.verdict import gates, outcome, readings, words
from gradprobe.verdict.answers import (
    DIRECTION,
    DOMINANCE,
    INTERFERENCE,
    NO_VERDICT,
    NOT_APPLICABLE,
    OUTCOME,
    UNDEFINED,
    Direct,
)
from gradprobe.verdict.conditions import Group
from gradprobe.verdict.evidence import Evidence
from gradprobe.verdict.readings import Pair, Span


@dataclass(frozen=True, eq=False)
class Sides:
    """An arm and the baseline, run beside run.

    Attributes:
        arm: Name.
        baseline, treated: Runs; where ``same_seed``, of one seed each in the same order.
        again: Groups of runs that were made twice.
        same_seed: Whether they are paired.
        vouched: Whether the user says that they belong together, so that none has to be made twice.
        span: Steps that count.
        pairs: Ordered pairs of tasks to look at.
        margin, outcome_margin: Smallest differences that matter.
    """

    arm: str
    baseline: Sequence[Evidence]
    treated: Sequence[Evidence]
    again: Sequence[Sequence[Evidence]]
    same_seed: bool
    vouched: bool
    span: Span
    pairs: Sequence[Pair]
    margin: float
    outcome_margin: float

    @property
    def runs(self) -> list[Evidence]:
        """Of both."""
        return [*self.baseline, *self.treated]

    def layers(self, tasks: Sequence[str]) -> list[str]:
        """Those that all of these tasks reach in every run of both, in the baseline's order."""
        common = set.intersection(*(readings.shared_layers(run, tasks) for run in self.runs))
        return [name for name in self.baseline[0].layers if name in common]

    def contrast(self, baseline: Array, arm: Array) -> Contrast:
        """Arm minus baseline over seeds."""
        return paired(arm - baseline) if self.same_seed else welch(arm, baseline)

    def same_twice(self, question: str, read: Callable[[Evidence], float | None]) -> list[Gate]:
        """The gate on a run made twice, of the quantity that a question judges; none where runs are not paired."""
        if not self.same_seed:
            return []
        if self.vouched and not self.again:
            return [gates.first_losses_equal(self.baseline, self.treated)]
        margin = self.outcome_margin if question == OUTCOME else self.margin
        first = self.baseline[0]
        return [gates.same_twice(self.again, read, margin, f"{first.arm}-s{first.seed}-again.h5")]


def sides(
    baseline: Group, arm: Group, paired: bool | None, span: Span, pairs: Sequence[Pair], margins: tuple[float, float]
) -> Sides:
    """Put an arm beside the baseline.

    Args:
        baseline, arm: The runs.
        paired: As in :func:`gradprobe.verdict.conditions.refusal`.
        span, pairs: As in :class:`Sides`.
        margins: Of gradients and of outcomes.
    """
    same_seed = paired is not False
    seeds = [seed for seed in arm.runs if seed in baseline.runs]
    one, other = (
        [group.runs[seed] for seed in seeds] if same_seed else list(group.runs.values()) for group in (baseline, arm)
    )
    again = [*baseline.again, *arm.again]
    return Sides(arm.name, one, other, again, same_seed, paired is True, span, pairs, *margins)


@dataclass(frozen=True, eq=False)
class Item:
    """One comparison on its way to a verdict.

    Attributes:
        question, arm, subject, quantity, task, notes, direct, gates: As in :class:`gradprobe.verdict.answers.Answer`.
        baseline, treated: (n,) per run.
        seeds: Of the treated runs.
        contrast: None where there is none to be made.
        same_seed: Whether runs are paired.
        verdict: Known without a rule; empty: the rules decide.
        reason: Of that verdict.
    """

    question: str
    arm: str
    subject: str
    quantity: Message
    seeds: Sequence[int]
    baseline: Array = field(default_factory=lambda: np.zeros(0))
    treated: Array = field(default_factory=lambda: np.zeros(0))
    contrast: Contrast | None = None
    gates: Sequence[Gate] = ()
    verdict: str = ""
    reason: Message | None = None
    task: str = ""
    notes: Sequence[Message] = ()
    direct: Direct | None = None
    same_seed: bool = True

    @property
    def differences(self) -> Array:
        """(n,) per seed; empty where there are none, or runs are not paired."""
        if self.contrast is None or not self.same_seed:
            return np.zeros(0)
        return self.treated - self.baseline


def _seeds(runs: Sequence[Evidence]) -> list[int]:
    return [int(run.seed or 0) for run in runs]


def _numbers(runs: Sequence[Evidence], read: Callable[[Evidence], float | None]) -> Array:
    found = [read(run) for run in runs]
    return np.array([math.nan if value is None else value for value in found], dtype=np.float64)


def _measured(
    blank: Item, s: Sides, read: Callable[[Evidence], float | None], found: Sequence[Gate], **more: object
) -> Item:
    """An item whose numbers ``read`` gives, unless a gate is closed: one of ``found``, or that on a run made twice."""
    baseline, treated = _numbers(s.baseline, read), _numbers(s.treated, read)
    found = [*found, *s.same_twice(blank.question, read)]
    closed = not gates.passed(found)
    values = dict(
        vars(blank),
        baseline=baseline,
        treated=treated,
        gates=found,
        contrast=None if closed else s.contrast(baseline, treated),
        same_seed=s.same_seed,
        verdict=UNDEFINED if closed else "",
        reason=gates.closed(found) if closed else None,
        **more,
    )
    return Item(**values)


def _without(blank: Item, verdict: str, reason: Message) -> Item:
    return Item(**{**vars(blank), "verdict": verdict, "reason": reason})


def _not_shared(s: Sides, tasks: Sequence[str]) -> Message | None:
    """Why gradients of tasks cannot be compared in this arm; None: they can."""
    alone = next((run for run in s.treated if run.single), None)
    if alone is not None:
        return Message("reason.single", arm=s.arm, task=alone.single)
    return None if s.layers(tasks) else Message("reason.not_shared", arm=s.arm, tasks=tasks)


def _layer_note(s: Sides, layers: Sequence[str]) -> list[Message]:
    left_out = [name for name in s.baseline[0].layers if name not in layers]
    return [Message("remark.layers", n=len(layers), left_out=len(left_out))] if left_out else []


# ---- direction and dominance


def direction(s: Sides) -> list[Item]:
    """Minus the noise-corrected cosine of every pair, over the layers that both arms share."""
    pairs = list({frozenset((p.task, p.by)): p for p in reversed(s.pairs)}.values())[::-1]
    order = s.baseline[0].tasks
    return [_direction(s, sorted((p.task, p.by), key=order.index)) for p in pairs]


def _direction(s: Sides, tasks: Sequence[str]) -> Item:
    subject, what = "|".join(tasks), words.quantity(DIRECTION, *tasks)
    blank = Item(DIRECTION, s.arm, subject, what, _seeds(s.treated))
    reason = _not_shared(s, tasks)
    if reason is not None:
        return _without(blank, NOT_APPLICABLE, reason)
    if any(readings.stream(run) is None for run in s.runs):
        return _without(blank, NO_VERDICT, _no_noise(s))
    layers = s.layers(tasks)
    found = [
        gates.resolved(s.runs, layers, tasks, s.span),
        *(gates.enough_samples(s.runs, layers, task, s.span) for task in tasks),
        gates.self_check(s.runs),
    ]
    return _measured(
        blank,
        s,
        lambda run: _opposition(run, layers, tasks, s.span),
        found,
        notes=[*_layer_note(s, layers), *_stream_note(s), Message("remark.direction")],
    )


def _opposition(run: Evidence, layers: Sequence[str], tasks: Sequence[str], span: Span) -> float | None:
    found = readings.estimate(run, layers, tasks, span)
    return None if found is None else -float(found.cosine[0])


def _no_noise(s: Sides) -> Message:
    return Message("reason.no_noise", file=next(run.file for run in s.runs if readings.stream(run) is None))


def _stream_note(s: Sides) -> list[Message]:
    return [] if all(run.probed is not None for run in s.runs) else [Message("remark.stream")]


def dominance(s: Sides) -> list[Item]:
    """The largest task's share of the squared weighted gradient."""
    tasks = s.baseline[0].tasks
    blank = Item(DOMINANCE, s.arm, "largest share", words.quantity(DOMINANCE), _seeds(s.treated))
    reason = _not_shared(s, tasks)
    if reason is not None:
        return [_without(blank, NOT_APPLICABLE, reason)]
    if any(readings.stream(run) is None for run in s.runs):
        return [_without(blank, NO_VERDICT, _no_noise(s))]
    layers = s.layers(tasks)
    found = [
        gates.resolved(s.runs, layers, tasks, s.span),
        *(gates.enough_samples(s.runs, layers, task, s.span) for task in tasks),
    ]
    notes = [*_layer_note(s, layers), *_largest(s, layers), Message("remark.dominance")]
    return [_measured(blank, s, lambda run: _largest_share(run, layers, s.span), found, notes=notes)]


def _largest_share(run: Evidence, layers: Sequence[str], span: Span) -> float | None:
    found = readings.dominance(run, layers, span)
    return None if found is None else found.largest


def _largest(s: Sides, layers: Sequence[str]) -> list[Message]:
    said = []
    for name, runs in ((Message("term.baseline"), s.baseline), (s.arm, s.treated)):
        shares = np.array([found.share for run in runs if (found := readings.dominance(run, layers, s.span))])
        if len(shares) and np.isfinite(shares).all():
            mean = shares.mean(axis=0)
            each = zip(runs[0].tasks, mean.tolist(), strict=True)
            parts = [Message("remark.share", task=task, share=share) for task, share in each]
            said.append(Message("remark.shares_of", arm=name, shares=parts))
    return [Message("remark.shares", arms=said)] if said else []


# ---- interference


def interference(s: Sides) -> list[Item]:
    """C of every ordered pair, from the ledger."""
    return [_interference(s, pair) for pair in s.pairs]


def _interference(s: Sides, pair: Pair) -> Item:
    tasks = (pair.task, pair.by)
    blank = Item(INTERFERENCE, s.arm, pair.name, words.quantity(INTERFERENCE, *tasks), _seeds(s.treated))
    reason = _not_shared(s, tasks)
    if reason is not None:
        return _without(blank, NOT_APPLICABLE, reason)
    silent = next((run for run in s.runs if not run.ledger), None)
    if silent is not None:
        return _without(blank, NO_VERDICT, Message("reason.no_ledger", file=silent.file))
    layers = s.layers(tasks)
    found = [
        *gates.of_the_ledger(s.runs, layers, pair, s.span),
        gates.enough_samples(s.runs, layers, pair.task, s.span, of_ledger=True),
        gates.self_check(s.runs),
    ]
    return _measured(
        blank,
        s,
        lambda run: cancelled(run, layers, pair, s.span),
        found,
        notes=[*_layer_note(s, layers), *_residual_note(found, pair.task), *_weight_note(s)],
        direct=_direct(s, pair, layers),
    )


def _residual_note(found: Sequence[Gate], task: str) -> list[Message]:
    worst = next((gate for gate in found if gate.name == "residual" and math.isfinite(gate.value)), None)
    return [] if worst is None else [Message("remark.residual", task=task, part=worst.value)]


def cancelled(run: Evidence, layers: Sequence[str], pair: Pair, span: Span) -> float | None:
    """C of one run; NaN where a gate of its window is closed."""
    found = readings.ledger(run, layers, span)
    if found is None:
        return None
    return float(found.interference[run.tasks.index(pair.task), run.tasks.index(pair.by)])


def _weight_note(s: Sides) -> list[Message]:
    """Where both arms have the same weights, nothing in a difference can be direct."""
    if not s.same_seed:
        return []
    same = all(
        len(one.step) and np.array_equal(one.weights_at(other.step), other.weight)
        for one, other in zip(s.baseline, s.treated, strict=True)
    )
    return [Message("remark.same_weights")] if same else []


def _direct(s: Sides, pair: Pair, layers: Sequence[str]) -> Direct | None:
    """R under the arm's weights and under the baseline's own, both at the baseline's checkpoints."""
    if not s.same_seed:
        return None
    values = [
        [readings.direct(one, run, pair, layers, s.span) for run in (one, other)]
        for one, other in zip(s.baseline, s.treated, strict=True)
    ]
    if any(found is None for row in values for found in row):
        return None
    own, under = (np.array([float(row[k].mean) for row in values]) for k in (0, 1))  # type: ignore[union-attr]
    apart = under - own
    contrast = paired(apart if np.isfinite(apart).all() else np.full_like(apart, math.nan))
    low, high = contrast.interval()
    effect = float(contrast.effect)
    said = Message("direct.effect", arm=s.arm, by=pair.by, task=pair.task, effect=effect)
    if not math.isfinite(effect):
        said = Message("direct.none", task=pair.task)
    return Direct(effect, float(low), float(high), own.tolist(), under.tolist(), said)


# ---- outcome


def outcomes(s: Sides, controls: Mapping[str, Group], chosen: Mapping[str, str]) -> list[Item]:
    """The deficit of every metric against its task alone, and Delta-m.

    Args:
        s: The arm and the baseline.
        controls: Task -> its runs alone.
        chosen: Metric -> task.
    """
    if not chosen:
        blank = Item(OUTCOME, s.arm, "test split", Message("quantity.untested"), _seeds(s.treated))
        return [_without(blank, NO_VERDICT, Message("reason.no_test"))]
    items = [_outcome(s, controls, metric, {metric: task}, task) for metric, task in chosen.items()]
    if set(chosen.values()) >= set(s.baseline[0].tasks):
        items.append(_outcome(s, controls, outcome.DELTA_M, chosen, ""))
    return items


def _outcome(s: Sides, controls: Mapping[str, Group], subject: str, chosen: Mapping[str, str], task: str) -> Item:
    quantity = words.quantity(OUTCOME, task, metric=subject)
    blank = Item(OUTCOME, s.arm, subject, quantity, _seeds(s.treated), task=task)
    missing = sorted({t for t in chosen.values() if t not in controls})
    if missing:
        return _without(blank, NO_VERDICT, Message("reason.no_control", tasks=missing, task=missing[0]))
    runs = {t: dict(controls[t].runs) for t in chosen.values()}
    lacking = outcome.untested([*s.runs, *(one for t in runs.values() for one in t.values())], chosen)
    if lacking is not None:
        return _without(blank, NO_VERDICT, lacking)
    found = {
        name: outcome.deficits(side, runs, chosen, same_seed=s.same_seed)
        for name, side in (("baseline", s.baseline), ("arm", s.treated))
    }
    contrast = outcome.contrast(found["baseline"], found["arm"], same_seed=s.same_seed)
    checked = s.same_twice(OUTCOME, lambda run: float(outcome.deficits([run], runs, chosen, same_seed=True).values[0]))
    closed = [gate for gate in checked if not gate.passed]
    return Item(
        **{
            **vars(blank),
            "baseline": found["baseline"].values,
            "treated": found["arm"].values,
            "contrast": None if closed else contrast,
            "same_seed": s.same_seed,
            "gates": checked,
            "verdict": UNDEFINED if closed else "",
            "reason": gates.closed(closed) if closed else None,
            "notes": [_cluster_note(found["arm"].without.shape[1]), Message("remark.outcome")],
        }
    )


def _cluster_note(clusters: int) -> Message:
    return Message("remark.no_clusters") if clusters < 2 else Message("remark.clusters", n=clusters)
