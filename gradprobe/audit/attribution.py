"""Which doors are open: the experiment is run again with doors held shut, until the difference is gone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradprobe.audit.arm import Closing, Door, LockstepArm
from gradprobe.audit.differences import CLEAN, NUMERIC
from gradprobe.audit.doors import gradients_of
from gradprobe.audit.experiment import experiment_from, random_state_kept
from gradprobe.audit.pair import PairOutcome, Setting

_Pair = Callable[[Sequence[Door]], PairOutcome]
"""Runs the pair of arms with these doors held shut in both."""

OPEN, SHUT, _UNTESTED = "open", "shut", "not tested"


@dataclass
class DoorFinding:
    """What was found of one door.

    Attributes:
        door: The door.
        state: ``open``: it belongs to the smallest set that explains the difference; ``shut``; ``not tested``.
        contribution: The displacement with every other open door held shut; for a single one that is all of it.
            NaN: not measured.
        closed: The displacement that is left when this door alone is held shut.
        restores: Whether holding it shut alone takes the difference away.
        curve: The displacement after each step behind ``contribution``.
        name, evidence: In words; see :mod:`gradprobe.audit.attribution` for doors that are named more closely.
    """

    door: Door
    state: str = SHUT
    contribution: float = math.nan
    closed: float = math.nan
    restores: bool = False
    name: str = ""
    evidence: str = ""
    curve: list[float] = field(default_factory=list)


@dataclass
class Attribution:
    """What the search found.

    Attributes:
        findings: One per door, in the order of the doors.
        explained: Whether the open doors together explain the difference.
        runs: Pairs that were run.
        remainder: The class that is left with the open doors held shut; meaningless where unexplained.
    """

    findings: list[DoorFinding]
    explained: bool
    runs: int = 0
    remainder: str = CLEAN

    @property
    def open(self) -> list[DoorFinding]:
        """Findings of doors that are open."""
        return [finding for finding in self.findings if finding.state == OPEN]


def _better(found: PairOutcome, before: PairOutcome) -> bool:
    """Whether a difference is gone, or is nothing but rounding where it was more."""
    if found.error:
        return False
    return found.kind == CLEAN or (found.kind == NUMERIC and before.kind not in (CLEAN, NUMERIC))


def attribute(before: PairOutcome, doors: Sequence[Door], run: _Pair) -> Attribution:
    """Name the doors that explain a difference.

    Where there is no difference nothing is run. Else every door is held shut alone first; of those that take the
    difference away, the one is named in whose stage it shows first, and of several the most specific. If there is none,
    all are held shut, and opened again one by one, intrusive ones first and then the least specific, as long as the
    difference stays away: what is left is a set of which none can be missed.

    Args:
        before: The outcome with nothing held shut.
        doors: The most specific first.
        run: Pairs both arms.
    """
    if before.kind == CLEAN:  # nothing to explain: with every door as it is, nothing comes through
        return Attribution([DoorFinding(door, SHUT, closed=0.0) for door in doors], explained=True)
    search = _Search(before, doors, run)
    found = Attribution([search.alone(door) for door in doors], explained=False)
    chosen = search.smallest(found.findings)
    if chosen is not None:
        found.explained, found.remainder = True, search.run(chosen).kind
        for finding in found.findings:
            if finding.door in chosen:
                finding.state = OPEN
                alone = search.run([door for door in chosen if door is not finding.door])
                finding.contribution, finding.evidence = alone.largest, evidence(alone)
                finding.curve = [float(d) for d in alone.displacement]
    found.runs = search.runs
    return found


def evidence(outcome: PairOutcome) -> str:
    """Where a difference shows first."""
    first = (
        str(outcome.first_differences[0]) if outcome.first_differences else outcome.error or "no stage that is traced"
    )
    skipped = f"; {outcome.skipped} optimizer steps in one arm alone" if outcome.skipped else ""
    return first + skipped


class _Search:
    def __init__(self, before: PairOutcome, doors: Sequence[Door], run: _Pair) -> None:
        self._before, self._doors, self._run = before, list(doors), run
        self._known: dict[tuple[int | str, ...], PairOutcome] = {}

    @property
    def runs(self) -> int:
        return len(self._known)

    def run(self, shut: Sequence[Door], way: int = 0) -> PairOutcome:
        """The outcome with these doors held shut; ``way`` chooses among their :attr:`Door.others`."""
        ordered = [door for door in self._doors if door in shut]
        if not ordered:
            return self._before
        key: tuple[int | str, ...] = (way, *(door.name for door in ordered))
        if key not in self._known:
            self._known[key] = self._run([_held(door, way) for door in ordered])
        return self._known[key]

    def restores(self, shut: Sequence[Door]) -> bool:
        """Whether the difference is gone with these doors held shut, in whichever way."""
        ways = 1 + max((len(door.others) for door in shut), default=0)
        return all(_better(self.run(shut, way), self._before) for way in range(ways))

    def alone(self, door: Door) -> DoorFinding:
        outcome = self.run([door])
        if not outcome.acted:
            return DoorFinding(door, SHUT, closed=self._before.largest, evidence="nothing to shut: it never acted")
        if outcome.error:
            return DoorFinding(door, _UNTESTED, evidence=f"cannot be held shut here: {outcome.error}")
        return DoorFinding(door, SHUT, closed=outcome.largest, restores=self.restores([door]))

    def smallest(self, findings: Sequence[DoorFinding]) -> list[Door] | None:
        """The doors to hold shut; None where even all together leave a difference."""
        singles = [finding.door for finding in findings if finding.restores]
        if singles:
            whole = [door for door in singles if self.run([door]).kind == CLEAN] or singles
            return [min(whole, key=self._out_of_place)]
        tested = [f for f in findings if f.state != _UNTESTED]
        acted = [f.door for f in tested if f.evidence == ""]
        # One that never acted may have been kept from it by another: a training that is stopped comes to no overflow.
        shut = next((s for s in (acted, [f.door for f in tested]) if s and self.restores(s)), None)
        if shut is None:
            return None
        specific = [door for door in shut if not door.intrusive]
        for door in [*(door for door in shut if door.intrusive), *reversed(specific)]:
            fewer = [other for other in shut if other is not door]
            if fewer and self.restores(fewer):
                shut = fewer
        return shut

    def _out_of_place(self, door: Door) -> bool:
        """Whether the first difference is in a stage in which this door does not show."""
        first = self._before.first_differences[:1]
        return bool(first) and first[0].stage not in door.stages


def _held(door: Door, way: int) -> Door:
    """The door as it is held shut in this way; one that knows no such way as always."""
    return replace(door, close=door.others[way - 1]) if 0 < way <= len(door.others) else door


# ---- the weights that a step function really uses, measured from its gradients

_TOLERANCE = 1e-4
"""Relative; products of float32 gradients in float64 agree to 1e-6."""


@dataclass(frozen=True)
class _InForce:
    """Weights in force in one step.

    Attributes:
        given: Task -> the weight that the step function was given.
        used: Task -> the factor of the task's gradient in ``.grad``, by least squares; NaN: it has no gradient.
        residual: The part of ``.grad`` that is no combination of the tasks' gradients, relative to it.
    """

    given: Mapping[str, float]
    used: Mapping[str, float]
    residual: float


class _Watch(Closing):
    def __init__(self) -> None:
        self.found: _InForce | None = None
        self._tasks: dict[str, dict[str, Tensor]] = {}

    def losses(self, arm: LockstepArm, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        named = dict(arm.experiment.model.named_parameters())
        for task, loss in losses.items():
            summed = self._tasks.setdefault(task, {})
            for name, gradient in gradients_of(loss, named).items():
                summed[name] = summed[name] + gradient if name in summed else gradient
        return losses

    def after_backward(self, arm: LockstepArm) -> None:
        tasks = list(self._tasks)
        names = sorted({name for task in tasks for name in self._tasks[task]})
        parameters = dict(arm.experiment.model.named_parameters())
        columns = [_flat([self._tasks[t].get(n, torch.zeros_like(parameters[n])) for n in names]) for t in tasks]
        made_ = [parameters[n].grad for n in names]
        target = _flat([torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, made_, strict=True)])
        target = target / arm.experiment.scale
        self.found = _InForce(dict(arm.weights), *_solved(tasks, columns, target))

    def before_optimizer(self, arm: LockstepArm, optimizer: Optimizer) -> None:
        raise _StepSeen


class _StepSeen(BaseException):
    """The step need not be finished."""


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors]) if tensors else torch.zeros(0).double()


def _solved(tasks: list[str], columns: list[Tensor], target: Tensor) -> tuple[dict[str, float], float]:
    basis = torch.stack(columns, dim=1)
    length = basis.norm(dim=0)
    known = [i for i in range(len(tasks)) if 0 < float(length[i]) < math.inf]
    used = dict.fromkeys(tasks, math.nan)
    if not known or not bool(target.isfinite().all()):
        return used, math.nan
    unit = basis[:, known] / length[known]
    found = torch.linalg.lstsq(unit, target[:, None], driver="gelsd").solution[:, 0]
    for i, factor in zip(known, found, strict=True):
        used[tasks[i]] = float(factor / length[i])
    norm = float(target.norm())
    return used, float((unit @ found - target).norm()) / norm if norm else 0.0


def _weights_in_force(setting: Setting, weight: float | None) -> _InForce | None:
    """What the first step uses; None where it takes no backward, or its gradients are not finite.

    Args:
        setting: Of the audit.
        weight: Of the task; None: it is absent.
    """
    with random_state_kept():
        experiment = experiment_from(setting.make)
        setting.snapshot.put_back(experiment)
        weights = {
            t: (weight if t == setting.task else w)
            for t, w in experiment.weights.items()
            if t != setting.task or weight is not None
        }
        watch = _Watch()
        try:
            LockstepArm(experiment, {t: float(w or 0.0) for t, w in weights.items()}, setting.task, [watch]).advance()
        except _StepSeen:
            pass
        finally:
            setting.snapshot.put_back(experiment)
        return watch.found


_RENORMALISED, _MEAN, _OTHER = "renormalised weights", "mean over tasks", "weights"


def name_weights_door(setting: Setting, weight: float) -> tuple[str, str]:
    """What the door ``weights`` is, more closely: by the factors that the other tasks get at three weights of the task.

    Returns:
        A name, and the evidence in words.
    """
    doses = (weight, weight + 1.0, weight + 3.0)
    found = [_weights_in_force(setting, w) for w in (None, *doses)]
    if any(f is None or not f.residual < _TOLERANCE for f in found):
        worst = max((f.residual for f in found if f is not None), default=math.nan)
        return _OTHER, f"{worst:.2g} of the gradient is no combination of the tasks' gradients"
    alone, *factors = [_mean_factor(f, setting.task) for f in found if f is not None]
    said = ", ".join(f"{factor:.4g} at weight {w:g}" for w, factor in zip(doses, factors, strict=True))
    evidence = f"the others' weights are multiplied by {alone:.4g} without the task, and with it by {said}"
    if max(factors) - min(factors) > _TOLERANCE * max(factors):
        others = sum(w for t, w in (found[0].given if found[0] else {}).items())
        sums = [factor * (others + w) for w, factor in zip(doses, factors, strict=True)]
        constant = max(sums) - min(sums) < 0.05 * max(sums)
        return _RENORMALISED, evidence + (f"; the weights always sum to {sums[-1]:.4g}" if constant else "")
    return (_MEAN if abs(factors[0] - alone) > _TOLERANCE * alone else _OTHER), evidence


def _mean_factor(found: _InForce, task: str) -> float:
    ratios = [u / found.given[t] for t, u in found.used.items() if t != task and found.given[t] and not math.isnan(u)]
    return sum(ratios) / len(ratios) if ratios else math.nan
