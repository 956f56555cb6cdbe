"""The verdicts as messages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradprobe.messages import Message
from gradprobe.verdict.answers import (
    DIRECTION,
    DOMINANCE,
    INTERFERENCE,
    NOT_APPLICABLE,
    OPEN,
    OUTCOME,
    Answer,
    Level,
    verdict_key,
    verdict_said,
)

_TELLING = ("reduced", "reduced_uncertain", "increased")
"""Keys of the verdicts that a headline names arms by."""


def of_rule(answer: Answer) -> Message:
    """The reason of an answer that a rule gave."""
    numbers = Message("rule.numbers", estimate=(answer.effect, answer.low95, answer.high95), n=answer.n)
    if answer.rule == 6:
        held_back = answer.high95 < 0
        return Message("rule.held_back" if held_back else "rule.6", quantity=answer.quantity, numbers=numbers)
    return Message(f"rule.{answer.rule}", quantity=answer.quantity, margin=answer.margin, numbers=numbers)


def of_level(level: Level, margin: float) -> Message:
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


def _how_much(level: Level, margin: float) -> Message:
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
    answers: Sequence[Answer], levels: Sequence[Level], refusals: Sequence[Message], baseline: str
) -> list[Message]:
    """The whole in a few sentences: on interference all of it, since half of it would mislead; then on the rest."""
    of_baseline = [level for level in levels if level.arm == baseline and level.question == INTERFERENCE]
    return [
        _first(answers, refusals, baseline),
        *(level.sentence for level in of_baseline if level.sentence is not None),
        *_who(DIRECTION, answers),
        *_who(OUTCOME, answers),
    ]


def _first(answers: Sequence[Answer], refusals: Sequence[Message], baseline: str) -> Message:
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
    return Message("headline.verdict", verdict=verdict_said(answer.verdict), subject=answer.subject)


def _who(question: str, answers: Sequence[Answer]) -> Iterator[Message]:
    """Where it was reduced, where it increased, and where neither was shown: a sentence each."""
    groups: dict[str, list[Message]] = {}
    for answer in answers:
        if answer.question == question:
            who = Message("headline.who", arm=answer.arm, subject=answer.subject)
            groups.setdefault(verdict_key(answer.verdict), []).append(who)
    telling = [key for key in _TELLING if key in groups]
    for key in telling:
        yield Message(f"headline.{question}.{key}", who=groups[key])
    if groups and not telling:
        quiet = next((key for key in ("equivalent", "undefined") if set(groups) == {key}), "open")
        yield Message(f"headline.{question}.{quiet}")
