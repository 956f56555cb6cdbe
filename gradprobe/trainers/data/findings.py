"""What a check of a data set says: findings, and counts per split and class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a data set."""

    severity: Severity
    file: str  # relative to the data set's root where it lies inside it
    line: int | None  # counted from 1; None where the file as a whole is meant
    message: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.message}"


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Those that keep a data set from being trained on."""
    return [finding for finding in findings if finding.severity == "error"]


def warnings(findings: Iterable[Finding]) -> list[Finding]:
    """Those that training can live with."""
    return [finding for finding in findings if finding.severity == "warning"]


@dataclass
class SplitCounts:
    """Counts of one split. Boxes and classes are counted in images without an error only."""

    images: int = 0  # listed
    bad: int = 0  # with an error; left out by skip_bad
    background: int = 0  # without a box
    no_image_class: int = 0  # left out of training: both tasks have to see the same images
    boxes: dict[str, int] = field(default_factory=dict)  # by box class
    image_classes: dict[str, int] = field(default_factory=dict)  # images by image class

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "images": self.images,
            "bad": self.bad,
            "background": self.background,
            "no_image_class": self.no_image_class,
            "boxes": dict(self.boxes),
            "image_classes": dict(self.image_classes),
        }
