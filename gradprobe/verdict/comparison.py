"""Compare the runs of several trainers: every quantity of every arm against the baseline's, and what the rules say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradprobe.errors import UsageError
from gradprobe.measures import Array
from gradprobe.messages import Message
from gradprobe.statistics import Contrast, benjamini_hochberg, sign_flip, skewed, t_interval
from gradprobe.verdict import conditions, decision, gates, training_losses
from gradprobe.verdict.advice import FALSE_DISCOVERIES
from gradprobe.verdict.answers import (
    BY_RULE,
    INTERFERENCE,
    NO_VERDICT,
    NOT_APPLICABLE,
    UNDEFINED,
    Answer,
    ArmFacts,
    ArmLevel,
    Comparison,
    LayerAnswer,
    Similarity,
)
from gradprobe.verdict.conditions import ArmRuns
from gradprobe.verdict.criteria import Criteria, Resolved, controls, resolve
from gradprobe.verdict.evidence import Evidence, shared_layers
from gradprobe.verdict.quantities import (
    CLUSTERS,
    Deficit,
    Direction,
    Quantity,
    Sides,
    compared_metrics,
    deficits,
    of_gradients,
    sides,
)

__all__ = ["compare"]


def compare(evidence: Sequence[Evidence], options: Criteria | None = None) -> Comparison:
    """Compare runs.

    Args:
        evidence: One entry per file.
        options: See :class:`gradprobe.verdict.criteria.Criteria`.

    Raises:
        UsageError: No runs; an unknown pair, control or metric; two files of one arm and seed with other settings.
    """
    if not evidence:
        raise UsageError("no run files to compare.")
    asked = options or Criteria()
    groups, plan = conditions.runs_by_arm(evidence), conditions.plan_of(evidence)
    tasks = _tasks(evidence)
    chosen = resolve(asked, plan, tasks)
    alone = controls(asked, groups, tasks)
    baseline = groups.get(chosen.baseline)
    apart = {chosen.baseline, *(group.name for group in alone.values())}
    arms = [group for name, group in groups.items() if name not in apart]
    beside = [baseline, *arms] if baseline else arms
    quantities = of_gradients(baseline.tasks if baseline else tasks, chosen.pairs, chosen.margin, chosen.window)
    refusals, laid, refused = _lay_side_by_side(baseline, arms, chosen, quantities)
    asked_for = [*quantities, *(_outcomes(evidence, baseline, alone, chosen) if baseline and laid else [])]
    answers = _answers([_measure(s, quantity) for s in laid for quantity in asked_for] + refused)
    if not alone and len(tasks) > 1:
        refusals.append(Message("refusal.no_controls"))
    common, left_out = _common_layers(beside, tasks)
    measured = [group for group in beside if common and _shares(group, common)]
    levels = [_level(group, q, common) for group in measured for q in quantities if _has(group, q)]
    return Comparison(
        headline=decision.headline(answers, levels, refusals, chosen.baseline if baseline else ""),
        baseline=chosen.baseline if baseline else "",
        controls=[group.name for group in alone.values()],
        arms=[_arm(group, chosen.baseline, alone) for group in groups.values()],
        tasks=tasks,
        paired=chosen.paired is not False,
        window=chosen.window,
        plan=plan,
        common_layers=common,
        left_out_layers=left_out,
        answers=answers,
        levels=levels,
        similarities=[
            _similarity(group, q, common)
            for group in measured
            for q in quantities
            if isinstance(q, Direction) and _has(group, q)
        ],
        layers=_by_layer(laid, quantities, answers),
        scope=_scope(baseline, answers) if baseline else [],
        refusals=refusals,
        warnings=_warnings(baseline, arms, evidence, chosen),
        disagreements=conditions.disagreements(evidence, groups, plan, chosen.by_the_plans_names()),
    )


def _scope(baseline: ArmRuns, answers: Sequence[Answer]) -> list[Message]:
    """What no interval over these seeds covers; nothing where there is no interval."""
    told = [answer for answer in answers if math.isfinite(answer.low95)]
    if not told:
        return []
    fewest, count = min(answer.n for answer in told), conditions.data_sets(baseline)
    found = [Message("scope.seeds", n=fewest, part=_RARE_IS_ABSENT**fewest)]
    if count >= len(baseline.runs):
        return found
    images = any(note.key == CLUSTERS for answer in told for note in answer.notes)
    found.append(Message("scope.data", n=count) if count else Message("scope.data_unknown"))
    return [*found, *([Message("scope.test_images")] if images else [])]


_RARE_IS_ABSENT = 0.9
"""How often what happens in one seed of ten does not happen in a seed."""


def _tasks(evidence: Sequence[Evidence]) -> list[str]:
    together = [run for run in evidence if not run.single] or list(evidence)
    return list(dict.fromkeys(task for run in together for task in run.tasks))


def _outcomes(
    evidence: Sequence[Evidence], baseline: ArmRuns, alone: Mapping[str, ArmRuns], chosen: Resolved
) -> list[Deficit]:
    metrics = compared_metrics(evidence, baseline.tasks, chosen.metrics)
    same_seed = chosen.paired is not False
    return deficits(metrics, baseline.tasks, alone, chosen.outcome_margin, same_seed=same_seed)


def _arm(group: ArmRuns, baseline: str, controls: Mapping[str, ArmRuns]) -> ArmFacts:
    alone = group.name in {control.name for control in controls.values()}
    role = "baseline" if group.name == baseline else "control" if alone else "arm"
    return ArmFacts(group.name, role, [run.file for run in group.runs.values()], list(group.runs))


# ---- side by side


@dataclass(frozen=True, eq=False)
class _Measured:
    """An answer before the rules, which look at all arms and subjects of a question.

    Attributes:
        answer: Without a verdict where the rules are to decide.
        contrast: Arm minus baseline; None: nothing for the rules.
    """

    answer: Answer
    contrast: Contrast | None = None


def _lay_side_by_side(
    baseline: ArmRuns | None, arms: Sequence[ArmRuns], chosen: Resolved, quantities: Sequence[Quantity]
) -> tuple[list[Message], list[Sides], list[_Measured]]:
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
            refused += [
                _Measured(replace(_blank(arm.name, q, list(arm.runs)), verdict=NO_VERDICT, reason=why))
                for q in quantities
                if q.question == INTERFERENCE
            ]
        else:
            laid.append(sides(baseline, arm, chosen.paired))
    return refusals, laid, refused


def _blank(arm: str, quantity: Quantity, seeds: Sequence[int]) -> Answer:
    return Answer(
        quantity.question,
        arm,
        quantity.subject,
        quantity.name,
        "",
        margin=quantity.margin,
        seeds=list(seeds),
        task=quantity.task,
    )


def _measure(s: Sides, quantity: Quantity) -> _Measured:
    """One quantity in an arm against the baseline, or why there is none."""
    blank = _blank(s.arm, quantity, [run.seed or 0 for run in s.treated])
    why = _not_shared(s, quantity.tasks) if quantity.tasks else None
    if why is not None:
        return _Measured(replace(blank, verdict=NOT_APPLICABLE, reason=why))
    lacking = quantity.lacking(s.runs)
    if lacking is not None:
        return _Measured(replace(blank, verdict=NO_VERDICT, reason=lacking))
    layers = s.layers(quantity.tasks)
    found = quantity.reading(s, layers)
    answer = replace(
        blank,
        baseline_values=found.baseline.tolist(),
        arm_values=found.arm.tolist(),
        gates=found.gates,
        notes=[*_layer_note(s, quantity, layers), *quantity.remarks(s, layers, found)],
        direct=quantity.direct(s, layers),
        of_means=found.of_means,
        alone=quantity.against_alone(s, layers),
    )
    if found.contrast is None:
        return _Measured(replace(answer, verdict=UNDEFINED, reason=gates.closed(found.gates)))
    answer = replace(answer, effect=float(found.contrast.effect), n=int(found.contrast.seeds))
    return _Measured(_checked(answer, found.arm - found.baseline) if s.same_seed else answer, found.contrast)


def _not_shared(s: Sides, tasks: Sequence[str]) -> Message | None:
    """Why gradients of tasks cannot be compared in this arm; None: they can."""
    alone = next((run for run in s.treated if run.single), None)
    if alone is not None:
        return Message("reason.single", arm=s.arm, task=alone.single)
    return None if s.layers(tasks) else Message("reason.not_shared", arm=s.arm, tasks=tasks)


def _layer_note(s: Sides, quantity: Quantity, layers: Sequence[str]) -> list[Message]:
    left_out = len(s.baseline[0].layers) - len(layers) if quantity.tasks else 0
    return [Message("remark.layers", n=len(layers), left_out=left_out)] if left_out else []


def _checked(answer: Answer, differences: Array) -> Answer:
    """With what does not depend on the t distribution."""
    if not len(differences):
        return answer
    leans = bool(skewed(differences))
    notes = [*answer.notes, *([Message("remark.skew")] if leans else [])]
    return replace(answer, notes=notes, sign_flip=sign_flip(differences), skewed=leans)


def _common_layers(groups: Sequence[ArmRuns], tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Layers that all tasks reach in every arm where they share any, and those in some only."""
    runs = [run for group in groups for run in group.runs.values()]
    sharing = [found for run in runs if (found := shared_layers(run, tasks))]
    if not sharing:
        return [], []
    order = list(dict.fromkeys(name for run in runs for name in run.layers))
    common, some = set.intersection(*sharing), set.union(*sharing)
    return [name for name in order if name in common], [name for name in order if name in some - common]


