"""What every section of a report is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gradprobe.messages import Language, Message
from gradprobe.report import lines
from gradprobe.report.bins import Array
from gradprobe.report.chart import Block, Key, Notice, Panel
from gradprobe.report.lines import Series
from gradprobe.report.study_data import RunData, StudyData
from gradprobe.report.theme import Styles
from gradprobe.verdict.answers import Comparison


@dataclass(frozen=True)
class Context:
    """All that a section is made of."""

    study: StudyData
    comparison: Comparison
    words: Language
    styles: Styles

    def legend(self) -> list[Key]:
        """The arms, as lines of figures show them."""
        names = [arm.name for arm in self.study.arms]
        return [Key(name, self.named(name), self.styles.colour(name), self.styles.dash(name)) for name in names]

    def named(self, arm: str) -> str:
        """An arm's name, and whether it is the baseline or a control."""
        if arm == self.study.baseline:
            return self.words("arm.baseline", arm=arm)
        return self.words("arm.control", arm=arm) if arm in self.study.controls else arm

    def series(self, quantity: str, column: int) -> list[Series]:
        """Of "loss", "weight" or "cosine" for one task or pair: the arms that have a value."""
        found = [Series(arm.name, self.study.steps, arm.stack(quantity, column)) for arm in self.study.arms]
        return [one for one in found if np.isfinite(one.values).any()]

    def series_from(self, table_of: Callable[[RunData], Array | None]) -> list[Series]:
        """A series per arm from tables (n, 2) of x and value, over the x of any of its runs; None: a run has none."""
        found = []
        for arm in self.study.arms:
            tables = [table for table in map(table_of, arm.runs) if table is not None]
            x = np.unique(np.concatenate([table[:, 0] for table in tables] or [np.zeros(0)]))
            values = np.full((len(tables), len(x)), np.nan)
            for i, table in enumerate(tables):
                values[i, np.searchsorted(x, table[:, 0])] = table[:, 1]
            if np.isfinite(values).any():
                found.append(Series(arm.name, x, values))
        return found

    def line_panel(
        self,
        key: str,
        note: Iterable[str],
        x_title: str,
        series: dict[str, list[Series]],
        chart_title: Callable[[str], str],
        y_title: Callable[[str], str],
        *,
        missing: str,
        size: Literal["half", "small"] = "half",
        **axis: Any,
    ) -> Block:
        """A chart of lines for each task, pair or metric, and their table; a notice where none has a value.

        Args:
            key: Of the panel's title.
            note: Sentences on how to read it.
            x_title: Title of the horizontal axes.
            series: Task, pair or metric -> a series per arm; those without any are left out.
            chart_title, y_title: Task, pair or metric -> titles of its chart and of the vertical axis.
            missing: Key of the notice.
            size: Of a chart.
            axis: As for :func:`gradprobe.report.lines.draw`.
        """
        words, known = self.words, {name: found for name, found in series.items() if found}
        if not known:
            return Notice("missing", words(missing))
        charts = [
            lines.chart(chart_title(name), found, self.styles, words, x_title, y_title(name), **axis)
            for name, found in known.items()
        ]
        table = lines.table(words(key), known, words, x_title)
        return Panel(words(key), words.join(note), charts, table, self.legend(), size=size)

    def notices(self, kind: Literal["warning", "refusal"], messages: Iterable[Message]) -> list[Notice]:
        """Messages of the comparison as notices, each once."""
        return [Notice(kind, self.words.say(message)) for message in dict.fromkeys(messages)]

    def seeds_note(self) -> str:
        """How a line and its band come about."""
        several = any(len(arm.runs) > 1 for arm in self.study.arms)
        return self.words("note.band" if several else "note.one_seed")

    def thinned_note(self, key: str = "note.bins") -> str:
        """How long runs were looked at, in lines or ("heat.bins") in heatmaps."""
        every = max(run.every for run in self.study.runs)
        borders = self.study.borders if key == "note.bins" else self.study.heat_borders
        text = self.words(key, bins=len(borders) - 1)
        return self.words.join([text, self.words("note.thin", every=every)]) if every > 1 else text
