"""Answers with their intervals and the margin: one row each, the seeds' own differences as dots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradprobe.report.chart import Chart, Figure, Key, Table, numbers
from gradprobe.report.figures.dots import thinned
from gradprobe.report.look import axis, figure
from gradprobe.report.names import clean
from gradprobe.report.words import Words, verdict_key
from gradprobe.verdict.answers import Answer

ROWS = 40
ROW_HEIGHT = 56
LABEL = 34

LOOKS = {
    "reduced": ("@reduced", "triangle-left"),
    "reduced_uncertain": ("@reduced", "triangle-left-open"),
    "equivalent": ("@same", "square"),
    "not_reduced": ("@same", "square-open"),
    "increased": ("@increased", "triangle-right"),
    "inconclusive": ("@open", "circle-open"),
    "undefined": ("@none", "x"),
    "not_applicable": ("@none", "x"),
    "no_verdict": ("@none", "circle"),
}
"""Colour and marker of each verdict; a marker of its own, so that nothing hangs on colour."""


def drawable(answer: Answer) -> bool:
    """Whether there is an effect to put on an axis."""
    return math.isfinite(answer.effect)


def differences(answer: Answer) -> list[float]:
    """Each seed's arm minus baseline, where both are known."""
    both = zip(answer.arm_values or (), answer.baseline_values or (), strict=False)
    found = [a - b for a, b in both if a is not None and b is not None]
    return [d for d in found if math.isfinite(d)]


def sign(answer: Answer) -> int:
    """-1 where the values themselves are better high (a metric), so that seeds lie on the effect's side."""
    seeds = differences(answer)
    if not seeds or not drawable(answer):
        return 1
    direct, turned = abs(np.mean(seeds) - answer.effect), abs(np.mean(seeds) + answer.effect)
    return -1 if turned < direct else 1


def label(answer: Answer, words: Words) -> str:
    """Arm and subject, as a row is named."""
    return f"{clean(answer.arm, LABEL // 2)} · {words.subject(answer.subject)}"


def draw(answers: Sequence[Answer], words: Words, x_title: str) -> Figure:
    """The figure: names and verdicts stand above each interval, so that it fits a phone too."""
    data: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for place, answer in enumerate(answers[:ROWS]):
        colour, symbol = LOOKS[verdict_key(answer.verdict)]
        shapes += _frame(place, answer)
        notes += [
            _text(place, label(answer, words), "left", "@ink"),
            _text(place, words(f"verdict.{verdict_key(answer.verdict)}"), "right", colour),
        ]
        if drawable(answer):
            data += _row(place, answer, words, colour, symbol)
    count = len(answers[:ROWS])
    y = axis(
        "",
        range=[count - 0.42, -0.5],
        showticklabels=False,
        showgrid=False,
        showline=False,
        ticks="",
        zeroline=False,
        fixedrange=True,
    )
    x = axis(x_title, zeroline=True, zerolinecolor="@ink", zerolinewidth=1.5, nticks=7, range=_range(answers[:ROWS]))
    if not data:
        data = [{"type": "scatter", "x": [None], "y": [None], "hoverinfo": "skip"}]
    height = 60 + ROW_HEIGHT * count
    return figure(data, x, y, height, annotations=notes, shapes=shapes, hovermode="closest")


def _range(answers: Sequence[Answer]) -> list[float]:
    """All that is drawn, with room at both ends."""
    ends = [0.0]
    for answer in answers:
        if drawable(answer):
            ends += [answer.effect, answer.low95, answer.high95, *(sign(answer) * d for d in differences(answer))]
        ends += [-answer.margin, answer.margin]
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
        "xshift": 0,
        "bgcolor": "@surface/0.8",
        "borderpad": 1,
        "font": {"color": colour, "size": 12, **({"weight": 700} if side == "right" else {})},
    }


def _frame(place: int, answer: Answer) -> list[dict[str, Any]]:
    """The band of the margin behind the row, and a line above it."""
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": place - 0.5, "y1": place - 0.5}
    shapes: list[dict[str, Any]] = [{**line, "line": {"color": "@grid", "width": 1}, "layer": "below"}]
    if math.isfinite(answer.margin):
        band = {"type": "rect", "x0": -answer.margin, "x1": answer.margin, "y0": place - 0.08, "y1": place + 0.5}
        shapes.append({**band, "fillcolor": "@band/0.14", "line": {"width": 0}, "layer": "below"})
    return shapes


