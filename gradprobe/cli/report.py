"""`gradprobe report`: one HTML file that says what a study showed, and what it did not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

if TYPE_CHECKING:
    from gradprobe.report.study_data import ArmFiles
    from gradprobe.verdict.answers import Comparison


def report(
    files: Annotated[list[Path] | None, typer.Argument(help="Run files, or folders of them.")] = None,
    out: Annotated[Path, Option(help="The HTML file; replaced if it exists.")] = Path("report.html"),
    lang: Annotated[str, Option(help="en, or zh-TW for Traditional Chinese.")] = "en",
    target: Annotated[
        list[str] | None, Option(metavar="METRIC=VALUE,...", help="What metrics are to reach: mAP50=0.6,f1=0.6.")
    ] = None,
    baseline: Annotated[
        str, Option(help="The arm that others are compared with. [default: as planned, or joint]")
    ] = "",
    control: Annotated[
        list[str] | None, Option(help="An arm that trains one task alone. [default: those of --trainer single]")
    ] = None,
    arm: Annotated[list[str] | None, Option(metavar="NAME=GLOB", help="The files of an arm, by name.")] = None,
    paired: Annotated[
        bool | None,
        Option("--paired/--unpaired", help="Runs of one seed belong together, or not. [default: if the files show it]"),
    ] = None,
) -> None:
    """Write one HTML file: the verdict in words, its evidence, and what it does not show. It needs no network.

    Margins, window, pairs and metrics are as planned in the files; `gradprobe compare` takes others.

    Example: gradprobe report study/ --out report.html --lang zh-TW
    """
    from gradprobe.cli import comparing
    from gradprobe.messages import Language
    from gradprobe.report.page import html, write
    from gradprobe.report.targets import parse
    from gradprobe.verdict.comparison import compare
    from gradprobe.verdict.evidence import read
    from gradprobe.verdict.options import Options

    goals = parse(target or [])
    Language(lang)  # an unknown language is told before the files are read
    named = comparing.named(files or [], arm or [])
    evidence = {path: read(path, name) for path, name in named.items()}
    found = compare(list(evidence.values()), Options(baseline=baseline, controls=control or (), paired=paired))
    places = {(one.arm, one.file): path for path, one in evidence.items()}
    del evidence  # the report reads the files anew, one at a time
    write(html(found, arms(found, places), lang, goals), out)
    print(out)


def arms(found: Comparison, places: Mapping[tuple[str, str], Path]) -> list[ArmFiles]:
    """The files of each arm, by the arm's and their own names."""
    from gradprobe.report.study_data import ArmFiles

    return [ArmFiles(one.name, [places[one.name, name] for name in one.files], one.seeds) for one in found.arms]
