"""The three answers with their intervals: direction, interference (and dominance), outcome."""

from __future__ import annotations

import numpy as np

from gradprobe.report.chart import Block, Notice, Panel, Section
from gradprobe.report.figures import forest, levels, lines, verdicts
from gradprobe.report.figures.lines import Series
from gradprobe.report.sections.common import Context

QUESTIONS = ("direction", "interference", "dominance", "outcome")


def section(context: Context) -> Section:
    """A forest plot per question; what was not asked or could not be answered is said."""
    words = context.words
    blocks: list[Block] = []
    for question in QUESTIONS:
        blocks.extend(_question(context, question))
        if question == "direction":
            blocks.extend(_probe(context))
    return Section("evidence", words("evidence.title"), words("evidence.lead"), blocks)


def _question(context: Context, question: str) -> list[Block]:
    words = context.words
    answers = [answer for answer in context.comparison.answers if answer.question == question]
    if not answers:
        return [Notice("open", words(f"evidence.none_{question}"))] if question != "dominance" else []
    title = words(f"question.{question}")
    chart = verdicts.chart(title, answers, words, words(f"axis.{question}"))
    note = [words(f"evidence.note_{question}"), words("evidence.how_to_read")]
    if len(answers) > forest.ROWS:
        note.append(words("evidence.cut", shown=forest.ROWS, of=len(answers)))
    table = verdicts.table(words("evidence.table", question=title), answers, words)
    blocks: list[Block] = [
        Panel(title, words.join(note), [chart], table, verdicts.legend(answers, words), size="wide"),
        *_levels(context, question, title),
    ]
    if any(answer.direct is not None for answer in answers):
        blocks.append(verdicts.direct(answers, words))
    if question == "interference" and context.comparison.similarities:
        blocks.append(verdicts.similarity(context.comparison.similarities, words))
    return blocks


def _levels(context: Context, question: str, name: str) -> list[Block]:
    """How large it is in each arm."""
    words = context.words
    found = [level for level in context.comparison.levels if level.question == question]
    if not found:
        return []
    title = words("levels.title", question=name)
    chart = levels.chart(title, found, context.styles, words, words(f"axis.level_{question}"))
    note = words.join([words("levels.note"), words(f"levels.note_{question}")])
    return [Panel(title, note, [chart], levels.table(title, found, words), size="wide")]


def _probe(context: Context) -> list[Block]:
    """Cosine on the probe loader, over all shared layers, where it was recorded."""
    study, words = context.study, context.words
    if not study.any("probe"):
        return [Notice("missing", words("probe.missing"))]
    charts, named = [], []
    for p, pair in enumerate(study.pairs):
        series = _probe_series(context, p)
        if series:
            title = words("probe.chart", pair=pair)
            named.append((pair, series))
            charts.append(
                lines.chart(
                    title, series, context.styles, words, words("axis.step"), words("axis.cosine"), within=(-1, 1)
                )
            )
    if not charts:
        return [Notice("missing", words("probe.missing"))]
    table = lines.table(words("probe.title"), named, words, words("axis.step"))
    return [Panel(words("probe.title"), words("probe.note"), charts, table, context.legend())]


def _probe_series(context: Context, pair: int) -> list[Series]:
    """A series per arm over the steps at which any of its runs was measured on the probe loader."""
    found = []
    for arm in context.study.arms:
        tables = [run.probe for run in arm.runs if run.probe is not None]
        steps = np.unique(np.concatenate([table[:, 0] for table in tables] or [np.zeros(0)]))
        values = np.full((len(tables), len(steps)), np.nan)
        for i, table in enumerate(tables):
            values[i, np.searchsorted(steps, table[:, 0])] = table[:, 1 + pair]
        if np.isfinite(values).any():
            found.append(Series(arm.name, steps, values))
    return found
