"""Compare the runs of several trainers: three questions answered apart, or not answered, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradprobe.errors import UsageError
from gradprobe.messages import Message
from gradprobe.metric import lower_is_better
from gradprobe.statistics import Contrast, sign_flip, skewed
from gradprobe.verdict import conditions, decision, misleading, outcome, questions, readings, words
from gradprobe.verdict.answers import (
    BY_RULE,
    INTERFERENCE,
    NO_VERDICT,
    NOT_APPLICABLE,
    OUTCOME,
    Answer,
    Arm,
    Comparison,
)
from gradprobe.verdict.conditions import Group
from gradprobe.verdict.evidence import Evidence
from gradprobe.verdict.layered import exploratory
from gradprobe.verdict.leveled import levels, similarities
from gradprobe.verdict.questions import Item, Sides
from gradprobe.verdict.readings import Pair, Span


@dataclass(frozen=True)
class Options:
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
class _Resolved:
    """The same with everything decided."""

    baseline: str
    margin: float
    outcome_margin: float
    window: Span
    pairs: list[Pair]
    metrics: list[str]
    paired: bool | None


def compare(evidence: Sequence[Evidence], options: Options | None = None) -> Comparison:
    """Compare runs.

    Args:
        evidence: One entry per file.
        options: See :class:`Options`.

    Raises:
        UsageError: No runs; an unknown pair, control or metric; two files of one arm and seed with other settings.
    """
    if not evidence:
        raise UsageError("no run files to compare.")
    asked = options or Options()
    groups, plan = conditions.group(evidence), conditions.plan_of(evidence)
    tasks = _tasks(evidence)
    chosen = _resolve(asked, plan, tasks)
    controls = _controls(asked, groups, tasks)
    baseline = groups.get(chosen.baseline)
    alone = {group.name for group in controls.values()}
    arms = [group for name, group in groups.items() if name != chosen.baseline and name not in alone]
    refusals, laid, refused = _lay_side_by_side(baseline, arms, chosen)
    items = [item for s in laid for item in _items(s, controls, chosen, evidence)] + refused
    answers = _answers(items, chosen)
    if not controls and len(tasks) > 1:
        refusals.append(Message("refusal.no_controls"))
    common, left_out = _layers(baseline, arms, tasks)
    found = levels(baseline, arms, common, chosen.pairs, chosen.window, chosen.margin)
    return Comparison(
        headline=words.headline(answers, found, refusals, chosen.baseline if baseline else ""),
        baseline=chosen.baseline if baseline else "",
        controls=[group.name for group in controls.values()],
        arms=[_arm(group, chosen.baseline, controls) for group in groups.values()],
        tasks=tasks,
        paired=chosen.paired is not False,
        window=chosen.window,
        plan=plan,
        common_layers=common,
        left_out_layers=left_out,
        answers=answers,
        levels=found,
        similarities=similarities(baseline, arms, common, chosen.pairs, chosen.window),
        layers=exploratory(laid, answers),
        refusals=refusals,
        warnings=_warnings(baseline, arms, evidence, chosen),
        disagreements=conditions.disagreements(evidence, groups, plan, _by_the_plans_names(chosen)),
    )


# ---- what is asked for


def _tasks(evidence: Sequence[Evidence]) -> list[str]:
    together = [run for run in evidence if not run.single] or list(evidence)
    return list(dict.fromkeys(task for run in together for task in run.tasks))


NUMBERS = {"margin": 1, "outcome_margin": 1, "window": 2, "seeds": 0}
"""Of a plan, what is numbers, and how many; 0: any."""


def check_plan(plan: Mapping[str, Any]) -> None:
    """The files may be a stranger's.

    Raises:
        UsageError: Something in the plan is of another kind than in one of ours.
    """
    for name, count in NUMBERS.items():
        value = plan.get(name)
        each = value if isinstance(value, list) else [value]
        plain = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in each)
        if value is not None and not (
            plain and (isinstance(value, list) == (count != 1)) and count in (0, 1, len(each))
        ):
            raise UsageError(
                f"the plan in these files says {name} {str(value)[:80]!r}: no plan of `gradprobe study` does."
            )


def _resolve(asked: Options, plan: Mapping[str, Any], tasks: Sequence[str]) -> _Resolved:
    check_plan(plan)
    window = asked.window
    if window is None and np.size(plan.get("window", ())) == 2:
        start, stop = np.ravel(plan["window"])
        window = int(start), int(stop)
    margin = asked.margin if asked.margin is not None else float(plan.get("margin", decision.MARGIN))
    other = asked.outcome_margin
    other = other if other is not None else float(plan.get("outcome_margin", outcome.MARGIN))
    if not (0 < margin < math.inf and 0 < other < math.inf):
        raise UsageError(f"--margin {margin:g}, --outcome-margin {other:g}: margins are finite numbers above 0.")
    named = list(asked.pairs) or [str(name) for name in np.ravel(plan.get("pairs", []))]
    metrics = list(asked.metrics) or [str(name) for name in np.ravel(plan.get("metrics", []))]
    losses = [name for name in metrics if lower_is_better(name)]
    if losses:
        raise UsageError(f"{losses[0]} is a loss: a loss is no evidence here. Take a metric of the test split.")
    return _Resolved(
        asked.baseline or str(plan.get("baseline", "joint")),
        margin,
        other,
        window,
        parse_pairs(named, tasks),
        metrics,
        asked.paired,
    )


def parse_pairs(named: Sequence[str], tasks: Sequence[str]) -> list[Pair]:
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


def _controls(asked: Options, groups: Mapping[str, Group], tasks: Sequence[str]) -> dict[str, Group]:
    """Task -> the runs that train it alone."""
    unknown = [name for name in asked.controls if name not in groups]
    if unknown:
        raise UsageError(f"--control {unknown[0]}: no such arm (there are: {', '.join(groups)}).")
    found: dict[str, Group] = {}
    for name, group in groups.items():
        if name in asked.controls or (not asked.controls and group.single):
            task = group.single or next((task for task in tasks if task in name.split("-")), "")
            if not task:
                raise UsageError(f"--control {name}: its files do not say which task they train alone.")
            found[task] = group
    return found


def _by_the_plans_names(chosen: _Resolved) -> dict[str, Any]:
    found: dict[str, Any] = {
        "baseline": chosen.baseline,
        "margin": chosen.margin,
        "outcome_margin": chosen.outcome_margin,
        "pairs": [pair.name for pair in chosen.pairs],
        "metrics": chosen.metrics,
    }
    return {**found, "window": list(chosen.window)} if chosen.window is not None else found


def _arm(group: Group, baseline: str, controls: Mapping[str, Group]) -> Arm:
    alone = group.name in {control.name for control in controls.values()}
    role = "baseline" if group.name == baseline else "control" if alone else "arm"
    return Arm(group.name, role, [run.file for run in group.runs.values()], list(group.runs))


# ---- side by side


def _lay_side_by_side(
    baseline: Group | None, arms: Sequence[Group], chosen: _Resolved
) -> tuple[list[Message], list[Sides], list[Item]]:
    """Refusals, the arms that can be compared, and what is said of those that cannot."""
    if baseline is None:
        there = [group.name for group in arms]
        return [Message("refusal.no_baseline", arm=chosen.baseline, there=there)], [], []
    if not arms:
        return [Message("refusal.nothing", arm=baseline.name)], [], []
    refusals, laid, refused = [], [], []
    for arm in arms:
        why = conditions.refusal(baseline, arm, chosen.paired)
        if why is not None:
            refusals.append(why)
            refused += [_refused(arm, pair, why) for pair in chosen.pairs]
        else:
            margins = chosen.margin, chosen.outcome_margin
            laid.append(questions.sides(baseline, arm, chosen.paired, chosen.window, chosen.pairs, margins))
    return refusals, laid, refused


def _refused(arm: Group, pair: Pair, why: Message) -> Item:
    quantity = words.quantity(INTERFERENCE, pair.task, pair.by)
    return Item(INTERFERENCE, arm.name, pair.name, quantity, list(arm.runs), verdict=NO_VERDICT, reason=why)


def _items(s: Sides, controls: Mapping[str, Group], chosen: _Resolved, evidence: Sequence[Evidence]) -> list[Item]:
    metrics = outcome.metrics(evidence, s.baseline[0].tasks, chosen.metrics)
    return [
        *questions.direction(s),
        *questions.interference(s),
        *questions.dominance(s),
        *questions.outcomes(s, controls, metrics),
    ]


def _layers(baseline: Group | None, arms: Sequence[Group], tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Layers that all tasks reach in every arm where they share any, and those in some only."""
    runs = [run for group in ([baseline] if baseline else []) + list(arms) for run in group.runs.values()]
    sharing = [found for run in runs if (found := readings.shared_layers(run, tasks))]
    if not sharing:
        return [], []
    order = list(dict.fromkeys(name for run in runs for name in run.layers))
    common, some = set.intersection(*sharing), set.union(*sharing)
    return [name for name in order if name in common], [name for name in order if name in some - common]


