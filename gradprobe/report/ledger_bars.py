"""The loss ledger as stacked bars: what each task's share of the real updates did to each loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradprobe.messages import Language
from gradprobe.report.bins import Array
from gradprobe.report.chart import Block, Chart, Figure, Key, Notice, NumberTable, Panel, Section, in_short, numbers
from gradprobe.report.context import Context
from gradprobe.report.study_data import ArmData, LedgerSums
from gradprobe.report.theme import axis, figure


def _parts(sources: Sequence[str], words: Language) -> list[Key]:
    """The segments: what an update of shared layers comes from, and the task's private layers. The legend, too."""
    names = {"weight decay": words("ledger.decay"), "earlier momentum": words("ledger.momentum")}
    shown = [Key(f"source {i}", names.get(s, s), f"@series{i % 8}", symbol="square") for i, s in enumerate(sources)]
    head = Key("head", words("ledger.head"), "@none", symbol="square")
    return [*shown, head, Key("change", words("ledger.change"), "@ink", symbol="diamond")]


def _draw(arms: Sequence[str], segments: Array, change: Array, keys: Sequence[Key], words: Language) -> Figure:
    """One task's ledger.

    Args:
        arms: (A,) names.
        segments: (A, S + 1), mean over seeds of the change by each source and, last, the private layers.
        change: (A,), measured.
        keys: Of :func:`_parts`.
        words: The language.
    """
    places = list(range(len(arms)))
    data = []
    for i, key in enumerate(keys[:-1]):
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": key.label,
                "legendgroup": key.group,
                "x": numbers(segments[:, i]),
                "y": places,
                "customdata": [words.signed(value) for value in segments[:, i]],
                "marker": {"color": key.colour, "line": {"color": "@surface", "width": 1}},
                "hovertemplate": "%{customdata}",
            }
        )
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": keys[-1].label,
            "legendgroup": keys[-1].group,
            "x": numbers(change),
            "y": places,
            "customdata": [words.signed(value) for value in change],
            "marker": {
                "color": keys[-1].colour,
                "symbol": "diamond",
                "size": 11,
                "line": {"color": "@surface", "width": 1.5},
            },
            "hovertemplate": "%{customdata}",
        }
    )
    y = axis(
        "",
        tickvals=places,
        ticktext=in_short(list(arms), 22),
        range=[len(arms) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    x = axis(words("ledger.axis"), zeroline=True, zerolinecolor="@ink", nticks=6)
    return figure(data, x, y, 80 + 46 * len(arms), barmode="relative", bargap=0.35, hovermode="closest")


def _mean(values: Sequence[Array]) -> Array:
    """Over seeds, (...); NaN where no seed has a value."""
    stacked = np.stack(values)
    known = np.isfinite(stacked)
    with np.errstate(invalid="ignore"):
        result: Array = np.where(known, stacked, 0.0).sum(axis=0) / known.sum(axis=0)
    return result


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


def _of(arm: ArmData) -> list[LedgerSums]:
    return [run.ledger for run in arm.runs if run.ledger is not None]


def _panel(context: Context, arms: list[ArmData]) -> Panel:
    words, tasks = context.words, context.study.tasks
    sources = max((_of(arm)[0].sources for arm in arms), key=len)
    keys = _parts(sources, words)
    charts: list[Chart] = []
    rows: list[list[str]] = []
    for t, task in enumerate(tasks):
        segments, change, residual = [], [], []
        for arm in arms:
            found = [one for one in _of(arm) if one.sources == sources]
            segments.append(_mean([np.append(one.term[t], one.head[t]) for one in found]))
            change.append(_mean([one.change[t : t + 1] for one in found])[0])
            residual.append(_mean([one.residual[t : t + 1] for one in found])[0])
        names = [arm.name for arm in arms]
        figure = _draw(names, np.stack(segments), np.array(change), keys, words)
        title = words("ledger.chart", task=task)
        sentences = []
        for arm, parts, end, rest in zip(arms, segments, change, residual, strict=True):
            numbers = [words.signed(v) for v in (*parts, end, rest)]
            labels = [key.label for key in keys]
            listed = words.list(f"{label} {value}" for label, value in zip(labels, numbers[:-1], strict=True))
            sentences.append(words("ledger.said", arm=arm.name, parts=listed))
            rows.append([task, arm.name, *numbers, str(sum(one.rows for one in _of(arm)))])
        charts.append(Chart(title, figure, words("ledger.alt", title=title, said=words.join(sentences))))
    columns = [*words.columns("task", "arm"), *(key.label for key in keys)]
    table = NumberTable(words("ledger.table"), [*columns, *words.columns("residual", "rows")], rows, text=2)
    return Panel(words("ledger.panel"), words("ledger.note"), charts, table, keys)
