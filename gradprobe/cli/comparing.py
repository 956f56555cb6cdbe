"""What ``gradprobe compare`` reads, and how it shows what was found."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradprobe.errors import RunFileError, UsageError
from gradprobe.verdict import bare as bare_table
from gradprobe.verdict.answers import QUESTIONS, Answer, Comparison
from gradprobe.verdict.conditions import GOES_BY
from gradprobe.verdict.evidence import Evidence, read

SHOWN_LAYERS = 8
INCONCLUSIVE = 11

Rows = list[list[str]]


def words(text: str) -> list[str]:
    """What commas separate.

    >>> words("cls>det, det>cls")
    ['cls>det', 'det>cls']
    """
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_window(text: str) -> tuple[int, int] | None:
    """``100:900`` as steps; empty: None.

    Raises:
        UsageError: It is not written so.
    """
    if not text:
        return None
    start, colon, stop = text.partition(":")
    try:
        found = int(start), int(stop)
    except ValueError:
        found = (0, 0)
    if not colon or not 0 <= found[0] < found[1]:
        raise UsageError(f"--window {text!r}: write the first step, a colon, and the step to stop before: 100:900.")
    return found


def gather(files: Sequence[Path], arms: Sequence[str]) -> list[Evidence]:
    """The evidence of all files, in their order, each read once; arguments and errors as of :func:`named`."""
    return [read(path, arm) for path, arm in named(files, arms).items()]


def named(files: Sequence[Path], arms: Sequence[str]) -> dict[Path, str]:
    """All files in their order, and the arm that the command line gives each; empty: as recorded.

    Args:
        files: Run files, or folders of them; their arms are as recorded.
        arms: ``NAME=GLOB``; a file that is in ``files`` too belongs to the arm that is named.

    Raises:
        UsageError: Nothing to compare, or a pattern without files.
        RunFileError: A file is missing or unreadable.
    """
    given: dict[Path, str] = {}
    for text in arms:
        name, equals, pattern = text.partition("=")
        found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - a pattern may be absolute
        if not (equals and name and found):
            raise UsageError(f"--arm {text!r}: " + ("no file matches." if equals and name else "write NAME=GLOB."))
        for path in found:
            if Path(path) in given:
                raise UsageError(f"--arm {text!r}: {path} is in arm {given[Path(path)]!r} already.")
            given[Path(path)] = name
    listed = [path for file in files for path in _files(file)] + list(given)
    every = {path.resolve(): path for path in reversed(listed)}
    if not every:
        raise UsageError("no run files. Name some, or --arm NAME=GLOB, or --csv with a bare table.")
    arm_of = {path.resolve(): name for path, name in given.items()}
    return {path: arm_of.get(place, "") for place, path in reversed(every.items())}


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.h5"))
    if not found:
        raise RunFileError(f"{path}: no run files (*.h5) in this folder.")
    return found


def bare(path: Path, as_json: bool) -> int:
    """Judge a bare table; always inconclusive.

    Raises:
        RunFileError: It cannot be read.
        DataError: It is no such table.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFileError(f"{path}: cannot be read ({error}).") from error
    found = bare_table.judge(bare_table.parse(text, path.name))
    if as_json:
        print(json.dumps(found.as_json(), indent=2, allow_nan=False))
        return INCONCLUSIVE
    print(found.headline)
    for title, lines in (("What is missing:", found.missing), ("What in the numbers misleads:", found.misleading)):
        print(f"\n{title}")
        for line in lines:
            print(f"- {line}")
    return INCONCLUSIVE


# ---- showing


def show(found: Comparison, table_format: str) -> None:
    """The verdict in words, then tables."""
    for sentence in found.headline:
        print(sentence)
    for title, lines in (
        ("Refused", found.refusals),
        ("Not as planned", found.disagreements),
        ("Warnings", found.warnings),
    ):
        _listed(title, lines)
    for title, columns, rows in tables(found):
        print()
        draw(title, columns, rows, table_format)
    _listed("To be known", list(_notes(found)))
    print(f"\n{closing(found)}")


def _listed(title: str, lines: Sequence[str]) -> None:
    if lines:
        print(f"\n{title}:")
    for line in lines:
        print(f"- {line}")


