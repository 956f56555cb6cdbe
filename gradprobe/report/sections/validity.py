"""May the numbers be trusted: the gates, and what in the files misleads."""

from __future__ import annotations

from gradprobe.foreign import clean
from gradprobe.ledger.windows import Gate
from gradprobe.report.chart import Block, Notice, Prose, Section, Table
from gradprobe.report.sections.common import Context
from gradprobe.report.sections.front import said

ROWS, NOTES = 200, 20


def section(context: Context) -> Section:
    """Disagreements, warnings, gates, and what is left out of the drawings."""
    words, comparison, study = context.words, context.comparison, context.study
    blocks: list[Block] = [
        *said(context, "warning", comparison.disagreements),
        *said(context, "warning", comparison.warnings),
    ]
    for name, number in study.left_out.items():
        blocks.append(Notice("warning", words(f"left_out.{name}", n=number)))
    if comparison.left_out_layers:
        layers = [clean(name) for name in comparison.left_out_layers]
        shown = words.list([*layers[:8], *([words("join.more", n=len(layers) - 8)] if len(layers) > 8 else [])])
        blocks.append(Notice("warning", words("left_out.layers", n=len(layers), layers=shown)))
    blocks.append(_gates(context))
    notes = list(dict.fromkeys(note for answer in comparison.answers for note in answer.notes))
    blocks += said(context, "warning", notes[:NOTES])
    blocks.append(Prose([words("validity.rules")]))
    blocks.append(Prose([words(f"validity.rule{number}") for number in range(1, 7)], points=True))
    blocks.append(Prose([words("validity.holm")]))
    return Section("validity", words("validity.title"), words("validity.lead"), blocks)


def _gates(context: Context) -> Table:
    """Those that failed first; a gate that several answers of an arm share is one row."""
    words = context.words
    found: dict[tuple[Gate, str], list[str]] = {}
    for answer in context.comparison.answers:
        for gate in answer.gates:
            found.setdefault((gate, clean(answer.arm)), []).append(words.subject(answer.subject))
    rows = [
        (gate.passed, [_passed(context, gate), arm, words.list(dict.fromkeys(subjects)), *_told(context, gate)])
        for (gate, arm), subjects in found.items()
    ]
    rows = sorted(rows, key=lambda row: row[0])
    note = words("table.cut_plain", shown=ROWS, of=len(rows)) if len(rows) > ROWS else ""
    names = ("gate_passed", "arm", "subject", "gate", "gate_says", "value", "limit")
    columns = [words(f"column.{name}") for name in names]
    return Table(words("validity.gates"), columns, [cells for _, cells in rows[:ROWS]], text=5, note=note)


def _passed(context: Context, gate: Gate) -> str:
    return context.words("gate.passed" if gate.passed else "gate.failed")


def _told(context: Context, gate: Gate) -> list[str]:
    words = context.words
    name = f"gate_name.{gate.name.replace(' ', '_').replace('-', '_')}"
    title = words(name) if name in words else clean(gate.name)
    return [title, words.say(gate.sentence), words.number(gate.value), words.number(gate.limit)]
