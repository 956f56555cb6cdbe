"""Forest plots: answers and levels with their intervals, the seeds' own values as dots, the margin as a band."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradprobe.foreign import clean
from gradprobe.messages import Language
from gradprobe.report.chart import Chart, Figure, Key, NumberTable, numbers
from gradprobe.report.dots import thinned
from gradprobe.report.theme import Styles, axis, figure
from gradprobe.verdict.answers import Answer, ArmLevel, Similarity, verdict_key

ROWS = 40
"""Drawn at most."""

_ROW_HEIGHT = 56
_LABEL = 34
_ROWS_IN_WORDS = 12
"""Rows that are described in words; the table holds them all."""

_NAN = math.nan


@dataclass(frozen=True)
class _ForestRow:
    """One row. NaN: not there.

    Attributes:
        label: Above the interval, at the left.
        verdict: At the right; of a level its value.
        group: What is hidden and shown together.
        colour, symbol: Of the marker.
        mean: Where the marker stands.
        low95, high95, low90, high90: Ends of the intervals.
        margin: Half the width of the band around 0.
        seeds: (n,).
    """

    label: str
    verdict: str
    group: str
    colour: str
    symbol: str
    mean: float
    low95: float = _NAN
    high95: float = _NAN
    low90: float = _NAN
    high90: float = _NAN
    margin: float = _NAN
    seeds: Sequence[float] = ()


def draw(rows: Sequence[_ForestRow], words: Language, x_title: str) -> Figure:
    """The figure: names and verdicts stand above each interval, so that it fits a phone too."""
    data: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    shown = rows[:ROWS]
    for place, row in enumerate(shown):
        shapes += _frame(place, row)
        notes += [_text(place, row.label, "left", "@ink"), _text(place, row.verdict, "right", row.colour)]
        if math.isfinite(row.mean):
            data += _row(place, row, words)
        data += _seeds(place, row, words)
    y = axis(
        "",
        range=[len(shown) - 0.42, -0.5],
        showticklabels=False,
        showgrid=False,
        showline=False,
        ticks="",
        zeroline=False,
        fixedrange=True,
    )
    x = axis(x_title, zeroline=True, zerolinecolor="@ink", zerolinewidth=1.5, nticks=7, range=_range(shown))
    if not data:
        data = [{"type": "scatter", "x": [None], "y": [None], "hoverinfo": "skip"}]
    height = 60 + _ROW_HEIGHT * len(shown)
    return figure(data, x, y, height, annotations=notes, shapes=shapes, hovermode="closest")


def _range(rows: Sequence[_ForestRow]) -> list[float]:
    """All that is drawn, with room at both ends."""
    ends = [0.0]
    for row in rows:
        ends += [row.mean, row.low95, row.high95, row.low90, row.high90, -row.margin, row.margin, *row.seeds]
    known = [value for value in ends if math.isfinite(value)]
    low, high = min(known), max(known)
    room = 0.05 * (high - low) or 1.0
    return numbers([low - room, high + room])


def _text(place: int, text: str, side: str, colour: str) -> dict[str, Any]:
    return {
        "text": text,
        "x": 0 if side == "left" else 1,
        "xref": "paper",
        "xanchor": side,
        "y": place - 0.27,
        "yanchor": "middle",
        "showarrow": False,
        "bgcolor": "@surface/0.8",
        "borderpad": 1,
        "font": {"color": colour, "size": 12, **({"weight": 700} if side == "right" else {})},
    }


def _frame(place: int, row: _ForestRow) -> list[dict[str, Any]]:
    """The band of the margin behind the row, and a line above it."""
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": place - 0.5, "y1": place - 0.5}
    shapes: list[dict[str, Any]] = [{**line, "line": {"color": "@grid", "width": 1}, "layer": "below"}]
    if math.isfinite(row.margin):
        band = {"type": "rect", "x0": -row.margin, "x1": row.margin, "y0": place - 0.08, "y1": place + 0.5}
        shapes.append({**band, "fillcolor": "@band/0.14", "line": {"width": 0}, "layer": "below"})
    return shapes


def _row(place: int, row: _ForestRow, words: Language) -> list[dict[str, Any]]:
    """Interval at 95 % thin, at 90 % thick, and the mean."""
    common = _common(row)
    drawn = []
    for low, high, width in ((row.low95, row.high95, 1.5), (row.low90, row.high90, 5)):
        if math.isfinite(low) and math.isfinite(high):
            line = {"color": row.colour, "width": width}
            ends = {"x": numbers([low, high]), "y": [place + 0.12] * 2}
            drawn.append({**common, "mode": "lines", **ends, "line": line, "hoverinfo": "skip"})
    cells = [row.label, row.verdict, *words.estimate(row.mean, row.low95, row.high95, signed=True), len(row.seeds)]
    edge = {"color": row.colour, "width": 2 * ("open" in row.symbol)}
    drawn.append(
        {
            **common,
            "mode": "markers",
            "x": numbers([row.mean]),
            "y": [place + 0.12],
            "customdata": [cells],
            "marker": {"color": row.colour, "symbol": row.symbol, "size": 13, "line": edge},
            "hovertemplate": "%{customdata[0]}<br><b>%{customdata[1]}</b><br>"
            + words("forest.hover", effect="%{customdata[2]}", span="%{customdata[3]}", n="%{customdata[4]}")
            + "<extra></extra>",
        }
    )
    return drawn


def _seeds(place: int, row: _ForestRow, words: Language) -> list[dict[str, Any]]:
    """A dot for each seed that has a number, also where not all have one and there is no mean."""
    seeds = thinned(np.array([value for value in row.seeds if math.isfinite(value)]))
    if not len(seeds):
        return []
    return [
        {
            **_common(row),
            "mode": "markers",
            "x": numbers(seeds),
            "y": [place + 0.36] * len(seeds),
            "customdata": [words.signed(value) for value in seeds],
            "marker": {"color": "@soft/0.65", "size": 6},
            "hovertemplate": words("forest.seed", value="%{customdata}") + "<extra></extra>",
        }
    ]


def _common(row: _ForestRow) -> dict[str, Any]:
    return {"type": "scatter", "legendgroup": row.group, "name": row.label}


def _chart(title: str, rows: Sequence[_ForestRow], sentences: list[str], words: Language, x_title: str) -> Chart:
    """Rows as a figure, and the first of them in words."""
    if len(rows) > _ROWS_IN_WORDS:
        sentences = [*sentences, words("forest.alt_rest", n=len(rows) - _ROWS_IN_WORDS)]
    return Chart(title, draw(rows, words, x_title), words("forest.alt", title=title, said=words.join(sentences)))


def level_row(level: ArmLevel, styles: Styles, words: Language) -> _ForestRow:
    """The level as a row in the colour of its arm."""
    arm = clean(level.arm)
    return _ForestRow(
        label(level.arm, level.subject, words),
        words.number(level.mean),
        arm,
        styles.colour(arm),
        styles.symbol(arm),
        level.mean,
        level.low95,
        level.high95,
        seeds=list(level.values),
    )


def level_chart(title: str, levels: Sequence[ArmLevel], styles: Styles, words: Language, x_title: str) -> Chart:
    """The figure, and its rows in words."""
    sentences = []
    for one in levels[:_ROWS_IN_WORDS]:
        mean, span = words.estimate(one.mean, one.low95, one.high95)
        sentences.append(words("levels.alt_row", what=label(one.arm, one.subject, words), mean=mean, span=span))
    return _chart(title, [level_row(level, styles, words) for level in levels], sentences, words, x_title)


def level_table(caption: str, levels: Sequence[ArmLevel], words: Language) -> NumberTable:
    """Mean, interval and number of runs of each."""
    rows = [
        [
            clean(one.arm),
            words.subject(one.subject),
            *words.estimate(one.mean, one.low95, one.high95),
            str(len(one.values)),
        ]
        for one in levels
    ]
    columns = words.columns("arm", "subject", "mean", "ci95", "n")
    return NumberTable(caption, columns, rows, text=2)


LOOKS = {
    "reduced": ("@reduced", "triangle-left"),
    "reduced_uncertain": ("@reduced", "triangle-left-open"),
    "equivalent": ("@same", "square"),
    "not_reduced": ("@same", "square-open"),
    "increased": ("@increased", "triangle-right"),
    "inconclusive": ("@open", "circle-open"),
    "undefined": ("@none", "diamond-open"),
    "not_applicable": ("@none", "x"),
    "no_verdict": ("@none", "circle"),
}
"""Colour and marker of each verdict; a marker of its own, so that nothing hangs on colour."""


def label(arm: str, subject: str, words: Language) -> str:
    """Arm and subject, as a row is named."""
    return f"{clean(arm, _LABEL // 2)}\u00a0· {words.subject(subject)}"


def _differences(answer: Answer) -> list[float]:
    """Each seed's arm minus baseline, where both are known, on the side of the effect.

    An outcome's values are metrics, which fall where its effect, the gap to single tasks, grows.
    """
    both = zip(answer.arm_values, answer.baseline_values, strict=False)
    found = [a - b for a, b in both if math.isfinite(a) and math.isfinite(b)]
    turned = bool(found) and abs(np.mean(found) + answer.effect) < abs(np.mean(found) - answer.effect)
    return [-d if turned else d for d in found]


def answer_row(answer: Answer, words: Language) -> _ForestRow:
    """The answer as a row; without an effect it is a name and a verdict."""
    key = verdict_key(answer.verdict)
    return _ForestRow(
        label(answer.arm, answer.subject, words),
        words(f"verdict.{key}"),
        key,
        *LOOKS[key],
        answer.effect,
        answer.low95,
        answer.high95,
        answer.low90,
        answer.high90,
        answer.margin,
        _differences(answer) if math.isfinite(answer.effect) else (),
    )


def verdict_legend(answers: Sequence[Answer], words: Language) -> list[Key]:
    """The verdicts that are drawn."""
    found = dict.fromkeys(verdict_key(answer.verdict) for answer in answers if math.isfinite(answer.effect))
    return [Key(key, words(f"verdict.{key}"), LOOKS[key][0], symbol=LOOKS[key][1]) for key in found]


def answer_chart(title: str, answers: Sequence[Answer], words: Language, x_title: str) -> Chart:
    """The figure, and its rows in words."""
    sentences = [
        words("forest.alt_row", what=label(a.arm, a.subject, words), **_answer_values(a, words))
        for a in answers[:_ROWS_IN_WORDS]
    ]
    return _chart(title, [answer_row(answer, words) for answer in answers], sentences, words, x_title)


def _answer_values(answer: Answer, words: Language) -> dict[str, str]:
    """An answer's numbers as words take them."""
    effect, span = words.estimate(answer.effect, answer.low95, answer.high95, signed=True)
    return {
        "verdict": words(f"verdict.{verdict_key(answer.verdict)}"),
        "effect": effect,
        "span": span,
        "n": str(answer.n),
    }


