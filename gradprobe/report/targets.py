"""``--target mAP50=0.6,precision=0.7``: what a metric is to reach."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gradprobe.errors import UsageError


def parse(given: Iterable[str]) -> dict[str, float]:
    """Metric -> value.

    Raises:
        UsageError: Not ``metric=number``, or a metric named twice.

    >>> parse(["mAP50=0.6,f1=0.5"])
    {'mAP50': 0.6, 'f1': 0.5}
    """
    found: dict[str, float] = {}
    for word in (part.strip() for text in given for part in text.split(",")):
        name, equals, value = word.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not equals or not name or not math.isfinite(number):
            raise UsageError(f"--target {word!r}: give metric=number, such as mAP50=0.6,precision=0.7.")
        if name in found:
            raise UsageError(f"--target names {name} twice ({found[name]:g} and {number:g}); leave one out.")
        found[name] = number
    return found
