"""How large a quantity is in each arm, before any comparison: whether there is anything to reduce."""

from __future__ import annotations

from collections.abc import Sequence

from gradprobe.foreign import clean
from gradprobe.messages import Language
from gradprobe.report.chart import Chart, Table
from gradprobe.report.figures.forest import Row, draw
from gradprobe.report.figures.verdicts import TOLD, label
from gradprobe.report.look import Styles
from gradprobe.verdict.answers import Level


def row(level: Level, styles: Styles, words: Language) -> Row:
    """The level as a row in the colour of its arm."""
    arm = clean(level.arm)
    return Row(
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


def chart(title: str, levels: Sequence[Level], styles: Styles, words: Language, x_title: str) -> Chart:
    """The figure, and its rows in words."""
    told = [(one, *words.estimate(one.mean, one.low95, one.high95)) for one in levels[:TOLD]]
    said = [
        words("levels.alt_row", what=label(one.arm, one.subject, words), mean=mean, span=span)
        for one, mean, span in told
    ]
    if len(levels) > TOLD:
        said.append(words("forest.alt_rest", n=len(levels) - TOLD))
    figure = draw([row(level, styles, words) for level in levels], words, x_title)
    return Chart(title, figure, words("forest.alt", title=title, said=words.join(said)))


def table(caption: str, levels: Sequence[Level], words: Language) -> Table:
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
    columns = [words(f"column.{name}") for name in ("arm", "subject", "mean", "ci95", "n")]
    return Table(caption, columns, rows, text=2)
