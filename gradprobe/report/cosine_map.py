"""Where in the network and when: the cosine between two tasks' gradients by layer and time."""

from __future__ import annotations

import math

import numpy as np

from gradprobe.foreign import clean
from gradprobe.messages import Language
from gradprobe.report import bins
from gradprobe.report.bins import Array, Floats, quietly
from gradprobe.report.chart import Block, Chart, Figure, Notice, NumberTable, Panel, Section, in_short, numbers
from gradprobe.report.context import Context
from gradprobe.report.study_data import ArmData
from gradprobe.report.theme import DIVERGING, axis, figure

_ROWS = 120
"""Rows of cells at most; of more layers, so many neighbours stand for one another by their median."""

_TABLE_ROWS = 160


def fold(layers: tuple[str, ...], values: Floats) -> tuple[list[str], Floats]:
    """At most :data:`_ROWS` rows of (L, B) values, with their names: neighbouring layers are put together."""
    per_row = max(1, math.ceil(len(layers) / _ROWS))
    if per_row == 1:
        return list(layers), values
    starts = range(0, len(layers), per_row)
    names = [f"{layers[i]} … {layers[min(i + per_row, len(layers)) - 1]}" for i in starts]
    return names, np.stack([quietly(np.nanmedian, values[i : i + per_row]) for i in starts]).astype(np.float32)


def draw(layers: tuple[str, ...], values: Floats, steps: Array, words: Language) -> Figure:
    """(L, B) cosines as cells, the first layer on top, on [-1, 1]."""
    names, cells = fold(layers, values)
    short = in_short(names, 16)
    height = int(np.clip(8 * len(names) + 70, 170, 620))
    every = max(1, math.ceil(len(names) * 12 / (height - 60)))
    data = [
        {
            "type": "heatmap",
            "x": numbers(steps, 6),
            "y": list(range(len(names))),
            "z": numbers(cells, 3),
            "customdata": [[name] * len(steps) for name in names],
            "zmin": -1,
            "zmax": 1,
            "colorscale": DIVERGING,
            "showscale": False,
            "hoverongaps": False,
            "xgap": 0,
            "hovertemplate": "%{customdata}<br>"
            + words("heat.hover", step="%{x:.0f}", cosine="%{z:.3f}")
            + "<extra></extra>",
        }
    ]
    ticks = list(range(0, len(names), every))
    y = axis(
        "",
        autorange="reversed",
        tickvals=ticks,
        ticktext=[short[i] for i in ticks],
        tickfont={"size": 10},
        showgrid=False,
        zeroline=False,
    )
    x = axis(words("axis.step"), showgrid=False, zeroline=False, nticks=6)
    return figure(data, x, y, height, hovermode="closest", plot_bgcolor="@surface")


def _chart(title: str, arm: ArmData, pair: int, steps: Array, words: Language) -> Chart:
    """One arm's heatmap of one pair, with its lowest and highest layers in words."""
    values = arm.heat[pair]
    middle = quietly(np.nanmedian, values.T)
    order = [i for i in np.argsort(middle, kind="stable") if np.isfinite(middle[i])]
    if not order:
        text = words("heat.alt_empty", title=title)
    else:
        low, high = order[0], order[-1]
        text = words(
            "heat.alt",
            title=title,
            layers=len(arm.layers),
            low=arm.layers[low],
            low_value=words.signed(middle[low]),
            high=arm.layers[high],
            high_value=words.signed(middle[high]),
        )
    return Chart(title, draw(arm.layers, values, steps, words), text)


def _table(caption: str, arms: list[ArmData], pairs: tuple[str, ...], words: Language) -> NumberTable:
    """Per arm, pair and layer the median of the first and last third and of all; long ones in part, the lowest."""
    rows = []
    for arm in arms:
        for p, pair in enumerate(pairs):
            thirds = np.array_split(arm.heat[p], 3, axis=1) if arm.heat.shape[2] >= 3 else [arm.heat[p]] * 3
            parts = [quietly(np.nanmedian, part.T) for part in (arm.heat[p], thirds[0], thirds[2])]
            for i, layer in enumerate(arm.layers):
                if np.isfinite(parts[0][i]):
                    rows.append((parts[0][i], [arm.name, pair, layer, *(words.signed(v[i]) for v in parts)]))
    note = ""
    if len(rows) > _TABLE_ROWS:
        note = words("table.cut", shown=_TABLE_ROWS, of=len(rows))
        rows = sorted(rows, key=lambda row: row[0])[:_TABLE_ROWS]
    titles = words.columns("arm", "pair", "layer", "median", "first_third", "last_third")
    return NumberTable(caption, titles, [cells for _, cells in rows], text=3, note=note)


_LAYERS = 40
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
                charts.append(_chart(title, arm, p, bins.centres(study.heat_borders), words))
    if charts:
        note = [words("heat.note")]
        corrected = [arm.corrected for arm in drawn]
        key = "heat.corrected" if all(corrected) else "heat.mixed" if any(corrected) else "heat.naive"
        note += [words(key), context.thinned_note("heat.bins")]
        table = _table(words("heat.table"), drawn, study.pairs, words)
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


def _single(context: Context) -> NumberTable:
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
        for one in ranked[:_LAYERS]
    ]
    columns = words.columns("question", "arm", "subject", "layer", "discovery", "effect", "ci95", "p")
    note = [words("layers.note")]
    if len(ranked) > _LAYERS:
        note.append(words("table.cut_plain", shown=_LAYERS, of=len(ranked)))
    return NumberTable(words("layers.title"), columns, rows, text=5, note=words.join(note))
