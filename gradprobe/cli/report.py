"""`gradprobe report`: one HTML file that says what a study showed, and what it did not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from gradprobe.cli.command_options import ArmGlobs, Baseline, Controls, Paired, RunFiles
from gradprobe.cli.compare import arm_by_file
from gradprobe.errors import UsageError
from gradprobe.messages import Language

if TYPE_CHECKING:
    from gradprobe.report.study_data import ArmFiles
    from gradprobe.verdict.answers import Comparison


def report(
    files: RunFiles = None,
    out: Annotated[Path, Option(help="The HTML file; replaced if it exists.")] = Path("report.html"),
    lang: Annotated[str, Option(help="en, or zh-TW for Traditional Chinese.")] = "en",
    target: Annotated[
        list[str] | None, Option(metavar="METRIC=VALUE,...", help="What metrics are to reach: mAP50=0.6,f1=0.6.")
    ] = None,
    baseline: Baseline = "",
    control: Controls = None,
    arm: ArmGlobs = None,
    paired: Paired = None,
) -> None:
    """Write one HTML file: the verdict in words, its evidence, and what it does not show. It needs no network.

    Margins, window, pairs and metrics are as planned in the files; `gradprobe compare` takes others.

    Example: gradprobe report study/ --out report.html --lang zh-TW
    """
    from gradprobe.report.page import html, write
    from gradprobe.verdict.comparison import compare
    from gradprobe.verdict.criteria import Criteria
    from gradprobe.verdict.evidence import read

    goals = parse_targets(target or [])
    Language(lang)  # an unknown language is an error before the files are read
    named = arm_by_file(files or [], arm or [])
    evidence = {path: read(path, name) for path, name in named.items()}
    found = compare(list(evidence.values()), Criteria(baseline=baseline, controls=control or (), paired=paired))
    places = {(one.arm, one.file): path for path, one in evidence.items()}
    del evidence  # the report reads the files anew, one at a time
    write(html(found, arms(found, places), lang, goals), out)
    print(out)


def arms(found: Comparison, places: Mapping[tuple[str, str], Path]) -> list[ArmFiles]:
    """The files of each arm, by the arm's and their own names."""
    from gradprobe.report.study_data import ArmFiles

    return [ArmFiles(one.name, [places[one.name, name] for name in one.files], one.seeds) for one in found.arms]


def parse_targets(given: Iterable[str]) -> dict[str, float]:
    """Metric -> value.

    Raises:
        UsageError: Not ``metric=number``, or a metric named twice.

    >>> parse_targets(["mAP50=0.6,f1=0.5"])
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