# ---- verdicts


def _answers(items: Sequence[Item], chosen: _Resolved) -> list[Answer]:
    """Decide question by question; Holm goes over all arms and subjects of one."""
    by_question: dict[str, list[Item]] = {}
    for item in items:
        by_question.setdefault(item.question, []).append(item)
    return [answer for family in by_question.values() for answer in _decided(family, chosen)]


def _decided(family: Sequence[Item], chosen: _Resolved) -> list[Answer]:
    margin = chosen.outcome_margin if family[0].question == OUTCOME else chosen.margin
    planned = [place for place, item in enumerate(family) if item.verdict != NOT_APPLICABLE]
    found = decision.decide(_stacked([family[place].contrast for place in planned]), margin) if planned else None
    return [
        _answer(item, found, planned.index(place) if place in planned else None, margin)
        for place, item in enumerate(family)
    ]


def _stacked(contrasts: Sequence[Contrast | None]) -> Contrast:
    nothing = Contrast(np.array(math.nan), np.array(math.nan), np.array(math.nan), np.array(0))
    each = [one if one is not None else nothing for one in contrasts]
    effect, error, freedom = (
        np.array([float(getattr(one, name)) for one in each]) for name in ("effect", "error", "freedom")
    )
    return Contrast(effect, error, freedom, np.array([int(one.seeds) for one in each]))