# ---- verdicts


def _answers(measured: Sequence[_Measured]) -> list[Answer]:
    """Decide question by question; Holm goes over all arms and subjects of one."""
    by_question: dict[str, list[_Measured]] = {}
    for one in measured:
        by_question.setdefault(one.answer.question, []).append(one)
    return [answer for family in by_question.values() for answer in _decided(family)]


def _decided(family: Sequence[_Measured]) -> list[Answer]:
    planned = [one for one in family if one.answer.verdict != NOT_APPLICABLE]
    if not planned:
        return [one.answer for one in family]
    found = decision.decide(_stacked([one.contrast for one in planned]), family[0].answer.margin)
    return [one.answer if one.answer.verdict else _ruled(one.answer, found, planned.index(one)) for one in family]


def _ruled(answer: Answer, found: decision.Decision, place: int) -> Answer:
    rule = int(found.rule[place])
    numbers: dict[str, Any] = {name: float(getattr(found, name)[place]) for name in _NUMBERS}
    answer = replace(answer, verdict=BY_RULE[rule] if rule else NO_VERDICT, rule=rule or None, **numbers)
    return replace(answer, reason=_reason(answer))


def _reason(answer: Answer) -> Message:
    if answer.rule is not None:
        return decision.reason_of_rule(answer)
    if answer.n < decision.MIN_SEEDS:
        return Message("reason.few_seeds", n=answer.n, least=decision.MIN_SEEDS)
    return Message("reason.no_interval")


