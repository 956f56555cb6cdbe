"""What a check of a data set says: findings, and counts per split and class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

_Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a data set."""

    severity: _Severity
    file: str  # relative to the data set's root where it lies inside it
    line: int | None  # counted from 1; None where the file as a whole is meant
    message: str
    kind: str = ""  # of which there may be hundreds; empty: shown in any case
    size: int = 0  # images concerned, to show the worst of a kind first

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.message}"


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Those that keep a data set from being trained on."""
    return [finding for finding in findings if finding.severity == "error"]


def warnings(findings: Iterable[Finding]) -> list[Finding]:
    """Those that training can live with."""
    return [finding for finding in findings if finding.severity == "warning"]


def condensed(findings: Iterable[Finding], most: int | None) -> Iterator[Finding | str]:
    """The worst of each kind, and how many more there are of it.

    Args:
        findings: All.
        most: So many of a kind at most; None: all.
    """
    kinds: dict[str, list[Finding]] = {}
    for place, finding in enumerate(findings):
        kinds.setdefault(finding.kind or f"alone {place}", []).append(finding)
    for alike in kinds.values():
        worst = sorted(alike, key=lambda finding: -finding.size)
        yield from worst[:most]
        if more := len(worst[most:]) if most is not None else 0:
            yield f"and {more} more like the last"


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
