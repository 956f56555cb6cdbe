"""Where in the network and when: cosine by layer and time, and what single layers show."""

from __future__ import annotations

import numpy as np

from gradprobe.report.chart import Block, Notice, Panel, Section
from gradprobe.report.figures import heatmap
from gradprobe.report.sections.common import Context


def section(context: Context) -> Section:
    """A heatmap per arm and pair."""
    material, words = context.material, context.words
    blocks: list[Block] = []
    charts, drawn = [], []
    for arm in material.arms:
        if not arm.layers:
            blocks.append(Notice("missing", words("heat.no_layers", arm=arm.name)))
        elif not np.isfinite(arm.heat).any():
            blocks.append(Notice("missing", words("heat.empty", arm=arm.name)))
        else:
            drawn.append(arm)
    for arm in drawn:
        for p, pair in enumerate(material.pairs):
            if np.isfinite(arm.heat[p]).any():
                title = words("heat.chart", arm=context.named(arm.name), pair=pair)
                charts.append(heatmap.chart(title, arm, p, material.steps, words))
    if charts:
        note = [words("heat.note")]
        corrected = [arm.corrected for arm in drawn]
        key = "heat.corrected" if all(corrected) else "heat.mixed" if any(corrected) else "heat.naive"
        note += [words(key), context.thinned_note()]
        table = heatmap.table(words("heat.table"), drawn, material.pairs, words)
        wide = len(charts) == 1
        blocks.insert(0, Panel(words("heat.title"), words.join(note), charts, table, wide=wide, scale=True))
    return Section("where", words("where.title"), words("where.lead"), blocks)
