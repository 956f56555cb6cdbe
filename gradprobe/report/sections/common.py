"""What sections share: the arms' legend, and what they know of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradprobe.messages import Language
from gradprobe.report.chart import Key
from gradprobe.report.figures.lines import Series
from gradprobe.report.look import Styles
from gradprobe.report.study_data import ArmData, StudyData
from gradprobe.verdict.answers import Comparison


@dataclass(frozen=True)
class Context:
    """All that a section is made of."""

    study: StudyData
    comparison: Comparison
    words: Language
    styles: Styles

    def legend(self, arms: Sequence[ArmData] | None = None) -> list[Key]:
        """The arms, as lines of figures show them."""
        names = [arm.name for arm in (self.study.arms if arms is None else arms)]
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
