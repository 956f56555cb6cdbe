"""Conditions without which a number supports no claim. Each closes where what it needs is not in the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gradprobe.verdict.answers import Gate
from gradprobe.verdict.evidence import Evidence
from gradprobe.verdict.readings import Pair, Span, estimate, ledger

SELF_CHECK_TOLERANCE = 1e-3
"""How far the cosine of a task with its own copy may be from +1, and with its negative from -1."""

SAMPLES_PER_NOISE_SCALE = 10
"""So many times its noise scale a training set has to hold where it is gone through in shuffled epochs."""


SAME_TWICE = "same run twice"

REPEATED = 0.5
"""The part of the margin by which a run that is made twice may differ from itself.

The difference of every seed holds as much chance. Of the fewest seeds that get a verdict, three, differences that
spread so far have a 90 % interval of 2.92 / sqrt(3) times that to each side: with half of the margin .84 of it, so that
it can still be told that nothing changed; from .59 on, chance alone reaches beyond the margin.
"""


def worst(gates: Iterable[Gate]) -> Gate:
    """The first that is closed, else the one nearest to its limit.

    Raises:
        ValueError: There is none.
    """
    found = list(gates)
    if not found:
        raise ValueError("no gate to choose from")
    closed = [gate for gate in found if not gate.passed]
    return (closed or sorted(found, key=_room))[0]


def _room(gate: Gate) -> float:
    if not (math.isfinite(gate.value) and gate.limit):
        return math.inf
    return abs(math.log(max(abs(gate.value), 1e-300) / abs(gate.limit)))


def passed(gates: Sequence[Gate]) -> bool:
    """Whether all of them are open."""
    return all(gate.passed for gate in gates)


def closed_sentence(gates: Sequence[Gate]) -> str:
    """What is wrong, of all that are closed."""
    return "; ".join(gate.sentence for gate in gates if not gate.passed)


def name_of(run: Evidence) -> str:
    """For sentences."""
    return f"{run.arm}, seed {run.seed}"


def self_check(runs: Sequence[Evidence]) -> Gate:
    """A task and its own copy must have cosine +1, and its negative -1."""
    return worst(_self_check(run) for run in runs)


def _self_check(run: Evidence) -> Gate:
    found = run.provenance.get("self_check")
    limit = SELF_CHECK_TOLERANCE
    if found is None or np.size(found) != 2:
        how = "record it anew with this version"
        return Gate("self-check", False, math.nan, limit, f"{name_of(run)}: no self-check is in the file; {how}")
    copy, negative = (float(value) for value in np.ravel(found))
    off = max(abs(copy - 1), abs(negative + 1))
    said = f"{name_of(run)}: a task has cosine {copy:+.4f} with its own copy and {negative:+.4f} with its negative"
    return Gate("self-check", bool(off <= limit), off, limit, said)


def same_twice(
    again: Sequence[Sequence[Evidence]], read: Callable[[Evidence], float | None], margin: float, wanted: str
) -> Gate:
    """A/A: how far the same run, made twice, differs from itself in what is judged.

    Equal to the bit passes. Else, as is usual on a GPU, the judged quantity itself is compared: it may differ by
    :data:`REPEATED` of the margin.

    Args:
        again: Groups of files of one arm, settings and seed; with none the gate is closed.
        read: The quantity that is judged, of one run.
        margin: Of the question.
        wanted: Name of a file that would do.
    """
    limit = REPEATED * margin
    if not again:
        said = (
            "no run was made twice, so that it is not known how far the same training differs from itself; record the "
            f"baseline's first seed a second time, into a file such as {wanted} (gradprobe study does)"
        )
        return Gate(SAME_TWICE, False, math.nan, limit, said)
    return worst(_same_twice(group, read, limit) for group in again)


def _same_twice(group: Sequence[Evidence], read: Callable[[Evidence], float | None], limit: float) -> Gate:
    files = " and ".join(run.file for run in group)
    values = np.array([math.nan if (value := read(run)) is None else value for run in group], dtype=np.float64)
    same_rows = len({run.content for run in group}) == 1
    if same_rows and np.array_equal(values, np.full_like(values, values[0]), equal_nan=True):
        return Gate(SAME_TWICE, True, 0.0, limit, f"{files} are the same run made twice, and equal to the bit")
    if not np.isfinite(values).all():
        said = f"{files} are the same run made twice, and not all of them give a number of what is judged here"
        return Gate(SAME_TWICE, False, math.nan, limit, said)
    apart = float(np.ptp(values))
    said = (
        f"{files} are the same run made twice, and differ by {apart:.2g} in what is judged here; {limit:.2g} is "
        "allowed, half the margin: where it is more, train deterministically"
    )
    return Gate(SAME_TWICE, apart <= limit, apart, limit, said)


def first_losses_equal(baseline: Sequence[Evidence], arm: Sequence[Evidence]) -> Gate:
    """What stands for A/A where the user vouches for the pairs and no run was made twice.

    With the same initial weights and batch the losses of both arms' first step must be equal to the bit. That shows
    that runs belong together, and not that a whole training repeats.

    Args:
        baseline, arm: Runs of one seed each, in the same order.
    """
    for one, other in zip(baseline, arm, strict=True):
        unequal = _first_losses_differ(one, other)
        if unequal:
            return Gate(SAME_TWICE, False, math.nan, 0.0, unequal)
    return Gate(SAME_TWICE, True, 0.0, 0.0, "no run was made twice; the losses of the first step are equal to the bit")


def _first_losses_differ(one: Evidence, other: Evidence) -> str:
    both = f"{name_of(one)} and {name_of(other)}"
    if not (len(one.step) and len(other.step)) or one.step[0] != 0 or other.step[0] != 0:
        return f"{both}: no run was made twice, and step 0 was not recorded in both"
    mine = [one.loss[0, one.tasks.index(task)] for task in one.tasks if task in other.tasks]
    theirs = [other.loss[0, other.tasks.index(task)] for task in one.tasks if task in other.tasks]
    if mine != theirs:
        return f"{both} differ in the losses of their first step, before any update: {mine} and {theirs}"
    return ""


def resolved(runs: Sequence[Evidence], layers: Sequence[str], tasks: Sequence[str], span: Span) -> Gate:
    """The gradients must be told from the noise of their samples."""
    return worst(_resolved(run, layers, tasks, span) for run in runs)


def _resolved(run: Evidence, layers: Sequence[str], tasks: Sequence[str], span: Span) -> Gate:
    found = estimate(run, layers, tasks, span)
    name = "gradients resolved"
    if found is None:
        return Gate(name, False, math.nan, 0.0, f"{name_of(run)}: not measured in micro-batches; record with {MICRO}")
    with np.errstate(invalid="ignore", divide="ignore"):
        part = found.square_low / np.abs(found.square)
    low = int(np.argmin(np.where(np.isfinite(part), part, -np.inf)))
    said = (
        f"{name_of(run)}: of {tasks[low]}'s squared gradient {found.square[low]:.3g} the lower bound is "
        f"{found.square_low[low]:.3g}; where that is not above 0, take more or larger probe batches"
    )
    return Gate(name, bool(found.square_resolved.all()), float(found.square_low[low]), 0.0, said)


MICRO = "--micro-batches 4 --probe-loader val"


def enough_samples(
    runs: Sequence[Evidence], layers: Sequence[str], task: str, span: Span, *, of_ledger: bool = False
) -> Gate:
    """Shuffled epochs are no independent batches: the training set must be large beside the noise scale.

    Not where gradients were measured apart from the training's order: on a probe loader, which draws with replacement;
    for a ledger, on its fixed probe batch.

    Args:
        runs: All of them.
        layers, task, span: Of which gradient.
        of_ledger: Whether the ledger is asked about, and not the Gramians.
    """
    return worst(_enough_samples(run, layers, task, span, of_ledger) for run in runs)


def _enough_samples(run: Evidence, layers: Sequence[str], task: str, span: Span, of_ledger: bool) -> Gate:
    name, limit = "samples over noise scale", float(SAMPLES_PER_NOISE_SCALE)
    if run.ledger_on_probe_batch if of_ledger else run.probed is not None:
        where = "valued on a fixed probe batch" if of_ledger else "measured on a probe loader, drawn with replacement"
        return Gate(name, True, math.inf, limit, f"{name_of(run)}: {where}")
    found = estimate(run, layers, [task], span)
    scale = float(found.noise_scale[0]) if found is not None else math.nan
    if not (run.samples and math.isfinite(scale)):
        missing = "the number of training samples" if not run.samples else f"the noise scale of {task}"
        said = f"{name_of(run)}: {missing} is not known; record with {MICRO}"
        return Gate(name, False, math.nan, limit, said)
    ratio = run.samples / scale if scale > 0 else math.inf
    said = (
        f"{name_of(run)}: {run.samples} training samples are {ratio:.1f} times {task}'s noise scale of {scale:.0f}; "
        f"{limit:.0f} times are asked for, or its estimates are biased by shuffling"
    )
    return Gate(name, ratio >= limit, ratio, limit, said)


def of_the_ledger(runs: Sequence[Evidence], layers: Sequence[str], pair: Pair, span: Span) -> list[Gate]:
    """Those of the window sums: rows, residual, momentum from before, own progress; of the worst run each."""
    by_name: dict[str, list[Gate]] = {}
    for run in runs:
        found = ledger(run, layers, span)
        if found is None:
            said = f"{name_of(run)}: no ledger; record with --ledger"
            return [Gate("ledger", False, math.nan, math.nan, said)]
        for gate in found.gates[run.tasks.index(pair.task)]:
            said = f"{name_of(run)}: {gate.sentence}"
            by_name.setdefault(gate.name, []).append(Gate(gate.name, gate.passed, gate.value, gate.limit, said))
    return [worst(gates) for gates in by_name.values()]
