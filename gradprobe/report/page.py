"""One HTML file from a comparison and its runs: text escaped by the template, figures as JSON, no network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradprobe import __version__, whole_files
from gradprobe.errors import optional
from gradprobe.foreign import visible
from gradprobe.messages import Language
from gradprobe.report import cosine_map, course, ledger_bars, questions, validity
from gradprobe.report.chart import Chart, Figure, Notice, Section, inert
from gradprobe.report.context import Context
from gradprobe.report.forest import LOOKS
from gradprobe.report.questions import Card
from gradprobe.report.study_data import ArmFiles, StudyData, gather
from gradprobe.report.theme import DARK, LIGHT, Styles
from gradprobe.verdict.answers import Comparison
from gradprobe.whole_files import telling

__all__ = ["html", "write"]


_WHY = "gradprobe report"
_FOLDER = Path(__file__).parent
_TAGS = {"en": "en", "zh-TW": "zh-Hant-TW"}

DASHES = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}
_MARKS = {
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "square": "M-5 -5h10v10h-10z",
    "diamond": "M0 -6l6 6l-6 6l-6 -6z",
    "triangle-left": "M-6 0l11 -6v12z",
    "triangle-right": "M6 0l-11 -6v12z",
    "x": "M-5 -5l10 10M-5 5l10 -10",
}


@dataclass(frozen=True)
class Report:
    """All of the page.

    Attributes:
        title: Of the window.
        headline: The verdict in one sentence.
        answer: More of it.
        notices: What was refused.
        meta: What it rests on, name and value.
        cards: The three questions.
        sections: The rest.
    """

    title: str
    headline: str
    answer: Sequence[str]
    notices: Sequence[Notice]
    meta: Sequence[tuple[str, str]]
    cards: Sequence[Card]
    sections: Sequence[Section]


class _Numbering:
    """Numbers of panels and figures, in the order in which the template comes by them."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self._panels = 0

    def next(self) -> int:
        """The number of the next panel."""
        self._panels += 1
        return self._panels

    def figure(self, chart: Chart) -> int:
        """The number of a figure, which is kept for the end of the page."""
        self.figures.append(inert(chart.figure))
        return len(self.figures) - 1


def render(report: Report, words: Language) -> str:
    """The page as HTML.

    It loads nothing: its policy forbids any address, and any script but its own two, known by their sums.

    Raises:
        MissingExtraError: plotly or jinja2 is not installed.
    """
    jinja2 = optional("jinja2", _WHY, extra="report")
    library = optional("plotly.offline", _WHY, extra="report").get_plotlyjs()
    script = _text("page.js")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_seen,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":"), "ensure_ascii": False}
    environment.filters["code"] = code
    environment.filters["kind"] = lambda block: type(block).__name__
    markup = optional("markupsafe", _WHY, extra="report").Markup
    page: str = environment.get_template("page.html.j2").render(
        report=report,
        words=words,
        tag=_TAGS[words.lang],
        version=__version__,
        policy=policy(library, script),
        css=markup(_text("page.css")),
        light_css=markup(_variables(LIGHT)),
        dark_css=markup(_variables(DARK)),
        light=LIGHT,
        dark=DARK,
        looks=LOOKS,
        dashes=DASHES,
        marks=_MARKS,
        numbering=_Numbering(),
        library=markup(library),
        script=markup(script),
    )
    return page


def code(text: str) -> Any:
    """Text with what stands between backticks as code; escaped before anything else."""
    markupsafe = optional("markupsafe", _WHY, extra="report")
    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(visible(text)))))


def _seen(value: Any) -> Any:
    """What the template is to show: text without what turns or hides it; what is markup already stays."""
    return visible(value) if type(value) is str else value


def policy(*scripts: str) -> str:
    """The page's Content-Security-Policy: no address at all, and no script but those given."""
    sums = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    parts = {
        "default-src": "'none'",
        "script-src": sums,
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items())


def size(figures: Sequence[Figure]) -> int:
    """Bytes that figures take in the page."""
    return len(json.dumps(figures, separators=(",", ":")).encode())


def _variables(palette: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in palette.items())


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


SECTIONS: tuple[Callable[[Context], Section], ...] = (
    questions.evidence,
    validity.limits,
    cosine_map.section,
    ledger_bars.section,
    course.metrics,
    course.training,
    validity.gates_and_warnings,
    validity.provenance,
)
"""In the order of the page; what it does not show stands right behind the evidence."""


def build(study: StudyData, comparison: Comparison, words: Language) -> Report:
    """The report as data, ready to be put on a page."""
    styles = Styles([arm.name for arm in study.arms], study.baseline, study.controls)
    context = Context(study, comparison, words, styles)
    first, rest = questions.headline(context)
    return Report(
        words("page.title", headline=first.replace("`", "")),
        first,
        rest,
        context.notices("refusal", comparison.refusals),
        questions.meta(context),
        questions.cards(context),
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
    return render(build(study, comparison, words), words)


def write(text: str, out: Path) -> None:
    """Replace ``out`` in one step, so that nobody ever sees half of it.

    Raises:
        RunFileError: It cannot be written.
    """
    with telling(out):
        whole_files.write(out, text)
