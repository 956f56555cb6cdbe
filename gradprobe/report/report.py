"""From run files and a comparison to one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gradprobe import whole_files
from gradprobe.messages import Language
from gradprobe.report import page
from gradprobe.report.chart import Section
from gradprobe.report.gather import ArmFiles, gather
from gradprobe.report.look import Styles
from gradprobe.report.sections import course, evidence, front, ledger, limits, outcome, provenance, validity, where
from gradprobe.report.sections.common import Context
from gradprobe.report.study_data import StudyData
from gradprobe.verdict.answers import Comparison
from gradprobe.whole_files import telling

SECTIONS: tuple[Callable[[Context], Section], ...] = (
    evidence.section,
    limits.section,
    where.section,
    ledger.section,
    outcome.section,
    course.section,
    validity.section,
    provenance.section,
)
"""In the order of the page; what it does not show stands right behind the evidence."""


def build(study: StudyData, comparison: Comparison, words: Language) -> page.Report:
    """The report as data, ready to be put on a page."""
    styles = Styles([arm.name for arm in study.arms], study.baseline, study.controls)
    context = Context(study, comparison, words, styles)
    first, rest = front.headline(context)
    return page.Report(
        words("page.title", headline=first.replace("`", "")),
        first,
        rest,
        front.notices(context),
        front.meta(context),
        front.cards(context),
        [make(context) for make in SECTIONS],
    )


def html(
    comparison: Comparison, arms: Sequence[ArmFiles], lang: str = "en", targets: Mapping[str, float] | None = None
) -> str:
    """The whole page.

    Args:
        comparison: What was found.
        arms: The files of each arm.
        lang: "en" or "zh-TW".
        targets: Metric -> value to reach.

    Raises:
        UsageError: There is no such language.
        RunFileError: A file cannot be read.
        MissingExtraError: plotly or jinja2 is not installed.
    """
    words = Language(lang, page=True)
    study = gather(arms, comparison.baseline or None, comparison.controls, targets, comparison.window)
    return page.render(build(study, comparison, words), words)


def write(text: str, out: Path) -> None:
    """Replace ``out`` in one step, so that nobody ever sees half of it.

    Raises:
        RunFileError: It cannot be written.
    """
    with telling(out):
        whole_files.write(out, text)
