"""What was found: the verdict in words, a card for each question, and the evidence of every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from gradprobe.foreign import clean
from gradprobe.messages import Language, Message
from gradprobe.report import forest
from gradprobe.report.bins import Array
from gradprobe.report.chart import Block, Notice, Panel, Section
from gradprobe.report.context import Context
from gradprobe.report.forest import label
from gradprobe.report.study_data import RunData
from gradprobe.verdict.answers import DIRECTION, DOMINANCE, INTERFERENCE, OUTCOME, Answer, verdict_key

_FINDINGS = 8
"""Answers on a card at most; those that say something come first, and the rest is below."""

_ORDER = (
    *("increased", "reduced", "reduced_uncertain", "equivalent", "not_reduced", "inconclusive"),
    *("undefined", "no_verdict", "not_applicable"),
)
_SHORT = 90
"""Characters of a headline at most; a longer one becomes counts, and stands in full below."""

_TOLD = 12
"""Sentences below it at most."""


@dataclass(frozen=True)
class _CardAnswer:
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
    findings: Sequence[_CardAnswer]
    nothing: str
    more: str = ""


def headline(context: Context) -> tuple[str, list[str]]:
    """The verdict on interference, in short where it is long; then all that is said of the whole."""
    words = context.words
    first, *more = context.comparison.headline or [Message("headline.no_conclusion_short")]
    whole, rest = words.say(first), [words.say(one) for one in more[:_TOLD]]
    if len(whole) <= _SHORT:
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
        shown = [_card_answer(context, answer) for answer in ranked[:_FINDINGS]]
        found.append(Card(words(f"question.{question}"), words(f"card.{question}"), shown, words("card.nothing"), more))
    return found


def _card_answer(context: Context, answer: Answer) -> _CardAnswer:
    """An answer as a card shows it."""
    words, key = context.words, verdict_key(answer.verdict)
    why = "" if answer.reason is None else words.say(answer.reason)
    return _CardAnswer(label(answer.arm, answer.subject, words), key, words(f"verdict.{key}"), why)


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


_QUESTIONS = ("direction", "interference", "dominance", "outcome")


def evidence(context: Context) -> Section:
    """A forest plot per question; what was not asked or could not be answered is said."""
    words = context.words
    blocks: list[Block] = []
    for question in _QUESTIONS:
        blocks.extend(_question(context, question))
        if question == "direction":
            blocks.append(_probe(context))
    return Section("evidence", words("evidence.title"), words("evidence.lead"), blocks)


def _question(context: Context, question: str) -> list[Block]:
    words = context.words
    answers = [answer for answer in context.comparison.answers if answer.question == question]
    if not answers:
        return [Notice("open", words(f"evidence.none_{question}"))] if question != "dominance" else []
    title = words(f"question.{question}")
    chart = forest.answer_chart(title, answers, words, words(f"axis.{question}"))
    note = [words(f"evidence.note_{question}"), words("evidence.how_to_read")]
    if len(answers) > forest.ROWS:
        note.append(words("evidence.cut", shown=forest.ROWS, of=len(answers)))
    table = forest.answer_table(words("evidence.table", question=title), answers, words)
    blocks: list[Block] = [
        Panel(title, words.join(note), [chart], table, forest.verdict_legend(answers, words), size="wide"),
        *_levels(context, question, title),
    ]
    if any(answer.direct is not None for answer in answers):
        blocks.append(forest.direct_table(answers, words))
    if question == "interference" and context.comparison.similarities:
        blocks.append(forest.similarity_table(context.comparison.similarities, words))
    return blocks


def _levels(context: Context, question: str, name: str) -> list[Block]:
    """How large it is in each arm."""
    words = context.words
    found = [level for level in context.comparison.levels if level.question == question]
    if not found:
        return []
    title = words("levels.title", question=name)
    chart = forest.level_chart(title, found, context.styles, words, words(f"axis.level_{question}"))
    note = words.join([words("levels.note"), words(f"levels.note_{question}")])
    return [Panel(title, note, [chart], forest.level_table(title, found, words), size="wide")]


def _probe(context: Context) -> Block:
    """Cosine on the probe loader, over all shared layers, where it was recorded."""
    words = context.words
    return context.line_panel(
        "probe.title",
        [words("probe.note")],
        words("axis.step"),
        {pair: context.series_from(partial(_probed, pair=p)) for p, pair in enumerate(context.study.pairs)},
        lambda pair: words("probe.chart", pair=pair),
        lambda pair: words("axis.cosine"),
        missing="probe.missing",
        within=(-1, 1),
    )


def _probed(run: RunData, pair: int) -> Array | None:
    """(R, 2) steps and cosines of one pair."""
    return None if run.probe is None else run.probe[:, [0, 1 + pair]]
