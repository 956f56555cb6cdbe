"""The six rules: from differences over seeds to a verdict, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradprobe.measures import Array
from gradprobe.messages import Message
from gradprobe.statistics import Contrast, holm
from gradprobe.verdict.answers import (
    DIRECTION,
    DOMINANCE,
    INTERFERENCE,
    NOT_APPLICABLE,
    OPEN,
    OUTCOME,
    Answer,
    ArmLevel,
    verdict_key,
)

MARGIN = 0.10
"""The default of the smallest difference that matters."""

MIN_SEEDS = 3
"""Fewer give a description and no verdict."""

_LEVEL = 0.025
"""Of a one-sided test that something differs: what an end of a 95 % interval stands for."""

_LEVEL_OF_ALIKE = 0.05
"""Of a one-sided test that a difference stays within the margin: what an end of a 90 % interval stands for."""


@dataclass(frozen=True)
class Decision:
    """Verdicts on one question: arrays (..., F) over F comparisons of arms and subjects.

    Attributes:
        rule: 1 reduced materially, 2 equivalent, 3 reduced and its size uncertain, 4 increased, 5 not reduced,
            6 inconclusive; 0: no verdict, since there are fewer than three seeds or no number.
        low95, high95, low90, high90: Of the effect; not adjusted.
        p_material, p_zero, p_increased: One-sided p-values of rules 1, 3 and 4.
        p_equivalent, p_not_reduced: Of rules 2 and 5; the former the larger of two one-sided ones.
        p_material_holm, p_zero_holm, p_increased_holm, p_equivalent_holm, p_not_reduced_holm: Adjusted over the F
            comparisons, rule by rule.
    """

    rule: NDArray[np.int64]
    low95: Array
    high95: Array
    low90: Array
    high90: Array
    p_material: Array
    p_zero: Array
    p_increased: Array
    p_equivalent: Array
    p_not_reduced: Array
    p_material_holm: Array
    p_zero_holm: Array
    p_increased_holm: Array
    p_equivalent_holm: Array
    p_not_reduced_holm: Array


def decide(contrast: Contrast, margin: ArrayLike = MARGIN) -> Decision:
    """Decide on arm minus baseline of a quantity that is to fall.

    The rules, in order; Holm's adjusted p-value also has to be at most .025 for 1, 3 and 4, and .05 for 2 and 5. With a
    single comparison that says the same as the interval::

        1  high95 < -margin                   reduced, materially
        2  the 90 % interval within +-margin  equivalent: not reduced
        3  high95 < 0                         reduced, its size uncertain
        4  low95 > 0                          increased
        5  low90 > -margin                    not reduced
        6  else                               inconclusive

    Args:
        contrast: (..., F); the last axis holds all comparisons that were planned for the question. Those without a
            number count in the family, and get no verdict.
        margin: () or (F,), above 0, in the unit of the effect.

    Source of rule 2: Schuirmann, "A Comparison of the Two One-Sided Tests Procedure and the Power Approach for
    Assessing the Equivalence of Average Bioavailability", 1987.
    """
    margin = np.broadcast_to(np.asarray(margin, dtype=np.float64), contrast.effect.shape)
    enough = (contrast.seeds >= MIN_SEEDS) & np.isfinite(contrast.effect) & np.isfinite(contrast.error)
    low95, high95 = contrast.interval(0.95)
    low90, high90 = contrast.interval(0.90)
    not_reduced = contrast.p_above(-margin)
    p = [
        np.where(enough, one, np.nan)
        for one in (
            contrast.p_below(-margin),
            contrast.p_below(0.0),
            contrast.p_above(0.0),
            np.maximum(not_reduced, contrast.p_below(margin)),
            not_reduced,
        )
    ]
    adjusted = [holm(one) for one in p]
    with np.errstate(invalid="ignore"):
        material, zero, above = (one <= _LEVEL for one in adjusted[:3])
        alike, not_below = (one <= _LEVEL_OF_ALIKE for one in adjusted[3:])
        rules = [
            ~enough,
            (high95 < -margin) & material,
            (low90 > -margin) & (high90 < margin) & alike,
            (high95 < 0) & zero,
            (low95 > 0) & above,
            (low90 > -margin) & not_below,
        ]
    return Decision(np.select(rules, [0, 1, 2, 3, 4, 5], default=6), low95, high95, low90, high90, *p, *adjusted)


_NAMED_VERDICTS = ("reduced", "reduced_uncertain", "increased")
"""Keys of the verdicts that a headline names arms by."""


def reason_of_rule(answer: Answer) -> Message:
    """The reason of an answer that a rule gave."""
    numbers = Message("rule.numbers", estimate=(answer.effect, answer.low95, answer.high95), n=answer.n)
    if answer.rule != 6:
        return Message(f"rule.{answer.rule}", quantity=answer.quantity, margin=answer.margin, numbers=numbers)
    alone = _held_back(answer)
    if alone is None:
        return Message("rule.6", quantity=answer.quantity, numbers=numbers)
    return Message("rule.held_back", quantity=answer.quantity, numbers=numbers, alone=alone)


def _held_back(answer: Answer) -> Message | None:
    """What the interval alone would say where no rule holds, since there are so many comparisons; None: nothing."""
    says = {
        "alike": -answer.margin < answer.low90 and answer.high90 < answer.margin,
        "fell": answer.high95 < 0,
        "rose": answer.low95 > 0,
        "not_reduced": answer.low90 > -answer.margin,
    }
    found = next((name for name, holds in says.items() if holds), None)
    return None if found is None else Message(f"rule.alone_{found}", margin=answer.margin)


def level_sentence(level: ArmLevel, margin: float) -> Message:
    """How large a quantity is in one arm."""
    if not math.isfinite(level.low95):
        many = sum(map(math.isfinite, level.values))
        return Message("level.none", arm=level.arm, quantity=level.quantity, n=many, of=len(level.values))
    return Message(
        "level.is",
        arm=level.arm,
        quantity=level.quantity,
        estimate=(level.mean, level.low95, level.high95),
        n=len(level.seeds),
        said=_how_much(level, margin),
    )


def _how_much(level: ArmLevel, margin: float) -> Message:
    if level.question == DOMINANCE:
        return Message("level.even")
    if level.question == INTERFERENCE and level.low95 > 1:
        return Message("level.all")
    if level.low95 > margin:
        return Message("level.matters")
    if level.low95 > 0:
        return Message("level.small" if level.high95 < margin else "level.there")
    if level.high95 < 0:
        return Message("level.helps" if level.question == INTERFERENCE else "level.below")
    return Message("level.open")


def headline(
    answers: Sequence[Answer], levels: Sequence[ArmLevel], refusals: Sequence[Message], baseline: str
) -> list[Message]:
    """The whole in a few sentences: on interference all of it, since half of it would mislead; then on the rest."""
    of_baseline = [level for level in levels if level.arm == baseline and level.question == INTERFERENCE]
    return [
        _on_interference(answers, refusals, baseline),
        *(level.sentence for level in of_baseline if level.sentence is not None),
        *_on_others(DIRECTION, answers),
        *_on_others(OUTCOME, answers),
    ]


def _on_interference(answers: Sequence[Answer], refusals: Sequence[Message], baseline: str) -> Message:
    found = [answer for answer in answers if answer.question == INTERFERENCE]
    judged = [answer for answer in found if answer.verdict != NOT_APPLICABLE]
    settled = [answer for answer in judged if answer.verdict not in OPEN]
    if not baseline or not found:
        return Message("headline.no_conclusion", why=refusals[0] if refusals else Message("headline.nothing"))
    if not judged:
        return Message("headline.no_gradient", why=found[0].reason)
    if not settled:
        return Message("headline.no_conclusion", why=judged[0].reason)
    arms = [
        Message("headline.arm", arm=arm, baseline=baseline, verdicts=[_verdict(a) for a in found if a.arm == arm])
        for arm in dict.fromkeys(a.arm for a in settled)
    ]
    return Message("headline.interference", arms=arms)


def _verdict(answer: Answer) -> Message:
    return Message(
        "headline.verdict", verdict=Message(f"verdict.{verdict_key(answer.verdict)}"), subject=answer.subject
    )


def _on_others(question: str, answers: Sequence[Answer]) -> Iterator[Message]:
    """Where it was reduced, where it increased, and where neither was shown: a sentence each."""
    groups: dict[str, list[Message]] = {}
    for answer in answers:
        if answer.question == question:
            who = Message("headline.who", arm=answer.arm, subject=answer.subject)
            groups.setdefault(verdict_key(answer.verdict), []).append(who)
    telling = [key for key in _NAMED_VERDICTS if key in groups]
    for key in telling:
        yield Message(f"headline.{question}.{key}", who=groups[key])
    if groups and not telling:
        quiet = next((key for key in ("equivalent", "undefined") if set(groups) == {key}), "open")
        yield Message(f"headline.{question}.{quiet}")
