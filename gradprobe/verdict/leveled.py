"""How large each quantity is in each arm: whether there is anything to reduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from gradprobe.ledger.windows import Gate
from gradprobe.measures import Array
from gradprobe.messages import Message
from gradprobe.statistics import t_interval
from gradprobe.verdict import gates, questions, readings, words
from gradprobe.verdict.answers import DIRECTION, DOMINANCE, INTERFERENCE, Level, Similarity
from gradprobe.verdict.conditions import Group
from gradprobe.verdict.evidence import Evidence
from gradprobe.verdict.readings import Pair, Span


def levels(
    baseline: Group | None,
    arms: Sequence[Group],
    layers: Sequence[str],
    pairs: Sequence[Pair],
    span: Span,
    margin: float,
) -> list[Level]:
    """Mean and interval over seeds of every quantity that was measured, the baseline's first.

    Args:
        baseline, arms: The runs.
        layers: Over which; those that all tasks share in every arm that shares any.
        pairs: Ordered ones.
        span: Steps that count.
        margin: What a level is called large by.
    """
    if not layers:
        return []
    groups = [baseline, *arms] if baseline else arms
    found = [level for group in groups for level in _of(group, layers, pairs, span)]
    return [replace(level, sentence=words.of_level(level, margin)) for level in found]


def similarities(
    baseline: Group | None, arms: Sequence[Group], layers: Sequence[str], pairs: Sequence[Pair], span: Span
) -> list[Similarity]:
    """How alike the gradients of each pair are in length, in every arm that was measured; arguments as above."""
    groups = [baseline, *arms] if baseline else arms
    return [found for group in groups if layers for found in _alike(group, layers, pairs, span)]


def _alike(group: Group, layers: Sequence[str], pairs: Sequence[Pair], span: Span) -> Iterator[Similarity]:
    runs = list(group.runs.values())
    if not all(set(layers) <= readings.shared_layers(run, run.tasks) for run in runs):
        return
    for pair in _unordered(pairs):
        tasks = sorted((pair.task, pair.by), key=runs[0].tasks.index)
        estimates = [readings.estimate(run, layers, tasks, span) for run in runs]
        if any(found is None for found in estimates):
            return
        values = np.array([float(found.magnitude_similarity[0]) for found in estimates if found is not None])
        yield Similarity(group.name, "|".join(tasks), *_over_seeds(values), values.tolist(), list(group.runs))


def _unordered(pairs: Sequence[Pair]) -> list[Pair]:
    """Each pair once, whichever way round, in the order of the answers."""
    return list({frozenset((p.task, p.by)): p for p in reversed(pairs)}.values())[::-1]


def _over_seeds(values: Array) -> tuple[float, float, float]:
    """Mean and interval. NaN where a run has no number: those are no random ones, the others would be a selection."""
    if not np.isfinite(values).all():
        return math.nan, math.nan, math.nan
    mean, low, high = t_interval(values)
    return float(mean), float(low), float(high)


def _of(group: Group, layers: Sequence[str], pairs: Sequence[Pair], span: Span) -> Iterator[Level]:
    runs = list(group.runs.values())
    if not all(set(layers) <= readings.shared_layers(run, run.tasks) for run in runs):
        return
    if all(readings.stream(run) is not None for run in runs):
        for pair in _unordered(pairs):
            yield _direction(group, runs, layers, pair, span)
    if all(run.ledger for run in runs):
        for pair in pairs:
            yield _interference(group, runs, layers, pair, span)
    if all(readings.stream(run) is not None for run in runs):
        yield _dominance(group, runs, layers, span)


def _direction(group: Group, runs: list[Evidence], layers: Sequence[str], pair: Pair, span: Span) -> Level:
    tasks = sorted((pair.task, pair.by), key=runs[0].tasks.index)

    def read(run: Evidence) -> float:
        found = readings.estimate(run, layers, tasks, span)
        return math.nan if found is None else -float(found.cosine[0])

    def closing(run: Evidence) -> list[Gate]:
        samples = (gates.enough_samples([run], layers, task, span) for task in tasks)
        return [gates.self_check([run]), *samples]

    return _level(group, DIRECTION, "|".join(tasks), words.quantity(DIRECTION, *tasks), runs, read, closing)


def _interference(group: Group, runs: list[Evidence], layers: Sequence[str], pair: Pair, span: Span) -> Level:
    def read(run: Evidence) -> float:
        found = questions.cancelled(run, layers, pair, span)
        return math.nan if found is None else found

    def closing(run: Evidence) -> list[Gate]:
        return [gates.self_check([run]), gates.enough_samples([run], layers, pair.task, span, of_ledger=True)]

    what = words.quantity(INTERFERENCE, pair.task, pair.by)
    return _level(group, INTERFERENCE, pair.name, what, runs, read, closing)


def _dominance(group: Group, runs: list[Evidence], layers: Sequence[str], span: Span) -> Level:
    def read(run: Evidence) -> float:
        found = readings.dominance(run, layers, span)
        return math.nan if found is None else found.largest

    return _level(group, DOMINANCE, "largest share", words.quantity(DOMINANCE), runs, read, lambda run: [])


def _level(
    group: Group,
    question: str,
    subject: str,
    quantity: Message,
    runs: list[Evidence],
    read: Callable[[Evidence], float],
    closing: Callable[[Evidence], Sequence[Gate]],
) -> Level:
    values = np.array([read(run) if gates.passed(closing(run)) else math.nan for run in runs])
    return Level(question, group.name, subject, quantity, *_over_seeds(values), values.tolist(), list(group.runs))