def _row(place: int, answer: Answer, words: Words, colour: str, symbol: str) -> list[dict[str, Any]]:
    """Interval at 95 % thin, at 90 % thick, the effect, and the seeds."""
    common = {"type": "scatter", "legendgroup": verdict_key(answer.verdict), "name": label(answer, words)}
    rows = [
        _interval(place, answer.low95, answer.high95, colour, 1.5, common),
        _interval(place, answer.low90, answer.high90, colour, 5, common),
    ]
    told = [words.signed(answer.effect), words.span(answer.low95, answer.high95, True), str(answer.n)]
    rows.append(
        {
            **common,
            "mode": "markers",
            "x": numbers([answer.effect]),
            "y": [place + 0.12],
            "customdata": [[label(answer, words), words(f"verdict.{verdict_key(answer.verdict)}"), *told]],
            "marker": {
                "color": colour,
                "symbol": symbol,
                "size": 13,
                "line": {"color": colour, "width": 2 * ("open" in symbol)},
            },
            "hovertemplate": "%{customdata[0]}<br><b>%{customdata[1]}</b><br>"
            + words("forest.hover", effect="%{customdata[2]}", span="%{customdata[3]}", n="%{customdata[4]}")
            + "<extra></extra>",
        }
    )
    seeds = thinned(sign(answer) * np.array(differences(answer)))
    if len(seeds):
        rows.append(
            {
                **common,
                "mode": "markers",
                "x": numbers(seeds),
                "y": [place + 0.36] * len(seeds),
                "marker": {"color": "@soft/0.65", "size": 6},
                "hovertemplate": words("forest.seed", value="%{x:+.4~g}") + "<extra></extra>",
            }
        )
    return rows


def _interval(
    place: int, low: float | None, high: float | None, colour: str, width: float, common: dict[str, Any]
) -> dict[str, Any]:
    ends = numbers([low, high])
    line = {"color": colour, "width": width}
    return {**common, "mode": "lines", "x": ends, "y": [place + 0.12] * 2, "line": line, "hoverinfo": "skip"}


def legend(answers: Sequence[Answer], words: Words) -> list[Key]:
    """The verdicts that occur."""
    found = list(dict.fromkeys(verdict_key(answer.verdict) for answer in answers if drawable(answer)))
    return [Key(key, words(f"verdict.{key}"), LOOKS[key][0], symbol=LOOKS[key][1]) for key in found]


def chart(title: str, answers: Sequence[Answer], words: Words, x_title: str) -> Chart:
    """The figure, and every row of it in words."""
    said = [words("forest.alt_row", what=label(a, words), **told(a, words)) for a in answers[:12]]
    if len(answers) > 12:
        said.append(words("forest.alt_rest", n=len(answers) - 12))
    return Chart(title, draw(answers, words, x_title), words("forest.alt", title=title, said=words.join(said)))


def told(answer: Answer, words: Words) -> dict[str, str]:
    """An answer's numbers as words take them."""
    verdict = words(f"verdict.{verdict_key(answer.verdict)}")
    return {
        "verdict": verdict,
        "effect": words.signed(answer.effect),
        "span": words.span(answer.low95, answer.high95, True),
        "n": str(answer.n),
    }


def table(caption: str, answers: Sequence[Answer], words: Words) -> Table:
    """All there is of each answer."""
    rows = [
        [
            clean(a.arm),
            words.subject(a.subject),
            words(f"verdict.{verdict_key(a.verdict)}"),
            "" if a.rule is None else str(a.rule),
            words.signed(a.effect),
            words.span(a.low95, a.high95, True),
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
    names = [
        "arm",
        "subject",
        "verdict",
        "rule",
        "effect",
        "ci95",
        "ci90",
        "p_material",
        "p_zero",
        "p_increased",
        "margin",
        "n",
        "baseline_mean",
        "arm_mean",
    ]
    return Table(caption, [words(f"column.{name}") for name in names], rows, text=3, note=words("forest.p_note"))


def _mean(values: Sequence[float | None] | None) -> float | None:
    known = [v for v in values or () if v is not None and math.isfinite(v)]
    return sum(known) / len(known) if known else None