def _stacked(contrasts: Sequence[Contrast | None]) -> Contrast:
    nothing = Contrast(np.array(math.nan), np.array(math.nan), np.array(math.nan), np.array(0))
    each = [one if one is not None else nothing for one in contrasts]
    effect, error, freedom, divisor_variance, covariance = (
        np.array([float(getattr(one, name)) for one in each])
        for name in ("effect", "error", "freedom", "divisor_variance", "covariance")
    )
    return Contrast(effect, error, freedom, np.array([int(one.seeds) for one in each]), divisor_variance, covariance)


_NUMBERS = (
    "low95", "high95", "low90", "high90",
    "p_material", "p_zero", "p_increased", "p_equivalent", "p_not_reduced",
    "p_material_holm", "p_zero_holm", "p_increased_holm", "p_equivalent_holm", "p_not_reduced_holm",
)  # fmt: skip


# ---- how large, and where


def _shares(group: ArmRuns, layers: Sequence[str]) -> bool:
    """Whether its tasks share all of these layers in every run."""
    return all(set(layers) <= shared_layers(run, run.tasks) for run in group.runs.values())


def _has(group: ArmRuns, quantity: Quantity) -> bool:
    runs = list(group.runs.values())
    return all(set(quantity.tasks) <= set(run.tasks) for run in runs) and quantity.lacking(runs) is None


def _level(group: ArmRuns, quantity: Quantity, layers: Sequence[str]) -> ArmLevel:
    """How large a quantity is in an arm, over its seeds."""
    values, estimate = quantity.level(list(group.runs.values()), layers)
    level = ArmLevel(
        quantity.question, group.name, quantity.subject, quantity.name, *estimate, values, list(group.runs)
    )
    return replace(level, sentence=decision.level_sentence(level, quantity.margin))


def _similarity(group: ArmRuns, direction: Direction, layers: Sequence[str]) -> Similarity:
    values = [direction.similarity(run, layers) for run in group.runs.values()]
    return Similarity(group.name, direction.subject, *_over_seeds(values), values, list(group.runs))


def _over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and interval. NaN where a run has no number: those are no random ones, the others would be a selection."""
    if not np.isfinite(values).all():
        return math.nan, math.nan, math.nan
    mean, low, high = t_interval(np.array(values))
    return float(mean), float(low), float(high)


def _by_layer(laid: Sequence[Sides], quantities: Sequence[Quantity], answers: Sequence[Answer]) -> list[LayerAnswer]:
    """Every layer of what a rule has answered for the trunk: it says where to look, and proves nothing of any one."""
    apart = {(q.question, q.subject): q for q in quantities if q.by_layers}
    found = [
        one
        for s in laid
        for answer in answers
        if answer.arm == s.arm and answer.rule is not None and not answer.of_means
        if (answer.question, answer.subject) in apart
        for one in _layers(s, apart[answer.question, answer.subject])
    ]
    if not found:
        return []
    discoveries = benjamini_hochberg([one.p for one in found], FALSE_DISCOVERIES)
    return [replace(one, discovery=bool(yes)) for one, yes in zip(found, discoveries, strict=True)]


def _layers(s: Sides, quantity: Quantity) -> Iterator[LayerAnswer]:
    layers = s.layers(quantity.tasks)
    values = [np.array([quantity.by_layer(run, layers) for run in side]) for side in (s.baseline, s.treated)]
    contrast = s.contrast(*(one.T for one in values))
    low, high = contrast.interval()
    p = 2 * np.minimum(contrast.p_below(0.0), contrast.p_above(0.0))
    for place, name in enumerate(layers):
        effect, down, up, chance = (float(one[place]) for one in (contrast.effect, low, high, p))
        yield LayerAnswer(quantity.question, s.arm, quantity.subject, name, effect, down, up, chance, discovery=False)


def _warnings(
    baseline: ArmRuns | None, arms: Sequence[ArmRuns], evidence: Sequence[Evidence], chosen: Resolved
) -> list[Message]:
    found = [message for arm in arms if baseline for message in conditions.cautions(baseline, arm, chosen.paired)]
    groups = [baseline, *arms] if baseline else list(arms)
    within = [message for group in groups for message in conditions.mixed(group)]
    return [*found, *within, *training_losses.misleading(baseline, arms, evidence)]
