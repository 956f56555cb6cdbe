"""The course of training: losses, weights and cosines over steps, metrics over epochs and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradprobe.metric import BUNDLED, is_score
from gradprobe.report import bins, dots
from gradprobe.report.chart import Block, Chart, Notice, NumberTable, Panel, Section
from gradprobe.report.context import Context
from gradprobe.report.dots import Dots
from gradprobe.report.lines import Series
from gradprobe.report.study_data import RunData, StudyData


def training(context: Context) -> Section:
    """Losses, weights, cosines; convergence."""
    words, study = context.words, context.study
    blocks: list[Block] = [
        _over_steps(context, "loss", study.tasks),
        _over_steps(context, "weight", study.tasks),
        _over_steps(context, "cosine", study.pairs, within=(-1, 1)),
        *_convergence(context),
    ]
    return Section("course", words("course.title"), words("course.lead"), blocks)


def _over_steps(context: Context, quantity: str, names: Sequence[str], **axis: Any) -> Block:
    """One quantity, a chart per task or pair."""
    words, name_of = context.words, "pair" if quantity == "cosine" else "task"
    return context.line_panel(
        f"{quantity}.title",
        [words(f"{quantity}.note"), context.seeds_note(), context.thinned_note()],
        words("axis.step"),
        {name: context.series(quantity, column) for column, name in enumerate(names)},
        lambda name: words(f"{quantity}.chart", **{name_of: name}),
        lambda name: words(f"axis.{quantity}"),
        missing=f"{quantity}.missing",
        **axis,
    )


def _convergence(context: Context) -> list[Block]:
    """Steps until each arm's loss is where the reference arm's ends."""
    words, study = context.words, context.study
    reference = study.arms[0].name
    charts: list[Chart] = []
    rows: list[list[str]] = []
    for column, task in enumerate(study.tasks):
        series = context.series("loss", column)
        own = next((one for one in series if one.arm == reference), None)
        level = bins.final_level(own.values) if own is not None else float("nan")
        if not np.isfinite(level):
            continue
        found = [_dots(one, level) for one in series]
        title = words("convergence.chart", task=task, level=words.number(level))
        figure = dots.draw(found, context.styles, words, words("axis.step"), rangemode="tozero")
        charts.append(
            Chart(title, figure, words("convergence.alt", title=title, said=_convergence_in_words(context, found)))
        )
        rows += [_convergence_row(context, task, level, one) for one in found]
    if not charts:
        return [Notice("missing", words("convergence.missing"))]
    columns = words.columns("task", "level", "arm", "reached", "steps_mean", "steps_span")
    table = NumberTable(words("convergence.title"), columns, rows, text=3)
    note = words("convergence.note", arm=reference)
    return [Panel(words("convergence.title"), note, charts, table)]


def _dots(one: Series, level: float) -> Dots:
    has = np.isfinite(one.values).any(axis=0)
    return Dots(one.arm, bins.steps_to_reach(one.values, one.x, level), float(one.x[has].max()))


def _convergence_in_words(context: Context, found: list[Dots]) -> str:
    words = context.words
    return words.join(
        words("convergence.said", arm=d.arm, reached=_count(d), of=len(d.values), mean=words.number(_mean(d)))
        for d in found
    )


def _convergence_row(context: Context, task: str, level: float, one: Dots) -> list[str]:
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


_METRICS = 12


def metrics(context: Context) -> Section:
    """Metrics against targets, and their course."""
    words, study = context.words, context.study
    blocks: list[Block] = []
    names = _drawn_metrics(study)
    unknown = [name for name in study.targets if name not in names]
    if unknown:
        held = sorted({name for run in study.runs for name in (*run.epochs, *run.test)})
        blocks.append(
            Notice("warning", words("metrics.unknown", names=words.list(unknown), held=words.list(held) or "–"))
        )
    if not names:
        blocks.append(Notice("missing", words("metrics.missing")))
    else:
        blocks += _final(context, names)
        blocks.append(_over_training(context, names))
    return Section("metrics", words("metrics.title"), words("metrics.lead"), blocks)


def _drawn_metrics(study: StudyData) -> list[str]:
    """What is drawn: first those with a target, then scores within [0, 1], at most :data:`_METRICS`."""
    values: dict[str, list[float]] = {}
    for run in study.runs:
        for name, table in run.epochs.items():
            values.setdefault(name, []).extend(table[:, 1])
        for name, value in run.test.items():
            values.setdefault(name, []).append(value)
    scores = [name for name, found in values.items() if is_score(name, found)]
    wanted = [name for name in study.targets if name in values]
    known = [name for name in BUNDLED if name in scores]
    return list(dict.fromkeys([*wanted, *known, *scores]))[: max(_METRICS, len(wanted))]


def final(run: RunData, name: str, test: bool) -> float:
    """The value on the test split, or that of the last epoch; NaN: none."""
    if test:
        return run.test.get(name, float("nan"))
    table = run.epochs.get(name)
    return float(table[-1, 1]) if table is not None else float("nan")


def on_test(study: StudyData, name: str) -> bool:
    """Whether every run was evaluated on a test split: only then are all compared on it."""
    return all(name in run.test for run in study.runs)


def _final(context: Context, names: list[str]) -> list[Block]:
    words, study = context.words, context.study
    charts, rows, splits = [], [], set()
    for name in names:
        test = on_test(study, name)
        splits.add(test)
        found = [
            Dots(arm.name, np.array([final(run, name, test) for run in arm.runs]))
            for arm in study.arms
            if any(np.isfinite(final(run, name, test)) for run in arm.runs)
        ]
        if not found:
            continue
        target = study.targets.get(name)
        split = words("split.test" if test else "split.val")
        title = words(
            "metrics.chart" if target is None else "metrics.chart_target", name=name, split=split, target=target
        )
        figure = dots.draw(found, context.styles, words, "", target=target, range=_range(found, target))
        sentences = words.join(_final_in_words(context, one, target) for one in found)
        charts.append(Chart(title, figure, words("metrics.alt", title=title, said=sentences)))
        rows += [_final_row(context, name, split, one, target) for one in found]
    note = [words("metrics.note")]
    note.append(
        words("metrics.on_both" if len(splits) > 1 else "metrics.on_test" if True in splits else "metrics.on_val")
    )
    if study.controls:
        note.append(words("metrics.controls"))
    if not study.targets:
        note.append(words("metrics.no_targets"))
    columns = words.columns("metric", "split", "arm", "mean", "seeds_span", "target", "reached")
    table = NumberTable(words("metrics.table"), columns, rows, text=3)
    return [Panel(words("metrics.final"), words.join(note), charts, table, size="small")]


def _range(found: Sequence[Dots], target: float | None) -> list[float]:
    """All values and the target, with room at both ends: a line of a shape does not widen an axis by itself."""
    goal = [] if target is None else [target]
    values = np.concatenate([goal, *(one.values[np.isfinite(one.values)] for one in found)])
    room = 0.06 * (values.max() - values.min()) or 0.1
    return [float(values.min() - room), float(values.max() + room)]


def _final_in_words(context: Context, one: Dots, target: float | None) -> str:
    words, known = context.words, one.values[np.isfinite(one.values)]
    text = words("metrics.said", arm=one.arm, mean=words.number(known.mean()))
    if target is None:
        return text
    return words.join([text, words("metrics.reached", n=int((known >= target).sum()), m=len(known))])


def _final_row(context: Context, name: str, split: str, one: Dots, target: float | None) -> list[str]:
    words, known = context.words, one.values[np.isfinite(one.values)]
    span = words.span(known.min(), known.max()) if len(known) > 1 else ""
    reached = "" if target is None else words("join.n_of_m", n=int((known >= target).sum()), m=len(known))
    goal = "" if target is None else words.number(target)
    return [name, split, one.arm, words.number(known.mean()), span, goal, reached]


def _over_training(context: Context, names: list[str]) -> Block:
    words = context.words
    return context.line_panel(
        "metrics.course",
        [words("metrics.course_note"), context.seeds_note()],
        words("axis.epoch"),
        {name: context.series_from(lambda run, name=name: run.epochs.get(name)) for name in names},  # type: ignore[misc]
        str,
        str,
        missing="metrics.no_epochs",
        size="small",
        whole=True,
    )
