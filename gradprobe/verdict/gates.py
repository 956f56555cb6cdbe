"""Conditions without which a number supports no claim. Each closes where what it needs is not in the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from gradprobe.ledger.windows import Gate
from gradprobe.messages import Message
from gradprobe.statistics import Contrast, t_quantile
from gradprobe.verdict.evidence import Cancelled, Evidence, Pair, Span, estimate, ledger_window

_SELF_CHECK_TOLERANCE = 1e-3
"""How far the cosine of a task with its own copy may be from +1, and with its negative from -1."""

_SAMPLES_PER_NOISE_SCALE = 10
"""So many times its noise scale a training set has to hold where it is gone through in shuffled epochs."""


OWN_PROGRESS = "own progress"
"""The gate of a ledger that closes where C would be divided by what may be 0."""

_SAME_TWICE = "same run twice"

_REPEATED = 0.5
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


def closed(gates: Sequence[Gate]) -> Message:
    """What is wrong, of all that are closed."""
    return Message("reason.gates", gates=[gate.sentence for gate in gates if not gate.passed])


def _name(run: Evidence) -> Message:
    return Message("gate.run", arm=run.arm, seed=run.seed)


def _of(run: Evidence, found: Message) -> Message:
    return Message("gate.of_run", run=_name(run), found=found)


def self_check(runs: Sequence[Evidence]) -> Gate:
    """A task and its own copy must have cosine +1, and its negative -1."""
    return worst(_self_check(run) for run in runs)


def _self_check(run: Evidence) -> Gate:
    found = run.provenance.get("self_check")
    limit = _SELF_CHECK_TOLERANCE
    if found is None or np.size(found) != 2:
        return Gate("self-check", False, math.nan, limit, _of(run, Message("gate.no_self_check")))
    copy, negative = (float(value) for value in np.ravel(found))
    off = max(abs(copy - 1), abs(negative + 1))
    sentence = Message("gate.self_check", copy=copy, negative=negative)
    return Gate("self-check", bool(off <= limit), off, limit, _of(run, sentence))


def same_twice(
    again: Sequence[Sequence[Evidence]], read: Callable[[Evidence], float | None], margin: float, wanted: str
) -> Gate:
    """A/A: how far the same run, made twice, differs from itself in what is judged.

    Equal to the bit passes. Else, as is usual on a GPU, the judged quantity itself is compared: it may differ by
    :data:`_REPEATED` of the margin.

    Args:
        again: Groups of files of one arm, settings and seed; with none the gate is closed.
        read: The quantity that is judged, of one run.
        margin: Of the question.
        wanted: Name of a file that would do.
    """
    limit = _REPEATED * margin
    if not again:
        return Gate(_SAME_TWICE, False, math.nan, limit, Message("gate.not_twice", file=wanted))
    return worst(_same_twice(group, read, limit) for group in again)


def _same_twice(group: Sequence[Evidence], read: Callable[[Evidence], float | None], limit: float) -> Gate:
    files = [run.file for run in group]
    values = np.array([math.nan if (value := read(run)) is None else value for run in group], dtype=np.float64)
    same_rows = len({run.content for run in group}) == 1
    if same_rows and np.array_equal(values, np.full_like(values, values[0]), equal_nan=True):
        return Gate(_SAME_TWICE, True, 0.0, limit, Message("gate.twice_equal", files=files))
    if not np.isfinite(values).all():
        return Gate(_SAME_TWICE, False, math.nan, limit, Message("gate.twice_unknown", files=files))
    apart = float(np.ptp(values))
    sentence = Message("gate.twice_apart", files=files, apart=apart, limit=limit)
    return Gate(_SAME_TWICE, apart <= limit, apart, limit, sentence)


def first_losses_equal(baseline: Sequence[Evidence], arm: Sequence[Evidence]) -> Gate:
    """What stands for A/A where the user vouches for the pairs and no run was made twice.

    With the same initial weights and batch the losses of both arms' first step must be equal to the bit. That shows
    that runs belong together, and not that a whole training repeats.

    Args:
        baseline, arm: Runs of one seed each, in the same order.
    """
    for one, other in zip(baseline, arm, strict=True):
        unequal = _first_losses_differ(one, other)
        if unequal is not None:
            return Gate(_SAME_TWICE, False, math.nan, 0.0, unequal)
    return Gate(_SAME_TWICE, True, 0.0, 0.0, Message("gate.first_equal"))


def _first_losses_differ(one: Evidence, other: Evidence) -> Message | None:
    runs = [_name(one), _name(other)]
    if not (len(one.step) and len(other.step)) or one.step[0] != 0 or other.step[0] != 0:
        return Message("gate.first_missing", runs=runs)
    mine = [one.loss[0, one.tasks.index(task)] for task in one.tasks if task in other.tasks]
    theirs = [other.loss[0, other.tasks.index(task)] for task in one.tasks if task in other.tasks]
    return None if mine == theirs else Message("gate.first_differ", runs=runs, one=mine, other=theirs)


def resolved(runs: Sequence[Evidence], layers: Sequence[str], tasks: Sequence[str], span: Span) -> Gate:
    """The gradients must be distinguished from the noise of their samples."""
    return worst(_resolved(run, layers, tasks, span) for run in runs)


def _resolved(run: Evidence, layers: Sequence[str], tasks: Sequence[str], span: Span) -> Gate:
    found = estimate(run, layers, tasks, span)
    name = "gradients resolved"
    assert found is not None  # a question without such rows has no gates
    with np.errstate(invalid="ignore", divide="ignore"):
        part = found.square_low / np.abs(found.square)
    low = int(np.argmin(np.where(np.isfinite(part), part, -np.inf)))
    square, bound = float(found.square[low]), float(found.square_low[low])
    sentence = Message("gate.resolved", task=tasks[low], square=square, low=bound)
    return Gate(name, bool(found.square_resolved.all()), bound, 0.0, _of(run, sentence))


def enough_samples(
    runs: Sequence[Evidence], layers: Sequence[str], task: str, span: Span, *, of_ledger: bool = False
) -> Gate:
    """Shuffled epochs are no independent batches: the training set must be large compared with the noise scale.

    Not where gradients were measured apart from the training's order: on a probe loader, which draws with replacement;
    for a ledger, on its fixed probe batch.

    Args:
        runs: All of them.
        layers, task, span: Of which gradient.
        of_ledger: Whether the ledger is asked about, and not the Gramians.
    """
    return worst(_enough_samples(run, layers, task, span, of_ledger) for run in runs)


def _enough_samples(run: Evidence, layers: Sequence[str], task: str, span: Span, of_ledger: bool) -> Gate:
    name, limit = "samples over noise scale", float(_SAMPLES_PER_NOISE_SCALE)
    if run.ledger_on_probe_batch if of_ledger else run.probed is not None:
        where = Message("gate.on_probe_batch" if of_ledger else "gate.on_probe_loader")
        return Gate(name, True, math.inf, limit, _of(run, where))
    found = estimate(run, layers, [task], span)
    scale = float(found.noise_scale[0]) if found is not None else math.nan
    if not (run.samples and math.isfinite(scale)):
        missing = Message("gate.no_noise_scale", task=task) if run.samples else Message("gate.no_samples")
        return Gate(name, False, math.nan, limit, _of(run, missing))
    ratio = run.samples / scale if scale > 0 else math.inf
    sentence = Message("gate.samples", n=run.samples, ratio=ratio, task=task, scale=scale, limit=limit)
    return Gate(name, ratio >= limit, ratio, limit, _of(run, sentence))


def of_the_ledger(runs: Sequence[Evidence], layers: Sequence[str], pair: Pair, span: Span) -> list[Gate]:
    """Those of the window sums: rows, residual, momentum from before, own progress; of the worst run each."""
    by_name: dict[str, list[Gate]] = {}
    for run in runs:
        found = ledger_window(run, layers, span)
        assert found is not None  # a question without a ledger has no gates
        for gate in found.gates[run.tasks.index(pair.task)]:
            by_name.setdefault(gate.name, []).append(replace(gate, sentence=_of(run, gate.sentence)))
    return [worst(gates) for gates in by_name.values()]


def own_progress_over_seeds(runs: Sequence[Evidence], parts: Sequence[Cancelled], task: str, limit: float) -> Gate:
    """That of a ledger for all runs of an arm together, where C is a ratio of means over seeds.

    Args:
        runs: Of one arm.
        parts: Of each run.
        task: Whose progress.
        limit: How many of its standard errors the sum over runs is to be above 0.
    """
    own, error = sum(part.own for part in parts), math.hypot(*(part.own_error for part in parts))
    ratio = own / error if error else math.nan
    least = min((part.own / part.own_error for part in parts if part.own_error), default=math.nan)
    sentence = Message("gate.own_together", arm=runs[0].arm, n=len(runs), task=task, ratio=ratio, least=least)
    return Gate(OWN_PROGRESS, ratio >= limit, ratio, limit, sentence)


def bounded(contrast: Contrast, task: str) -> Gate:
    """Seeds have to tell the mean own progress from 0 as well, or no ratio to it has an interval."""
    freedom = float(contrast.freedom)
    limit = float(t_quantile(freedom, 0.95)) if freedom > 0 else math.nan
    error = math.sqrt(contrast.divisor_variance)
    ratio = 1 / error if error else math.inf
    sentence = Message("gate.own_over_seeds", task=task, ratio=ratio, n=int(contrast.seeds), limit=limit)
    return Gate("progress over seeds", ratio > limit, ratio, limit, sentence)
