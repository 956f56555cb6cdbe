"""The top of the page: the verdict in words, a card for each of the three questions, and what it rests on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gradprobe.foreign import clean
from gradprobe.messages import Language, Message
from gradprobe.report.chart import Notice
from gradprobe.report.figures.verdicts import label
from gradprobe.report.sections.common import Context
from gradprobe.verdict.answers import DIRECTION, DOMINANCE, INTERFERENCE, OUTCOME, Answer, verdict_key

_FINDINGS = 8
"""Answers on a card at most; those that say something come first, and the rest is below."""

_ORDER = (
    *("increased", "reduced", "reduced_uncertain", "equivalent", "not_reduced", "inconclusive"),
    *("undefined", "no_verdict", "not_applicable"),
)
SHORT = 90
"""Characters of a headline at most; what is longer is counted, and told below."""

TOLD = 12
"""Sentences below it at most."""


@dataclass(frozen=True)
class Finding:
    """One answer on a card: what, its verdict and its key, and the reason in a sentence."""

    what: str
    key: str
    verdict: str
    sentence: str


@dataclass(frozen=True)
class Card:
    """A question with its answers; ``nothing`` is said where there are none, ``more`` where some are left out."""

    title: str
    question: str
    findings: Sequence[Finding]
    nothing: str
    more: str = ""


def headline(context: Context) -> tuple[str, list[str]]:
    """The verdict on interference, in short where it is long; then all that is said of the whole."""
    words = context.words
    first, *more = context.comparison.headline or [Message("headline.no_conclusion_short")]
    whole, rest = words.say(first), [words.say(one) for one in more[:TOLD]]
    if len(whole) <= SHORT:
        return whole, rest
    if first.key == "headline.interference":
        return _counted(words, context.comparison.of(INTERFERENCE)), [whole, *rest]
    short = "headline.no_gradient_short" if first.key == "headline.no_gradient" else "headline.no_conclusion_short"
    return words(short), [whole, *rest]


def _counted(words: Language, answers: Sequence[Answer]) -> str:
    """How many of each verdict, where they are too many to be named in a headline."""
    keys = [verdict_key(answer.verdict) for answer in answers]
    found = [key for key in _ORDER if key in keys]
    counts = [Message("headline.count", n=keys.count(key), verdict=Message(f"verdict.{key}")) for key in found]
    return words("headline.counted", counts=counts)


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
        ranked = sorted(answers, key=lambda a: _ORDER.index(verdict_key(a.verdict)))
        more = words("card.more", n=len(ranked) - _FINDINGS) if len(ranked) > _FINDINGS else ""
        findings = [finding(context, answer) for answer in ranked[:_FINDINGS]]
        found.append(
            Card(words(f"question.{question}"), words(f"card.{question}"), findings, words("card.nothing"), more)
        )
    return found


def finding(context: Context, answer: Answer) -> Finding:
    """An answer as a card shows it."""
    words, key = context.words, verdict_key(answer.verdict)
    why = "" if answer.reason is None else words.say(answer.reason)
    return Finding(label(answer.arm, answer.subject, words), key, words(f"verdict.{key}"), why)


def notices(context: Context) -> list[Notice]:
    """What was refused, on top: a verdict is not read without it."""
    return said(context, "refusal", context.comparison.refusals)


def said(context: Context, kind: Literal["warning", "refusal"], messages: Iterable[Message]) -> list[Notice]:
    """Messages of the comparison as notices, each once."""
    return [Notice(kind, context.words.say(message)) for message in dict.fromkeys(messages)]


def meta(context: Context) -> list[tuple[str, str]]:
    """What it rests on, name and value."""
    study, comparison, words = context.study, context.comparison, context.words
    seeds = sorted({len(arm.runs) for arm in study.arms})
    span = str(seeds[0]) if len(seeds) == 1 else words.span(seeds[0], seeds[-1])
    window = comparison.window
    steps = words.span(window[0], window[1] - 1) if window else words("meta.all_steps")
    shown = [
        (words("meta.baseline"), study.baseline or words("meta.none")),
        (words("meta.controls"), words.list(study.controls) if study.controls else words("meta.none")),
        (words("meta.arms"), str(len(study.arms))),
        (words("meta.seeds"), span),
        (words("meta.tasks"), words.list(clean(task) for task in comparison.tasks or study.tasks)),
        (words("meta.steps"), steps),
        (words("meta.layers"), str(len(comparison.common_layers or study.arms[0].layers))),
        (words("meta.files"), str(len(study.runs))),
    ]
    if not comparison.plan:
        shown.append((words("meta.plan"), words("meta.no_plan")))
    return shown