def _notes(found: Comparison) -> Iterator[str]:
    """Each note once, with the question and the arms that it is about."""
    places: dict[tuple[str, str], list[str]] = {}
    for answer in found.answers:
        for note in answer.notes:
            places.setdefault((answer.question, note), []).append(answer.arm)
    for (question, note), arms in places.items():
        every = set(arms) == {a.arm for a in found.of(question)}
        yield f"{question}: {note}" if every else f"{question}, {', '.join(dict.fromkeys(arms))}: {note}"


def closing(found: Comparison) -> str:
    """What holds for all of it."""
    steps = f"steps {found.window[0]} to {found.window[1]}" if found.window else "all steps"
    planned = "fixed before the runs" if found.plan else "chosen now, and not before the runs"
    if any(GOES_BY in line for line in found.disagreements):
        planned += ", but for what is not as planned"
    how = "paired by seed" if found.paired else "as independent runs"
    over = f"Over {len(found.common_layers)} shared layers and {steps}, {how}. " if found.answers else ""
    return (
        f"{over}Margins, window and pairs were {planned}. "
        "Below 0 is a fall; intervals are of 95 %, over seeds. Training loss is no part of any verdict."
    )


def tables(found: Comparison) -> Iterator[tuple[str, list[str], Rows]]:
    """Title, columns and rows."""
    for question in QUESTIONS:
        answers = found.of(question)
        if answers:
            columns = ["arm", "subject", "verdict", "arm - baseline", "95 %", "margin", "p (Holm, one-sided)", "seeds"]
            yield question.capitalize(), columns, [_answer(a) for a in answers]
    if found.answers:
        yield "Why", ["arm", "question", "subject", "reason"], [_why(a) for a in found.answers]
    levels = [[x.arm, x.question, x.subject, _number(x.mean), _interval(x.low95, x.high95)] for x in found.levels]
    if levels:
        yield "How large it is in each arm", ["arm", "question", "subject", "mean", "95 %"], levels
    direct = [
        [a.arm, a.subject, _number(a.direct.effect), _interval(a.direct.low95, a.direct.high95), _number(a.effect)]
        for a in found.answers
        if a.direct is not None
    ]
    if direct:
        yield (
            "Direct effect (weights, at the baseline's checkpoints) beside the total one (along each training)",
            ["arm", "subject", "direct", "95 %", "total"],
            direct,
        )
    alike = [[x.arm, x.subject, _number(x.mean), _interval(x.low95, x.high95)] for x in found.similarities]
    if alike:
        yield "Magnitude similarity of the gradients (1: equally long)", ["arm", "subject", "mean", "95 %"], alike
    ranked = sorted((x for x in found.layers if math.isfinite(x.p)), key=lambda x: x.p)[:SHOWN_LAYERS]
    if ranked:
        yield (
            "Layers that changed most (exploratory)",
            ["layer", "arm", "question", "subject", "arm - baseline", "95 %", "discovery"],
            [
                [
                    x.layer,
                    x.arm,
                    x.question,
                    x.subject,
                    _number(x.effect),
                    _interval(x.low95, x.high95),
                    _yes(x.discovery),
                ]
                for x in ranked
            ],
        )


def _answer(a: Answer) -> list[str]:
    p = min((x for x in (a.p_zero_holm, a.p_increased_holm) if math.isfinite(x)), default=math.nan)
    return [
        a.arm,
        a.subject,
        a.verdict,
        _number(a.effect),
        _interval(a.low95, a.high95),
        f"{a.margin:g}",
        f"{p:.3g}" if math.isfinite(p) else "-",
        str(a.n),
    ]


def _why(a: Answer) -> list[str]:
    return [a.arm, a.question, a.subject, a.reason]


def _number(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "-"


def _interval(low: float, high: float) -> str:
    return f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) and math.isfinite(high) else "-"


def _yes(value: bool) -> str:
    return "yes" if value else ""


def draw(title: str, columns: Sequence[str], rows: Rows, table_format: str) -> None:
    """Print one table."""
    if table_format == "md":
        print(f"**{title}**\n")
        for cells in (columns, ["---"] * len(columns), *rows):
            print(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        return
    from rich import box
    from rich.table import Table

    from gradprobe.cli.console import stdout

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    stdout().print(table)
