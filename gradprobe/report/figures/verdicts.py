"""Answers as rows of a forest, as its legend, in words, and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradprobe.foreign import clean
from gradprobe.messages import Language
from gradprobe.report.chart import Chart, Key, Table
from gradprobe.report.figures.forest import Row, draw
from gradprobe.verdict.answers import Answer, Similarity, verdict_key

LABEL = 34
TOLD = 12
"""Rows that are told in words; the table tells them all."""

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
    return f"{clean(arm, LABEL // 2)}\u00a0· {words.subject(subject)}"


def differences(answer: Answer) -> list[float]:
    """Each seed's arm minus baseline, where both are known, on the side of the effect.

    An outcome's values are metrics, which fall where its effect, the gap to single tasks, grows.
    """
    both = zip(answer.arm_values, answer.baseline_values, strict=False)
    found = [a - b for a, b in both if math.isfinite(a) and math.isfinite(b)]
    turned = bool(found) and abs(np.mean(found) + answer.effect) < abs(np.mean(found) - answer.effect)
    return [-d if turned else d for d in found]


def row(answer: Answer, words: Language) -> Row:
    """The answer as a row; without an effect it is a name and a verdict."""
    key = verdict_key(answer.verdict)
    return Row(
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
        differences(answer) if math.isfinite(answer.effect) else (),
    )


def legend(answers: Sequence[Answer], words: Language) -> list[Key]:
    """The verdicts that are drawn."""
    found = dict.fromkeys(verdict_key(answer.verdict) for answer in answers if math.isfinite(answer.effect))
    return [Key(key, words(f"verdict.{key}"), LOOKS[key][0], symbol=LOOKS[key][1]) for key in found]


def chart(title: str, answers: Sequence[Answer], words: Language, x_title: str) -> Chart:
    """The figure, and its rows in words."""
    said = [words("forest.alt_row", what=label(a.arm, a.subject, words), **told(a, words)) for a in answers[:TOLD]]
    if len(answers) > TOLD:
        said.append(words("forest.alt_rest", n=len(answers) - TOLD))
    figure = draw([row(answer, words) for answer in answers], words, x_title)
    return Chart(title, figure, words("forest.alt", title=title, said=words.join(said)))


def told(answer: Answer, words: Language) -> dict[str, str]:
    """An answer's numbers as words take them."""
    effect, span = words.estimate(answer.effect, answer.low95, answer.high95, signed=True)
    return {
        "verdict": words(f"verdict.{verdict_key(answer.verdict)}"),
        "effect": effect,
        "span": span,
        "n": str(answer.n),
    }


COLUMNS = (
    *("arm", "subject", "verdict", "rule", "effect", "ci95", "ci90"),
    *("p_material", "p_zero", "p_increased", "margin", "n", "baseline_mean", "arm_mean"),
)


def table(caption: str, answers: Sequence[Answer], words: Language) -> Table:
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
    columns = [words(f"column.{name}") for name in COLUMNS]
    return Table(caption, columns, rows, text=3, note=words("forest.p_note"))


def direct(answers: Sequence[Answer], words: Language) -> Table:
    """Direct effects beside the total ones, of answers that have them."""
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
    columns = [words(f"column.{name}") for name in ("arm", "subject", "direct", "ci95", "total", "ci95")]
    return Table(words("direct.title"), columns, rows, text=2, note=words("direct.note"))


def similarity(found: Sequence[Similarity], words: Language) -> Table:
    """How alike gradients are in length, by arm and pair."""
    rows = [[clean(x.arm), words.subject(x.subject), *words.estimate(x.mean, x.low95, x.high95)] for x in found]
    columns = [words(f"column.{name}") for name in ("arm", "subject", "mean", "ci95")]
    return Table(words("similarity.title"), columns, rows, text=2, note=words("similarity.note"))


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan
