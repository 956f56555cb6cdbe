"""What ``gradprobe compare`` reads, and how it shows what was found."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradprobe.errors import RunFileError, UsageError
from gradprobe.messages import ENGLISH as SAY
from gradprobe.messages import Message
from gradprobe.verdict import bare as bare_table
from gradprobe.verdict.answers import QUESTIONS, Answer, Comparison, plain
from gradprobe.verdict.conditions import GOES_BY
from gradprobe.verdict.evidence import Evidence, read

_SHOWN_LAYERS = 8
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
        print(json.dumps(plain(found), indent=2, allow_nan=False))
        return INCONCLUSIVE
    print(found.headline)
    _listed(SAY("bare.missing"), found.missing)
    _listed(SAY("bare.misleading"), found.misleading)
    return INCONCLUSIVE


# ---- showing


def show(found: Comparison, table_format: str) -> None:
    """The verdict in words, then tables."""
    for sentence in found.headline:
        print(sentence)
    for key, lines in (
        ("compare.refused", found.refusals),
        ("compare.not_planned", found.disagreements),
        ("compare.warnings", found.warnings),
    ):
        _listed(SAY(key), lines)
    for title, columns, rows in tables(found):
        print()
        draw(title, columns, rows, table_format)
    _listed(SAY("compare.known"), list(_remarks(found)))
    print(f"\n{closing(found)}")


def _listed(title: str, lines: Sequence[Message]) -> None:
    if lines:
        print(f"\n{title}")
    for line in lines:
        print(f"- {line}")


def _remarks(found: Comparison) -> Iterator[Message]:
    """Each remark once, with the question and the arms that it is about."""
    places: dict[tuple[str, Message], list[str]] = {}
    for answer in found.answers:
        for note in answer.notes:
            places.setdefault((answer.question, note), []).append(answer.arm)
    if any(answer.direct is not None for answer in found.answers):
        yield Message("direct.note")
    if found.similarities:
        yield Message("similarity.note")
    for (name, note), arms in places.items():
        question = Message(f"question.{name}")
        if set(arms) == {a.arm for a in found.of(name)}:
            yield Message("compare.remark", question=question, remark=note)
        else:
            yield Message("compare.remark_of", question=question, arms=list(dict.fromkeys(arms)), remark=note)


def closing(found: Comparison) -> str:
    """What holds for all of it."""
    steps = Message("closing.all_steps")
    if found.window:
        steps = Message("closing.steps", start=found.window[0], stop=found.window[1])
    over = "closing.paired" if found.paired else "closing.unpaired"
    planned = "closing.planned" if found.plan else "closing.chosen"
    if any(line.key == GOES_BY for line in found.disagreements):
        planned = "closing.planned_but"
    first = [SAY(over, n=len(found.common_layers), steps=steps)] if found.answers else []
    return SAY.join([*first, SAY(planned), SAY("closing.reading")])


def tables(found: Comparison) -> Iterator[tuple[str, list[str], Rows]]:
    """Title, columns and rows."""
    for question in QUESTIONS:
        answers = found.of(question)
        if answers:
            columns = _columns("arm", "subject", "verdict", "effect", "ci95", "margin", "p_holm", "n")
            yield SAY(f"question.{question}"), columns, [_answer(a) for a in answers]
    if found.answers:
        why = [[a.arm, _question(a.question), a.subject, str(a.reason)] for a in found.answers]
        yield SAY("compare.why"), _columns("arm", "question", "subject", "reason"), why
    levels = [[x.arm, _question(x.question), x.subject, *SAY.estimate(x.mean, x.low95, x.high95)] for x in found.levels]
    if levels:
        yield SAY("compare.levels"), _columns("arm", "question", "subject", "mean", "ci95"), levels
    direct = [
        [a.arm, a.subject, *_effect(a.direct.effect, a.direct.low95, a.direct.high95), SAY.signed(a.effect)]
        for a in found.answers
        if a.direct is not None
    ]
    if direct:
        yield SAY("direct.title"), _columns("arm", "subject", "direct", "ci95", "total"), direct
    alike = [[x.arm, x.subject, *SAY.estimate(x.mean, x.low95, x.high95)] for x in found.similarities]
    if alike:
        yield SAY("similarity.title"), _columns("arm", "subject", "mean", "ci95"), alike
    ranked = sorted((x for x in found.layers if math.isfinite(x.p)), key=lambda x: x.p)[:_SHOWN_LAYERS]
    if ranked:
        rows = [
            [x.layer, x.arm, _question(x.question), x.subject, *_effect(x.effect, x.low95, x.high95), _yes(x.discovery)]
            for x in ranked
        ]
        columns = _columns("layer", "arm", "question", "subject", "effect", "ci95", "discovery")
        yield SAY("compare.layers"), columns, rows


def _columns(*names: str) -> list[str]:
    return [SAY(f"column.{name}") for name in names]


def _question(name: str) -> str:
    return SAY(f"question.{name}")


def _answer(a: Answer) -> list[str]:
    p = min((x for x in (a.p_zero_holm, a.p_increased_holm) if math.isfinite(x)), default=math.nan)
    effect = _effect(a.effect, a.low95, a.high95)
    return [a.arm, a.subject, a.verdict, *effect, SAY.number(a.margin), SAY.p_value(p), str(a.n)]


def _effect(effect: float, low: float, high: float) -> tuple[str, str]:
    return SAY.estimate(effect, low, high, signed=True)


def _yes(value: bool) -> str:
    return SAY("layers.yes") if value else ""


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
