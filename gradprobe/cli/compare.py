"""`gradprobe compare`: is interference there, and was it reduced."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from gradprobe.cli import GATE_TRIPPED, INCONCLUSIVE
from gradprobe.cli.command_options import ArmGlobs, AsJson, Baseline, Controls, Paired, RunFiles
from gradprobe.cli.console import stdout
from gradprobe.errors import RunFileError, UsageError
from gradprobe.messages import ENGLISH as SAY
from gradprobe.messages import Message

if TYPE_CHECKING:
    from gradprobe.verdict.answers import Answer, Comparison
    from gradprobe.verdict.evidence import Evidence

FORMATS = ("text", "md")


def compare(
    files: RunFiles = None,
    baseline: Baseline = "",
    control: Controls = None,
    arm: ArmGlobs = None,
    margin: Annotated[
        float | None, Option(help="Smallest difference that matters. [default: as planned, or .1]")
    ] = None,
    outcome_margin: Annotated[
        float | None, Option(help="The same for metrics of the test split. [default: as planned, or .02]")
    ] = None,
    window: Annotated[str, Option(metavar="A:B", help="Training steps that count. [default: as planned, or all]")] = "",
    pairs: Annotated[str, Option(help="Such as 'cls>det': what cls does to det. [default: as planned, or all]")] = "",
    metrics: Annotated[str, Option(help="Of the test split. [default: as planned, or the main ones]")] = "",
    paired: Paired = None,
    as_json: AsJson = False,
    fail_on: Annotated[str, Option(metavar="increased", help="Exit with 10 if anything increased.")] = "",
    table_format: Annotated[str, Option(help=f"Of the tables: {', '.join(FORMATS)}.")] = "text",
    csv: Annotated[
        Path | None, Option(help="A bare table instead: step,loss_det,loss_cls,weight_det,weight_cls.")
    ] = None,
) -> int:
    """Say whether tasks interfere, and whether an intervention reduced it: in words, then in tables.

    Exits with 0 when all is answered, 10 when --fail-on trips, 11 when interference is left open.

    Example: gradprobe compare study/*.h5 --baseline joint
    """
    from gradprobe.verdict.answers import plain
    from gradprobe.verdict.comparison import compare as judge
    from gradprobe.verdict.criteria import Criteria

    if fail_on not in ("", "increased"):
        raise UsageError(f"--fail-on {fail_on!r}: increased is what it knows.")
    if table_format not in FORMATS:
        raise UsageError(f"--table-format {table_format!r}: one of {', '.join(FORMATS)}.")
    if csv is not None:
        if files or arm:
            raise UsageError("--csv is a comparison of its own; leave the run files out.")
        return _judge_table(csv, as_json)
    options = Criteria(
        baseline=baseline,
        controls=control or (),
        margin=margin,
        outcome_margin=outcome_margin,
        window=parse_window(window),
        pairs=_comma_separated(pairs),
        metrics=_comma_separated(metrics),
        paired=paired,
    )
    found = judge(gather(files or [], arm or []), options)
    if as_json:
        print(json.dumps(plain(found), indent=2, allow_nan=False))
    else:
        _show(found, table_format)
    if fail_on and found.increased:
        return GATE_TRIPPED
    return INCONCLUSIVE if found.open else 0


_SHOWN_LAYERS = 8

Rows = list[list[str]]


def _comma_separated(text: str) -> list[str]:
    """What commas separate.

    >>> _comma_separated("cls>det, det>cls")
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
    """The evidence of all files, in their order, each read once; arguments and errors as of :func:`arm_by_file`."""
    from gradprobe.verdict.evidence import read

    return [read(path, arm) for path, arm in arm_by_file(files, arms).items()]


def arm_by_file(files: Sequence[Path], arms: Sequence[str]) -> dict[Path, str]:
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


def _judge_table(path: Path, as_json: bool) -> int:
    """Judge a bare table; always inconclusive.

    Raises:
        RunFileError: It cannot be read.
        DataError: It is no such table.
    """
    from gradprobe.verdict import training_losses as bare_table
    from gradprobe.verdict.answers import plain

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFileError(f"{path}: cannot be read ({error}).") from error
    found = bare_table.judge_table(bare_table.parse_table(text, path.name))
    if as_json:
        print(json.dumps(plain(found), indent=2, allow_nan=False))
        return INCONCLUSIVE
    print(found.headline)
    _listed(SAY("bare.missing"), found.missing)
    _listed(SAY("bare.misleading"), found.misleading)
    return INCONCLUSIVE


# ---- showing


def _show(found: Comparison, table_format: str) -> None:
    """The verdict in words, then tables."""
    for sentence in found.headline:
        print(sentence)
    for key, lines in (
        ("compare.refused", found.refusals),
        ("compare.not_planned", found.disagreements),
        ("compare.warnings", found.warnings),
    ):
        _listed(SAY(key), lines)
    for title, columns, rows in _tables(found):
        print()
        _draw(title, columns, rows, table_format)
    _listed(SAY("compare.known"), list(_remarks(found)))
    _listed(SAY("compare.scope"), found.scope)
    print(f"\n{_closing(found)}")


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


def _closing(found: Comparison) -> str:
    """What holds for all of it."""
    from gradprobe.verdict.conditions import GOES_BY

    steps = Message("closing.all_steps")
    if found.window:
        steps = Message("closing.steps", start=found.window[0], stop=found.window[1])
    over = "closing.paired" if found.paired else "closing.unpaired"
    planned = "closing.planned" if found.plan else "closing.chosen"
    if any(line.key == GOES_BY for line in found.disagreements):
        planned = "closing.planned_but"
    first = [SAY(over, n=len(found.common_layers), steps=steps)] if found.answers else []
    return SAY.join([*first, SAY(planned), SAY("closing.reading")])


def _tables(found: Comparison) -> Iterator[tuple[str, Sequence[str], Rows]]:
    """Title, columns and rows."""
    from gradprobe.verdict.answers import QUESTIONS

    for question in QUESTIONS:
        answers = found.of(question)
        if answers:
            columns = SAY.columns("arm", "subject", "verdict", "effect", "ci95", "margin", "p_holm", "n")
            yield SAY(f"question.{question}"), columns, [_answer(a) for a in answers]
    if found.answers:
        why = [[a.arm, _question(a.question), a.subject, str(a.reason)] for a in found.answers]
        yield SAY("compare.why"), SAY.columns("arm", "question", "subject", "reason"), why
    levels = [[x.arm, _question(x.question), x.subject, *SAY.estimate(x.mean, x.low95, x.high95)] for x in found.levels]
    if levels:
        yield SAY("compare.levels"), SAY.columns("arm", "question", "subject", "mean", "ci95"), levels
    direct = [
        [a.arm, a.subject, *_effect(a.direct.effect, a.direct.low95, a.direct.high95), SAY.signed(a.effect)]
        for a in found.answers
        if a.direct is not None
    ]
    if direct:
        yield SAY("direct.title"), SAY.columns("arm", "subject", "direct", "ci95", "total"), direct
    alike = [[x.arm, x.subject, *SAY.estimate(x.mean, x.low95, x.high95)] for x in found.similarities]
    if alike:
        yield SAY("similarity.title"), SAY.columns("arm", "subject", "mean", "ci95"), alike
    ranked = sorted((x for x in found.layers if math.isfinite(x.p)), key=lambda x: x.p)[:_SHOWN_LAYERS]
    if ranked:
        rows = [
            [x.layer, x.arm, _question(x.question), x.subject, *_effect(x.effect, x.low95, x.high95), _yes(x.discovery)]
            for x in ranked
        ]
        columns = SAY.columns("layer", "arm", "question", "subject", "effect", "ci95", "discovery")
        yield SAY("compare.layers"), columns, rows


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


def _draw(title: str, columns: Sequence[str], rows: Rows, table_format: str) -> None:
    """Print one table."""
    if table_format == "md":
        print(f"**{title}**\n")
        for cells in (columns, ["---"] * len(columns), *rows):
            print(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        return
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    stdout().print(table)
