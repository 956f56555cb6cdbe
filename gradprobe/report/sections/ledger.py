"""The loss ledger: what each task's share of the real updates did to each loss."""

from __future__ import annotations

import numpy as np

from gradprobe.report.chart import Block, Chart, Notice, Panel, Section, Table
from gradprobe.report.figures import ledger
from gradprobe.report.sections.common import Context
from gradprobe.report.study_data import ArmData, Ledger


def section(context: Context) -> Section:
    """A stacked chart per task; arms without a ledger are named."""
    words, study = context.words, context.study
    having = [arm for arm in study.arms if _of(arm)]
    blocks: list[Block] = []
    lacking = [arm.name for arm in study.arms if not _of(arm)]
    if having:
        blocks.append(_panel(context, having))
    if lacking:
        every = not having
        text = words("ledger.missing") if every else words("ledger.missing_in", arms=words.list(lacking))
        blocks.append(Notice("missing", text))
    return Section("ledger", words("ledger.title"), words("ledger.lead"), blocks)


def _of(arm: ArmData) -> list[Ledger]:
    return [run.ledger for run in arm.runs if run.ledger is not None]


def _panel(context: Context, arms: list[ArmData]) -> Panel:
    words, tasks = context.words, context.study.tasks
    sources = max((_of(arm)[0].sources for arm in arms), key=len)
    keys = ledger.parts(sources, words)
    charts: list[Chart] = []
    rows: list[list[str]] = []
    for t, task in enumerate(tasks):
        segments, change, residual = [], [], []
        for arm in arms:
            found = [one for one in _of(arm) if one.sources == sources]
            segments.append(ledger.mean([np.append(one.term[t], one.head[t]) for one in found]))
            change.append(ledger.mean([one.change[t : t + 1] for one in found])[0])
            residual.append(ledger.mean([one.residual[t : t + 1] for one in found])[0])
        names = [arm.name for arm in arms]
        figure = ledger.draw(names, np.stack(segments), np.array(change), keys, words)
        title = words("ledger.chart", task=task)
        said = []
        for arm, parts, end, rest in zip(arms, segments, change, residual, strict=True):
            numbers = [words.signed(v) for v in (*parts, end, rest)]
            labels = [key.label for key in keys]
            told = words.list(f"{label} {value}" for label, value in zip(labels, numbers[:-1], strict=True))
            said.append(words("ledger.said", arm=arm.name, parts=told))
            rows.append([task, arm.name, *numbers, str(sum(one.rows for one in _of(arm)))])
        charts.append(Chart(title, figure, words("ledger.alt", title=title, said=words.join(said))))
    columns = [words("column.task"), words("column.arm"), *(key.label for key in keys)]
    table = Table(words("ledger.table"), [*columns, words("column.residual"), words("column.rows")], rows, text=2)
    return Panel(words("ledger.panel"), words("ledger.note"), charts, table, keys)
