"""The top of the page: the verdict in words, a card for each of the three questions, and what it rests on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gradprobe.report.chart import Notice
from gradprobe.report.figures.verdicts import label, told
from gradprobe.report.names import clean
from gradprobe.report.sections.common import Context
from gradprobe.report.words import Words, verdict_key
from gradprobe.verdict.answers import DIRECTION, DOMINANCE, INTERFERENCE, OUTCOME, Answer, Level

FINDINGS = 8
"""Answers on a card at most; those that say something come first, and the rest is below."""

TELLING = ("increased", "reduced", "reduced_uncertain", "equivalent", "not_reduced", "inconclusive")
SAID = ("reduced", "reduced_uncertain", "increased")
NAMES = 5
SHORT = 90
"""Characters of a headline at most; what is longer is counted, and told below."""

LEVELS = 6


@dataclass(frozen=True)
class Finding:
    """One answer on a card: what, its verdict and its key, and the reason in a sentence."""

    what: str
    key: str
    verdict: str
    sentence: str
    english: bool = False


@dataclass(frozen=True)
class Card:
    """A question with its answers; ``nothing`` is said where there are none, ``more`` where some are left out."""

    title: str
    question: str
    findings: Sequence[Finding]
    nothing: str
    more: str = ""


def headline(context: Context) -> tuple[str, list[str]]:
    """The verdict in words: on interference, all of it, since half of it would mislead; then on the other two."""
    comparison, words = context.comparison, context.words
    interference = comparison.of(INTERFERENCE)
    more = [
        *_levels(context),
        *_said(words, DIRECTION, comparison.of(DIRECTION)),
        *_said(words, OUTCOME, comparison.of(OUTCOME)),
    ]
    if not interference or all(verdict_key(a.verdict) == "no_verdict" for a in interference):
        return words("headline.no_verdict" if comparison.baseline else "headline.no_control"), more
    said = _said(words, INTERFERENCE, interference)
    whole = words.join(said)
    return (whole, more) if len(whole) <= SHORT else (_counted(words, interference), [*said, *more])


def _counted(words: Words, answers: Sequence[Answer]) -> str:
    """How many of each verdict, where they are too many to be named in a headline."""
    keys = [verdict_key(answer.verdict) for answer in answers]
    order = [key for key in (*TELLING, "undefined", "no_verdict", "not_applicable") if key in keys]
    counts = words.list(f"{keys.count(key)}\u00a0×\u00a0{words(f'verdict.{key}')}" for key in order)
    return words("headline.counted", counts=counts)


def _levels(context: Context) -> list[str]:
    """How large interference is in the baseline: whether there is anything to reduce."""
    words, comparison = context.words, context.comparison
    margins = [answer.margin for answer in comparison.of(INTERFERENCE) if math.isfinite(answer.margin)]
    said = []
    for level in comparison.levels:
        if level.arm == comparison.baseline and level.question == INTERFERENCE and math.isfinite(level.low95):
            by, _, task = level.subject.partition(">")
            values = {"arm": clean(level.arm), "by": clean(by), "task": clean(task)}
            span = words.span(level.low95, level.high95)
            found = words("headline.level", mean=words.number(level.mean), span=span, **values)
            said.append(words.join([found, words(f"headline.level_{_how_much(level, max(margins, default=0.0))}")]))
    return said[:LEVELS]


def _how_much(level: Level, margin: float) -> str:
    if level.low95 > margin:
        return "matters"
    if level.low95 > 0:
        return "small" if level.high95 < margin else "there"
    return "helps" if level.high95 < 0 else "open"


def _said(words: Words, question: str, answers: Sequence[Answer]) -> list[str]:
    """Who reduced, who increased, and where neither was shown: a sentence each."""
    if not answers:
        return []
    groups: dict[str, list[str]] = {}
    for answer in answers:
        groups.setdefault(verdict_key(answer.verdict), []).append(label(answer.arm, answer.subject, words))
    said = []
    for key in SAID:
        if key in groups:
            said.append(words(f"headline.{question}.{key}", who=_names(words, groups[key])))
    if not said:
        kinds = set(groups)
        quiet = "equivalent" if kinds == {"equivalent"} else "undefined" if kinds <= {"undefined"} else "open"
        said.append(words(f"headline.{question}.{quiet}"))
    return said


def _names(words: Words, names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    if len(unique) <= NAMES:
        return words.list(unique)
    return words.list([*unique[:NAMES], words("headline.more", n=len(unique) - NAMES)])


def cards(context: Context) -> list[Card]:
    """Direction, interference with dominance, outcome."""
    words = context.words
    groups = {
        DIRECTION: context.comparison.of(DIRECTION),
        INTERFERENCE: [*context.comparison.of(INTERFERENCE), *context.comparison.of(DOMINANCE)],
        OUTCOME: context.comparison.of(OUTCOME),
    }
    found = []
    for question, answers in groups.items():
        order = [*TELLING, "undefined", "no_verdict", "not_applicable"]
        ranked = sorted(answers, key=lambda a: order.index(verdict_key(a.verdict)))
        more = words("card.more", n=len(ranked) - FINDINGS) if len(ranked) > FINDINGS else ""
        findings = [finding(context, answer) for answer in ranked[:FINDINGS]]
        found.append(
            Card(words(f"question.{question}"), words(f"card.{question}"), findings, words("card.nothing"), more)
        )
    return found


def finding(context: Context, answer: Answer) -> Finding:
    """An answer as a card shows it."""
    words, key = context.words, verdict_key(answer.verdict)
    sentence, english = reason(words, answer)
    return Finding(label(answer.arm, answer.subject, words), key, words(f"verdict.{key}"), sentence, english)


def reason(words: Words, answer: Answer) -> tuple[str, bool]:
    """Why, in a sentence, and whether it is in English whatever the language is."""
    key = verdict_key(answer.verdict)
    if words.lang != "en" and key in TELLING:
        return words(f"reason.{key}", **told(answer, words), margin=words.number(answer.margin)), False
    if answer.reason:
        return words.heard(answer.reason)
    return words(f"reason.{key}"), False


def notices(context: Context) -> list[Notice]:
    """What was refused, on top: a verdict is not read without it."""
    return heard(context, "refusal", context.comparison.refusals)


def heard(context: Context, kind: Literal["warning", "refusal"], sentences: Iterable[str]) -> list[Notice]:
    """Sentences of the comparison as notices, each once."""
    return [Notice(kind, *context.words.heard(text)) for text in dict.fromkeys(sentences)]


def meta(context: Context) -> list[tuple[str, str]]:
    """What it rests on, name and value."""
    material, comparison, words = context.material, context.comparison, context.words
    seeds = sorted({len(arm.runs) for arm in material.arms})
    span = str(seeds[0]) if len(seeds) == 1 else words.span(seeds[0], seeds[-1])
    window = comparison.window
    steps = words.span(window[0], window[1] - 1) if window else words("meta.all_steps")
    shown = [
        (words("meta.baseline"), material.baseline or words("meta.none")),
        (words("meta.controls"), words.list(material.controls) if material.controls else words("meta.none")),
        (words("meta.arms"), str(len(material.arms))),
        (words("meta.seeds"), span),
        (words("meta.tasks"), words.list(clean(task) for task in comparison.tasks or material.tasks)),
        (words("meta.steps"), steps),
        (words("meta.layers"), str(len(comparison.common_layers or material.arms[0].layers))),
        (words("meta.files"), str(len(material.runs))),
    ]
    if not comparison.plan:
        shown.append((words("meta.plan"), words("meta.no_plan")))
    return shown
