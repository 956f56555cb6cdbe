"""Where in the network and when: cosine by layer and time, and what single layers show."""

from __future__ import annotations

import numpy as np

from gradprobe.foreign import clean
from gradprobe.report import bins
from gradprobe.report.chart import Block, Notice, Panel, Section, Table
from gradprobe.report.figures import heatmap
from gradprobe.report.sections.common import Context

LAYERS = 40
"""Single layers in the table at most: discoveries first, then by p-value."""


def section(context: Context) -> Section:
    """A heatmap per arm and pair."""
    study, words = context.study, context.words
    blocks: list[Block] = []
    charts, drawn = [], []
    for arm in study.arms:
        if not arm.layers:
            blocks.append(Notice("missing", words("heat.no_layers", arm=arm.name)))
        elif not np.isfinite(arm.heat).any():
            blocks.append(Notice("missing", words("heat.empty", arm=arm.name)))
        else:
            drawn.append(arm)
    for arm in drawn:
        for p, pair in enumerate(study.pairs):
            if np.isfinite(arm.heat[p]).any():
                title = words("heat.chart", arm=context.named(arm.name), pair=pair)
                charts.append(heatmap.chart(title, arm, p, bins.centres(study.heat_borders), words))
    if charts:
        note = [words("heat.note")]
        corrected = [arm.corrected for arm in drawn]
        key = "heat.corrected" if all(corrected) else "heat.mixed" if any(corrected) else "heat.naive"
        note += [words(key), context.thinned_note("heat.bins")]
        table = heatmap.table(words("heat.table"), drawn, study.pairs, words)
        blocks.insert(
            0,
            Panel(
                words("heat.title"),
                words.join(note),
                charts,
                table,
                size="wide" if len(charts) == 1 else "half",
                scale=True,
            ),
        )
    if context.comparison.layers:
        blocks.append(_single(context))
    return Section("where", words("where.title"), words("where.lead"), blocks)


def _single(context: Context) -> Table:
    """Layers one by one: exploratory."""
    words, layers = context.words, context.comparison.layers
    ranked = sorted(layers, key=lambda one: (not one.discovery, not np.isfinite(one.p), one.p))
    rows = [
        [
            words(f"question.{one.question}"),
            clean(one.arm),
            words.subject(one.subject),
            clean(one.layer),
            words("layers.yes" if one.discovery else "layers.no"),
            *words.estimate(one.effect, one.low95, one.high95, signed=True),
            words.p_value(one.p),
        ]
        for one in ranked[:LAYERS]
    ]
    names = ("question", "arm", "subject", "layer", "discovery", "effect", "ci95", "p")
    note = [words("layers.note")]
    if len(ranked) > LAYERS:
        note.append(words("table.cut_plain", shown=LAYERS, of=len(ranked)))
    return Table(words("layers.title"), [words(f"column.{n}") for n in names], rows, text=5, note=words.join(note))
