"""Where the numbers are from: the files, what they have in common and in what they differ."""

from __future__ import annotations

from collections.abc import Sequence

from gradprobe.report.chart import Block, Prose, Section, Table
from gradprobe.report.sections.common import Context
from gradprobe.report.study_data import RunData

RUNS = 200
FACTS = 150
SHORT = 12
"""Characters of a hash: enough to tell two apart, and to look for in a file."""


def section(context: Context) -> Section:
    """Tables of runs, of common and of differing settings."""
    words, runs = context.words, context.study.runs
    common, differing = split(runs)
    blocks: list[Block] = [_runs(context, runs)]
    if differing:
        blocks.append(_differing(context, differing))
    rows = [[name, value] for name, value in common.items()][:FACTS]
    columns = [words("column.name"), words("column.value")]
    blocks.append(Table(words("provenance.common"), columns, rows, text=2))
    blocks.append(Prose([words("provenance.how")]))
    return Section("provenance", words("provenance.title"), words("provenance.lead"), blocks)


def split(runs: Sequence[RunData]) -> tuple[dict[str, str], dict[str, list[str]]]:
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


def _runs(context: Context, runs: Sequence[RunData]) -> Table:
    words = context.words
    rows = []
    for run in runs[:RUNS]:
        facts = run.provenance
        hashes = (facts.get("model.reference", ""), facts.get("batches.hash", ""), facts.get("data.fingerprint", ""))
        end = run.end if run.complete else words("provenance.unfinished")
        counts = [str(run.rows), str(run.unmeasured)]
        rows.append([run.arm, run.file, run.seed, *(h[:SHORT] for h in hashes), end, *counts])
    names = ("arm", "file", "seed", "weights_hash", "batches_hash", "data_hash", "end", "rows", "unmeasured")
    note = words("table.cut_plain", shown=RUNS, of=len(runs)) if len(runs) > RUNS else ""
    return Table(words("provenance.runs"), [words(f"column.{n}") for n in names], rows, text=7, note=note)


def _differing(context: Context, differing: dict[str, list[str]]) -> Table:
    """Name, and the values that occur with how many runs have each."""
    words = context.words
    rows = []
    for name, values in list(differing.items())[:FACTS]:
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
        told = [words("provenance.value", value=value or "–", n=n) for value, n in list(counts.items())[:6]]
        more = words("provenance.more", n=len(counts) - 6) if len(counts) > 6 else ""
        rows.append([name, words.list([*told, *([more] if more else [])])])
    return Table(words("provenance.differing"), [words("column.name"), words("column.values")], rows, text=2)
