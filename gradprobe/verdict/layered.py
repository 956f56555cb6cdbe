"""Layer by layer, after the trunk: exploratory. It says where to look, and proves nothing of any one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from gradprobe.measures import Array
from gradprobe.statistics import benjamini_hochberg
from gradprobe.verdict import readings
from gradprobe.verdict.answers import DIRECTION, INTERFERENCE, Answer, LayerAnswer
from gradprobe.verdict.evidence import Evidence
from gradprobe.verdict.layers import FALSE_DISCOVERIES
from gradprobe.verdict.questions import Sides
from gradprobe.verdict.readings import Pair


def exploratory(laid: Sequence[Sides], answers: Sequence[Answer]) -> list[LayerAnswer]:
    """Every layer of the questions that a rule has answered for the trunk.

    Args:
        laid: Arms beside the baseline.
        answers: Of the trunk.
    """
    found = [one for s in laid for answer in answers if answer.arm == s.arm for one in _layers(s, answer)]
    if not found:
        return []
    discoveries = benjamini_hochberg([one.p for one in found], FALSE_DISCOVERIES)
    return [replace(one, discovery=bool(yes)) for one, yes in zip(found, discoveries, strict=True)]


def _layers(s: Sides, answer: Answer) -> Iterator[LayerAnswer]:
    if answer.rule is None:
        return
    if answer.question == DIRECTION:
        tasks = answer.subject.split("|")
        layers = s.layers(tasks)
        values = [np.array([_opposition(run, layers, tasks, s) for run in side]) for side in (s.baseline, s.treated)]
    elif answer.question == INTERFERENCE:
        by, _, task = answer.subject.partition(">")
        layers = s.layers((task, by))
        values = [
            np.array([_cancelled(run, layers, Pair(task, by), s) for run in side]) for side in (s.baseline, s.treated)
        ]
    else:
        return
    yield from _compared(s, answer, layers, *values)


def _compared(
    s: Sides, answer: Answer, layers: Sequence[str], baseline: Array, treated: Array
) -> Iterator[LayerAnswer]:
    contrast = s.contrast(baseline.T, treated.T)
    low, high = contrast.interval()
    p = 2 * np.minimum(contrast.p_below(0.0), contrast.p_above(0.0))
    for place, name in enumerate(layers):
        effect, down, up, chance = (float(one[place]) for one in (contrast.effect, low, high, p))
        yield LayerAnswer(answer.question, s.arm, answer.subject, name, effect, down, up, chance, discovery=False)


def _opposition(run: Evidence, layers: Sequence[str], tasks: Sequence[str], s: Sides) -> Array:
    """(L',) in the order of ``layers``; NaN where a gradient on the layer cannot be told from noise."""
    found = readings.estimate(run, layers, tasks, s.span, apart=True)
    assert found is not None
    own = [run.layers[i] for i in readings.places(run, layers)]
    order = [own.index(name) for name in layers]
    result: Array = -found.cosine[order, 0]
    return result


def _cancelled(run: Evidence, layers: Sequence[str], pair: Pair, s: Sides) -> Array:
    found = readings.ledger(run, layers, s.span)
    assert found is not None
    return readings.ledger_by_layer(run, found, pair, layers)
