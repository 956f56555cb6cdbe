"""How far the numbers can be trusted: gates and warnings, what is not shown, and where the numbers are from."""

from __future__ import annotations

from collections.abc import Sequence

from gradprobe.foreign import clean
from gradprobe.ledger.windows import Gate
from gradprobe.report.chart import Block, Notice, NumberTable, Prose, Section
from gradprobe.report.context import Context
from gradprobe.report.study_data import RunData

_ROWS, _NOTES = 200, 20


def gates_and_warnings(context: Context) -> Section:
    """Disagreements, warnings, gates, and what is left out of the drawings."""
    words, comparison, study = context.words, context.comparison, context.study
    blocks: list[Block] = [
        *context.notices("warning", comparison.disagreements),
        *context.notices("warning", comparison.warnings),
    ]
    for name, number in study.left_out.items():
        blocks.append(Notice("warning", words(f"left_out.{name}", n=number)))
    if comparison.left_out_layers:
        layers = [clean(name) for name in comparison.left_out_layers]
        shown = words.list([*layers[:8], *([words("join.more", n=len(layers) - 8)] if len(layers) > 8 else [])])
        blocks.append(Notice("warning", words("left_out.layers", n=len(layers), layers=shown)))
    blocks.append(_gates(context))
    notes = list(dict.fromkeys(note for answer in comparison.answers for note in answer.notes))
    blocks += context.notices("warning", notes[:_NOTES])
    blocks.append(Prose([words("validity.rules")]))
    blocks.append(Prose([words(f"validity.rule{number}") for number in range(1, 7)], points=True))
    blocks.append(Prose([words("validity.holm")]))
    return Section("validity", words("validity.title"), words("validity.lead"), blocks)


def _gates(context: Context) -> NumberTable:
    """Those that failed first; a gate that several answers of an arm share is one row."""
    words = context.words
    found: dict[tuple[Gate, str], list[str]] = {}
    for answer in context.comparison.answers:
        for gate in answer.gates:
            found.setdefault((gate, clean(answer.arm)), []).append(words.subject(answer.subject))
    rows = [
        (gate.passed, [_passed(context, gate), arm, words.list(dict.fromkeys(subjects)), *_gate_cells(context, gate)])
        for (gate, arm), subjects in found.items()
    ]
    rows = sorted(rows, key=lambda row: row[0])
    note = words("table.cut_plain", shown=_ROWS, of=len(rows)) if len(rows) > _ROWS else ""
    columns = words.columns("gate_passed", "arm", "subject", "gate", "gate_says", "value", "limit")
    return NumberTable(words("validity.gates"), columns, [cells for _, cells in rows[:_ROWS]], text=5, note=note)


def _passed(context: Context, gate: Gate) -> str:
    return context.words("gate.passed" if gate.passed else "gate.failed")


def _gate_cells(context: Context, gate: Gate) -> list[str]:
    words = context.words
    name = f"gate_name.{gate.name.replace(' ', '_').replace('-', '_')}"
    title = words(name) if name in words else clean(gate.name)
    return [title, words.say(gate.sentence), words.number(gate.value), words.number(gate.limit)]


_ALWAYS = ("loss", "reweighting", "one_setting", "first_order", "seeds", "cause")


def limits(context: Context) -> Section:
    """Points that always hold, and those that hold here."""
    words = context.words
    points = [words(f"limits.{name}") for name in (*limits_here(context), *_ALWAYS)]
    points += [words.say(line) for line in context.comparison.scope]
    return Section("limits", words("limits.title"), words("limits.lead"), [Prose(points, points=True)])


def limits_here(context: Context) -> list[str]:
    """The keys of the limits that these files have."""
    study, comparison = context.study, context.comparison
    fewest = min(len(arm.runs) for arm in study.arms)
    found = {
        "no_control": not comparison.controls,
        "one_arm": len(study.arms) < 2,
        "few_seeds": fewest < 3,
        "naive": any(arm.layers and not arm.corrected for arm in study.arms),
        "no_ledger": not study.any("ledger"),
        "no_probe": not study.any("probe"),
        "no_test": bool(study.runs) and not all(run.test for run in study.runs),
        "unfinished": not all(run.complete for run in study.runs),
    }
    return [name for name, holds in found.items() if holds]


_RUNS = 200
_FACTS = 150
_HASH_CHARACTERS = 12
"""Characters of a hash: enough to tell two apart, and to look for in a file."""


def provenance(context: Context) -> Section:
    """Tables of runs, of common and of differing settings."""
    words, runs = context.words, context.study.runs
    common, differing = _common_and_differing(runs)
    blocks: list[Block] = [_runs(context, runs)]
    if differing:
        blocks.append(_differing(context, differing))
    rows = [[name, value] for name, value in common.items()][:_FACTS]
    columns = words.columns("name", "value")
    blocks.append(NumberTable(words("provenance.common"), columns, rows, text=2))
    blocks.append(Prose([words("provenance.how")]))
    return Section("provenance", words("provenance.title"), words("provenance.lead"), blocks)


def _common_and_differing(runs: Sequence[RunData]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What all runs say alike, and the names of what they do not with the value of each run; "": it says nothing."""
    names = list(dict.fromkeys(name for run in runs for name in run.provenance))
    common, differing = {}, {}
    for name in names:
        values = [run.provenance.get(name, "") for run in runs]
        if len(set(values)) == 1:
            common[name] = values[0]
        else:
            differing[name] = values
    return common, differing


def _runs(context: Context, runs: Sequence[RunData]) -> NumberTable:
    words = context.words
    rows = []
    for run in runs[:_RUNS]:
        facts = run.provenance
        hashes = (facts.get("model.reference", ""), facts.get("batches.hash", ""), facts.get("data.fingerprint", ""))
        end = run.end if run.complete else words("provenance.unfinished")
        counts = [str(run.rows), str(run.unmeasured)]
        rows.append([run.arm, run.file, run.seed, *(h[:_HASH_CHARACTERS] for h in hashes), end, *counts])
    note = words("table.cut_plain", shown=_RUNS, of=len(runs)) if len(runs) > _RUNS else ""
    return NumberTable(
        words("provenance.runs"),
        words.columns("arm", "file", "seed", "weights_hash", "batches_hash", "data_hash", "end", "rows", "unmeasured"),
        rows,
        text=7,
        note=note,
    )


def _differing(context: Context, differing: dict[str, list[str]]) -> NumberTable:
    """Name, and the values that occur with how many runs have each."""
    words = context.words
    rows = []
    for name, values in list(differing.items())[:_FACTS]:
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
        shown = [words("provenance.value", value=value or "–", n=n) for value, n in list(counts.items())[:6]]
        more = words("provenance.more", n=len(counts) - 6) if len(counts) > 6 else ""
        rows.append([name, words.list([*shown, *([more] if more else [])])])
    return NumberTable(words("provenance.differing"), words.columns("name", "values"), rows, text=2)
