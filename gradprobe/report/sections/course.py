"""The course of training: losses, weights and cosines over steps, and how soon a level is reached."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gradprobe.report import convergence
from gradprobe.report.chart import Block, Chart, Notice, Panel, Section, Table
from gradprobe.report.figures import dots, lines
from gradprobe.report.figures.dots import Dots
from gradprobe.report.figures.lines import Series
from gradprobe.report.sections.common import Context


def section(context: Context) -> Section:
    """Losses, weights, cosines; convergence."""
    words, study = context.words, context.study
    blocks: list[Block] = [
        _panel(context, "loss", study.tasks, lambda task: words("loss.chart", task=task)),
        _panel(context, "weight", study.tasks, lambda task: words("weight.chart", task=task)),
        _panel(context, "cosine", study.pairs, lambda pair: words("cosine.chart", pair=pair), (-1, 1)),
        *_convergence(context),
    ]
    return Section("course", words("course.title"), words("course.lead"), blocks)


def _panel(
    context: Context,
    quantity: str,
    names: tuple[str, ...],
    title: Callable[[str], str],
    within: tuple[float, float] | None = None,
) -> Block:
    """One quantity, a chart per task or pair."""
    words = context.words
    charts, named = [], []
    for column, name in enumerate(names):
        series = context.series(quantity, column)
        if series:
            named.append((name, series))
            y_title = words(f"axis.{quantity}")
            charts.append(
                lines.chart(title(name), series, context.styles, words, words("axis.step"), y_title, within=within)
            )
    if not charts:
        return Notice("missing", words(f"{quantity}.missing"))
    note = words.join([words(f"{quantity}.note"), context.seeds_note(), context.thinned_note()])
    table = lines.table(words(f"{quantity}.title"), named, words, words("axis.step"))
    return Panel(words(f"{quantity}.title"), note, charts, table, context.legend())


def _convergence(context: Context) -> list[Block]:
    """Steps until each arm's loss is where the reference arm's ends."""
    words, study = context.words, context.study
    reference = study.arms[0].name
    charts: list[Chart] = []
    rows: list[list[str]] = []
    for column, task in enumerate(study.tasks):
        series = context.series("loss", column)
        own = next((one for one in series if one.arm == reference), None)
        level = convergence.final_level(own.values) if own is not None else float("nan")
        if not np.isfinite(level):
            continue
        found = [_dots(one, level) for one in series]
        title = words("convergence.chart", task=task, level=words.number(level))
        figure = dots.draw(found, context.styles, words, words("axis.step"), rangemode="tozero")
        charts.append(Chart(title, figure, words("convergence.alt", title=title, said=_said(context, found))))
        rows += [_told(context, task, level, one) for one in found]
    if not charts:
        return [Notice("missing", words("convergence.missing"))]
    names = ("task", "level", "arm", "reached", "steps_mean", "steps_span")
    table = Table(words("convergence.title"), [words(f"column.{name}") for name in names], rows, text=3)
    note = words("convergence.note", arm=reference)
    return [Panel(words("convergence.title"), note, charts, table)]


def _dots(one: Series, level: float) -> Dots:
    has = np.isfinite(one.values).any(axis=0)
    return Dots(one.arm, convergence.reached(one.values, one.x, level), float(one.x[has].max()))


def _said(context: Context, found: list[Dots]) -> str:
    words = context.words
    return words.join(
        words("convergence.said", arm=d.arm, reached=_count(d), of=len(d.values), mean=words.number(_mean(d)))
        for d in found
    )


def _told(context: Context, task: str, level: float, one: Dots) -> list[str]:
    words = context.words
    known = one.values[np.isfinite(one.values)]
    span = words.span(known.min(), known.max()) if len(known) > 1 else ""
    reached = words("join.n_of_m", n=len(known), m=len(one.values))
    return [task, words.number(level), one.arm, reached, words.number(_mean(one)), span]


def _count(one: Dots) -> int:
    return int(np.isfinite(one.values).sum())


def _mean(one: Dots) -> float:
    known = one.values[np.isfinite(one.values)]
    return float(known.mean().round()) if len(known) else float("nan")
