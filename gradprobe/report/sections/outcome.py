"""What came of it: metrics at the end against targets, and over epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gradprobe.metric import BUNDLED, is_score
from gradprobe.report.chart import Block, Chart, Notice, Panel, Section, Table
from gradprobe.report.figures import dots, lines
from gradprobe.report.figures.dots import Dots
from gradprobe.report.figures.lines import Series
from gradprobe.report.sections.common import Context
from gradprobe.report.study_data import RunData, StudyData

METRICS = 12


def section(context: Context) -> Section:
    """Metrics against targets, and their course."""
    words, study = context.words, context.study
    blocks: list[Block] = []
    names = metrics(study)
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
        blocks += _course(context, names)
    return Section("metrics", words("metrics.title"), words("metrics.lead"), blocks)


def metrics(study: StudyData) -> list[str]:
    """What is drawn: first those with a target, then scores within [0, 1], at most :data:`METRICS`."""
    values: dict[str, list[float]] = {}
    for run in study.runs:
        for name, table in run.epochs.items():
            values.setdefault(name, []).extend(table[:, 1])
        for name, value in run.test.items():
            values.setdefault(name, []).append(value)
    scores = [name for name, found in values.items() if is_score(name, found)]
    wanted = [name for name in study.targets if name in values]
    known = [name for name in BUNDLED if name in scores]
    return list(dict.fromkeys([*wanted, *known, *scores]))[: max(METRICS, len(wanted))]


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
        said = words.join(_said(context, one, target) for one in found)
        charts.append(Chart(title, figure, words("metrics.alt", title=title, said=said)))
        rows += [_told(context, name, split, one, target) for one in found]
    note = [words("metrics.note")]
    note.append(
        words("metrics.on_both" if len(splits) > 1 else "metrics.on_test" if True in splits else "metrics.on_val")
    )
    if study.controls:
        note.append(words("metrics.controls"))
    if not study.targets:
        note.append(words("metrics.no_targets"))
    columns = [words(f"column.{n}") for n in ("metric", "split", "arm", "mean", "seeds_span", "target", "reached")]
    table = Table(words("metrics.table"), columns, rows, text=3)
    return [Panel(words("metrics.final"), words.join(note), charts, table, size="small")]


def _range(found: Sequence[Dots], target: float | None) -> list[float]:
    """All values and the target, with room at both ends: a line of a shape does not widen an axis by itself."""
    goal = [] if target is None else [target]
    values = np.concatenate([goal, *(one.values[np.isfinite(one.values)] for one in found)])
    room = 0.06 * (values.max() - values.min()) or 0.1
    return [float(values.min() - room), float(values.max() + room)]


def _said(context: Context, one: Dots, target: float | None) -> str:
    words, known = context.words, one.values[np.isfinite(one.values)]
    text = words("metrics.said", arm=one.arm, mean=words.number(known.mean()))
    if target is None:
        return text
    return words.join([text, words("metrics.reached", n=int((known >= target).sum()), m=len(known))])


def _told(context: Context, name: str, split: str, one: Dots, target: float | None) -> list[str]:
    words, known = context.words, one.values[np.isfinite(one.values)]
    span = words.span(known.min(), known.max()) if len(known) > 1 else ""
    reached = "" if target is None else words("join.n_of_m", n=int((known >= target).sum()), m=len(known))
    goal = "" if target is None else words.number(target)
    return [name, split, one.arm, words.number(known.mean()), span, goal, reached]


def _course(context: Context, names: list[str]) -> list[Block]:
    words = context.words
    charts, named = [], []
    for name in names:
        series = _over_epochs(context, lambda run, name=name: run.epochs.get(name))  # type: ignore[misc]
        if series:
            named.append((name, series))
            charts.append(lines.chart(name, series, context.styles, words, words("axis.epoch"), name, whole=True))
    if not charts:
        return [Notice("missing", words("metrics.no_epochs"))]
    table = lines.table(words("metrics.course"), named, words, words("axis.epoch"))
    note = words.join([words("metrics.course_note"), context.seeds_note()])
    return [Panel(words("metrics.course"), note, charts, table, context.legend(), size="small")]


def _over_epochs(context: Context, get: Callable[[RunData], np.ndarray | None]) -> list[Series]:
    """A series per arm over the epochs of any of its runs."""
    found = []
    for arm in context.study.arms:
        tables = [t for t in map(get, arm.runs) if t is not None]
        if not tables:
            continue
        epochs = np.unique(np.concatenate([t[:, 0] for t in tables]))
        values = np.full((len(tables), len(epochs)), np.nan)
        for i, t in enumerate(tables):
            values[i, np.searchsorted(epochs, t[:, 0])] = t[:, 1]
        found.append(Series(arm.name, epochs, values))
    return found