_NUMBERS = (
    "low95", "high95", "low90", "high90",
    "p_material", "p_zero", "p_increased", "p_material_holm", "p_zero_holm", "p_increased_holm",
)  # fmt: skip


def _answer(item: Item, found: decision.Decision | None, place: int | None, margin: float) -> Answer:
    numbers = {} if found is None or place is None else {name: float(getattr(found, name)[place]) for name in _NUMBERS}
    rule = int(found.rule[place]) if found is not None and place is not None and not item.verdict else 0
    differences = item.differences
    answer = Answer(
        item.question,
        item.arm,
        item.subject,
        item.quantity,
        item.verdict or (BY_RULE[rule] if rule else NO_VERDICT),
        rule or None,
        effect=math.nan if item.contrast is None else float(item.contrast.effect),
        **numbers,
        margin=margin,
        n=0 if item.contrast is None else int(item.contrast.seeds),
        seeds=list(item.seeds),
        baseline_values=item.baseline.tolist(),
        arm_values=item.treated.tolist(),
        gates=list(item.gates),
        reason=item.reason,
        task=item.task,
        notes=[*item.notes, *_skew(differences)],
        direct=item.direct,
        sign_flip=sign_flip(differences) if len(differences) else math.nan,
        skewed=bool(skewed(differences)) if len(differences) else False,
    )
    return answer if answer.reason is not None else _with_reason(answer)


def _skew(differences: Any) -> list[Message]:
    return [Message("remark.skew")] if len(differences) and skewed(differences) else []


def _with_reason(answer: Answer) -> Answer:
    if answer.rule is not None:
        reason = words.of_rule(answer)
    elif answer.n < decision.MIN_SEEDS:
        reason = Message("reason.few_seeds", n=answer.n, least=decision.MIN_SEEDS)
    else:
        reason = Message("reason.no_interval")
    return Answer(**{**vars(answer), "reason": reason})


def _warnings(
    baseline: Group | None, arms: Sequence[Group], evidence: Sequence[Evidence], chosen: _Resolved
) -> list[Message]:
    found = [said for arm in arms if baseline for said in conditions.cautions(baseline, arm, chosen.paired)]
    groups = [baseline, *arms] if baseline else list(arms)
    within = [said for group in groups for said in conditions.mixed(group)]
    return [*found, *within, *misleading.of_runs(baseline, arms, evidence)]