_COLUMNS = (
    *("arm", "subject", "verdict", "rule", "effect", "ci95", "ci90"),
    *("p_material", "p_zero", "p_increased", "margin", "n", "baseline_mean", "arm_mean"),
)


def answer_table(caption: str, answers: Sequence[Answer], words: Language) -> NumberTable:
    """All there is of each answer."""
    rows = [
        [
            clean(a.arm),
            words.subject(a.subject),
            words(f"verdict.{verdict_key(a.verdict)}"),
            "" if a.rule is None else str(a.rule),
            *words.estimate(a.effect, a.low95, a.high95, signed=True),
            words.span(a.low90, a.high90, True),
            words.p_value((a.p_material, a.p_material_holm)),
            words.p_value((a.p_zero, a.p_zero_holm)),
            words.p_value((a.p_increased, a.p_increased_holm)),
            words.number(a.margin),
            str(a.n),
            words.number(_mean(a.baseline_values)),
            words.number(_mean(a.arm_values)),
        ]
        for a in answers
    ]
    columns = words.columns(*_COLUMNS)
    return NumberTable(caption, columns, rows, text=3, note=words("forest.p_note"))


def direct_table(answers: Sequence[Answer], words: Language) -> NumberTable:
    """Direct and total effects, of answers that have both."""
    rows = [
        [
            clean(a.arm),
            words.subject(a.subject),
            *words.estimate(a.direct.effect, a.direct.low95, a.direct.high95, signed=True),
            *words.estimate(a.effect, a.low95, a.high95, signed=True),
        ]
        for a in answers
        if a.direct is not None
    ]
    columns = words.columns("arm", "subject", "direct", "ci95", "total", "ci95")
    return NumberTable(words("direct.title"), columns, rows, text=2, note=words("direct.note"))


def similarity_table(found: Sequence[Similarity], words: Language) -> NumberTable:
    """How alike gradients are in length, by arm and pair."""
    rows = [[clean(x.arm), words.subject(x.subject), *words.estimate(x.mean, x.low95, x.high95)] for x in found]
    columns = words.columns("arm", "subject", "mean", "ci95")
    return NumberTable(words("similarity.title"), columns, rows, text=2, note=words("similarity.note"))


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan
