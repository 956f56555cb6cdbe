"""The verdicts in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradprobe.verdict.answers import (
    DIRECTION,
    DOMINANCE,
    INTERFERENCE,
    NOT_APPLICABLE,
    OPEN,
    OUTCOME,
    QUESTIONS,
    Answer,
    Level,
)

BY_RULE = {
    1: "fell by more than the margin of {margin:g}",
    2: "changed by less than the margin of {margin:g}, so it was not reduced",
    3: "fell; whether by more than the margin of {margin:g} is uncertain",
    4: "rose",
    5: "did not fall by as much as the margin of {margin:g}",
    6: "is not settled: the interval holds a fall that would matter, and none",
}

NOT_ADJUSTED = "its interval alone would say more, but not beside so many comparisons"


def quantity(question: str, task: str = "", other: str = "", metric: str = "") -> str:
    """What an effect is a difference of."""
    if question == DIRECTION:
        return f"the opposition of {task} and {other} (minus the noise-corrected cosine)"
    if question == INTERFERENCE:
        return f"the part of {task}'s own progress that {other} cancels (C)"
    if question == DOMINANCE:
        return "the largest task's share of the squared weighted gradient"
    return (
        f"the loss in {metric} against {task} trained alone" if task else f"{metric}, the mean relative loss over tasks"
    )


def of_rule(answer: Answer) -> str:
    """The reason of an answer that a rule gave."""
    assert answer.rule is not None
    said = BY_RULE[answer.rule].format(margin=answer.margin)
    held_back = answer.rule == 6 and (answer.high95 < 0 or answer.low95 > 0)
    return (
        f"{answer.quantity[0].upper()}{answer.quantity[1:]} {said}: {answer.effect:+.3f} (95 % interval "
        f"{answer.low95:+.3f} to {answer.high95:+.3f}, {answer.n} seeds)" + (f"; {NOT_ADJUSTED}." if held_back else ".")
    )


def of_level(level: Level, margin: float) -> str:
    """How large a quantity is in one arm."""
    if not math.isfinite(level.low95):
        many = sum(map(math.isfinite, level.values))
        return f"{level.arm}: {level.quantity} has no interval ({many} of {len(level.values)} runs give a number)."
    if level.question == DOMINANCE:
        said = "where 1 over the number of tasks is even"
    elif level.question == INTERFERENCE and level.low95 > 1:
        said = "more than all of it: on the shared layers the task is driven backwards"
    elif level.low95 > margin:
        said = "above what matters"
    elif level.low95 > 0:
        said = "above 0"
    elif level.high95 < 0:
        said = "below 0" + (": it helps" if level.question == INTERFERENCE else "")
    else:
        said = "not told from 0"
    return (
        f"{level.arm}: {level.quantity} is {level.mean:.3f} (95 % interval {level.low95:.3f} to {level.high95:.3f}, "
        f"{len(level.seeds)} seeds), {said}."
    )


def headline(answers: Sequence[Answer], levels: Sequence[Level], refusals: Sequence[str], baseline: str) -> list[str]:
    """The whole in a few sentences, the first one first."""
    said = [_first(answers, refusals, baseline)]
    said += [level.sentence for level in levels if level.arm == baseline and level.question == INTERFERENCE]
    return [*said, *_by_arm(answers)]


def _first(answers: Sequence[Answer], refusals: Sequence[str], baseline: str) -> str:
    found = [answer for answer in answers if answer.question == INTERFERENCE]
    judged = [answer for answer in found if answer.verdict != NOT_APPLICABLE]
    settled = [answer for answer in judged if answer.verdict not in OPEN]
    if not baseline or not found:
        why = refusals[0] if refusals else "there is nothing to compare."
        return f"No conclusion about interference: {why}"
    if not judged:
        return f"No gradient can interfere: {found[0].reason}"
    if not settled:
        why = next((answer.reason for answer in judged), "no arm shares a layer with the baseline.")
        return f"No conclusion about interference: {why}"
    return " ".join(
        f"{arm}: interference against {baseline} is "
        + ", ".join(f"{a.verdict} ({a.subject})" for a in found if a.arm == arm)
        + "."
        for arm in dict.fromkeys(a.arm for a in settled)
    )


def _by_arm(answers: Sequence[Answer]) -> Iterator[str]:
    for arm in dict.fromkeys(answer.arm for answer in answers):
        parts = []
        for question in QUESTIONS:
            mine = [answer for answer in answers if answer.arm == arm and answer.question == question]
            if mine:
                parts.append(f"{question} " + ", ".join(f"{a.subject} {a.verdict}" for a in mine))
        yield f"{arm}: {'; '.join(parts)}."


NOTES = {
    DIRECTION: "Weights cannot change a cosine at given parameters; what changed came through the trajectory.",
    DOMINANCE: "Who decides the update says nothing of whether tasks cancel each other.",
    OUTCOME: "Of this test split; training loss is no part of it.",
}
