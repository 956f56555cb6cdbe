"""The whole audit: the same twice, the difference, its doors, and its dose; and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradprobe.audit import attribution, differences
from gradprobe.audit.arm import Door
from gradprobe.audit.attribution import OPEN, SHUT, Attribution, DoorFinding, attribute, evidence
from gradprobe.audit.differences import growth_exponent
from gradprobe.audit.doors import DIRECT, DOORS, PRECONDITIONER, WEIGHTS
from gradprobe.audit.experiment import Factory, experiment_from, random_state_kept
from gradprobe.audit.pair import PairOutcome, Setting, setting
from gradprobe.errors import UsageError

__all__ = ["AUDIT_COLUMNS", "audit_as_plain", "audit_lines", "audit_rows"]


_DOSES = (0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1.0)

_Progress = Callable[[str], None]


@dataclass(frozen=True)
class AuditOptions:
    """What to do.

    Attributes:
        steps: In lockstep.
        weight: Of the task in the training that has it.
        dose: Whether to run :data:`_DOSES` as well.
        attribute: Whether to look for doors; without it only the difference is found.
    """

    steps: int = 30
    weight: float = 0.0
    dose: bool = False
    attribute: bool = True


@dataclass
class _Dose:
    """What other weights of the task do.

    Attributes:
        weights, displacement, kinds: One entry per weight.
        kind: See :func:`gradprobe.audit.differences.dose_kind`.
        slope: Of log displacement over log weight.
    """

    weights: Sequence[float]
    displacement: list[float]
    kinds: list[str]
    kind: str
    slope: float


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        task, others, options: What was asked.
        same_twice: The training without the task against itself: its envelope is the tolerance of all the rest.
        outcome: With the task against without.
        attribution: The doors; None where none were looked for.
        dose: None unless it was asked for.
    """

    task: str
    others: tuple[str, ...]
    options: AuditOptions
    same_twice: PairOutcome
    outcome: PairOutcome
    attribution: Attribution | None = None
    dose: _Dose | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether the task changes nothing, bit for bit."""
        return self.outcome.kind == differences.CLEAN

    def curves(self) -> dict[str, list[float]]:
        """Displacement after each step: with all doors as they are, and, of several open ones, with each alone."""
        doors = self.attribution.open if self.attribution else []
        alone = {f"{f.name} alone": f.curve for f in doors if f.curve} if len(doors) > 1 else {}
        return {"as it is": [float(d) for d in self.outcome.displacement], **alone}

    @property
    def sentence(self) -> str:
        """The finding, in a sentence."""
        others, at = ", ".join(self.others), f"at weight {self.options.weight:g}"
        if self.clean:
            return (
                f"Clean: bitwise equal for {self.outcome.steps} steps. {self.task} {at} changes nothing for {others}."
            )
        doors = self.attribution.open if self.attribution else []
        through = f", through: {' and '.join(f.name for f in doors)}" if doors else ""
        unknown = self.attribution is not None and not self.attribution.explained
        return f"{self.task} {at} changes {others}: {self.outcome.kind}{through}." + (
            " No set of the known doors explains it." if unknown else ""
        )


def audit(
    make: Factory, task: str, options: AuditOptions | None = None, *, progress: _Progress = lambda what: None
) -> Audit:
    """Whether a task still changes the others, and how.

    Args:
        make: Returns an experiment; called for each of some forty short trainings. It may return the same objects each
            time: they end as they began, and so do the global random streams.
        task: The one to be taken away.
        options: How long, and at which weight.
        progress: Is told what goes on.

    Raises:
        UsageError: No such task, or the step function does not do as :class:`gradprobe.audit.Trace` says.
    """
    options = options or AuditOptions()
    if options.steps < 1 or not 0 <= options.weight < math.inf:
        raise UsageError(
            f"--steps {options.steps}, --weight {options.weight}: at least 1 step, and a finite weight of 0 or more."
        )
    with random_state_kept():
        where = setting(make, task, options.steps)
        progress("the same twice")
        twice = where.run(None)
        envelope = float(twice.ulp.max(initial=0.0))
        progress("with and without the task")
        outcome = where.run(options.weight, envelope=envelope, evaluate=True)
        others = tuple(t for t in experiment_from(where.make).weights if t != task)
        result = Audit(task, others, options, twice, outcome, notes=_notes(twice))
        if options.attribute:
            result.attribution = _doors_of(where, result, envelope, progress)
        if options.dose:
            result.dose = _doses(where, envelope, progress)
    return result


def _notes(twice: PairOutcome) -> list[str]:
    """What limits the audit."""
    if twice.kind == differences.CLEAN:
        return []
    return [
        f"the same training run twice is not bitwise equal ({twice.kind}, {twice.ulp.max(initial=0.0):.3g} ulp): that "
        "is the tolerance here. Use deterministic kernels, and put everything that has a state into Experiment.state."
    ]


def _doors_of(where: Setting, found: Audit, envelope: float, progress: _Progress) -> Attribution:
    """Attribute the difference; above weight 0 what is left when the task's own gradient is kept out."""
    weight = found.options.weight
    intended = [DIRECT] if weight > 0 else []

    def run(shut: Sequence[Door]) -> PairOutcome:
        held = [*shut, *intended]
        progress("shut: " + ", ".join(door.name for door in held))
        return where.run(weight, held, envelope=envelope)

    before = run([]) if intended else found.outcome
    result = attribute(before, DOORS, run)
    for finding in result.findings:
        finding.name = finding.door.name
        if finding.state == OPEN and finding.door is WEIGHTS:
            finding.name, finding.evidence = attribution.name_weights_door(where, weight)
    if intended:
        result.findings += _own_gradient(where, found, before, envelope)
    return result


def _own_gradient(where: Setting, found: Audit, without: PairOutcome, envelope: float) -> list[DoorFinding]:
    """The intended way, and whether the optimizer makes more of it than its weight."""
    total = found.outcome.largest
    direct = DoorFinding(DIRECT, SHUT if total == without.largest else OPEN, name=DIRECT.name, closed=without.largest)
    direct.contribution = total
    direct.evidence = evidence(found.outcome)
    plain = where.run(found.options.weight, [PRECONDITIONER], envelope=envelope).largest
    adam = DoorFinding(PRECONDITIONER, name=PRECONDITIONER.name, closed=plain, contribution=total)
    adam.evidence = f"displacement {total:.2g}; {plain:.2g} with plain gradient descent"
    if total > 10 * plain and total > differences.ROUNDING:
        adam.state = OPEN
    return [direct, adam]


def _doses(where: Setting, envelope: float, progress: _Progress) -> _Dose:
    """Run all of :data:`_DOSES`."""
    outcomes = []
    for weight in _DOSES:
        progress(f"weight {weight:g}")
        outcomes.append(where.run(weight, envelope=envelope))
    displacement = [o.largest if o.kind not in (differences.CLEAN, differences.NUMERIC) else 0.0 for o in outcomes]
    kind, slope = differences.dose_kind(_DOSES, displacement)
    return _Dose(_DOSES, [o.largest for o in outcomes], [o.kind for o in outcomes], kind, slope)


AUDIT_COLUMNS = ("door", "state", "contribution", "left when shut", "evidence", "how to shut it")


def audit_as_plain(found: Audit) -> dict[str, Any]:
    """All of it as what JSON can hold; numbers that are not finite are null."""
    outcome, attribution, dose = found.outcome, found.attribution, found.dose
    return {
        "task": found.task,
        "others": list(found.others),
        "weight": found.options.weight,
        "steps": outcome.steps,
        "clean": found.clean,
        "class": outcome.kind,
        "sentence": found.sentence,
        "same_twice": found.same_twice.kind,
        "tolerance_ulp": _number(found.same_twice.ulp.max(initial=0.0)),
        "displacement": [_number(d) for d in outcome.displacement],
        "ulp": [_number(u) for u in outcome.ulp],
        "growth_exponent": _number(growth_exponent(list(outcome.displacement))),
        "steps_in_one_arm_alone": outcome.skipped,
        "first_differences": [
            {
                "step": s.step,
                "stage": s.stage,
                "tensor": s.name,
                "largest": _number(s.size.largest),
                "relative": _number(s.size.relative),
                "ulp": _number(s.size.ulp),
                "what": str(s.size),
            }
            for s in outcome.first_differences
        ],
        "effect": {
            mode: {name: {"without": _number(a), "with": _number(b)} for name, (a, b) in values.items()}
            for mode, values in outcome.effect.items()
        },
        "explained": attribution.explained if attribution else None,
        "left_with_all_shut": attribution.remainder if attribution else None,
        "doors": [_door(finding) for finding in attribution.findings] if attribution else [],
        "dose": {
            "weights": list(dose.weights),
            "displacement": [_number(d) for d in dose.displacement],
            "classes": dose.kinds,
            "kind": dose.kind,
            "slope": _number(dose.slope),
        }
        if dose
        else None,
        "notes": found.notes,
    }


def _door(finding: DoorFinding) -> dict[str, Any]:
    """One door as plain data."""
    return {
        "door": finding.name,
        "state": finding.state,
        "contribution": _number(finding.contribution),
        "left_when_shut": _number(finding.closed),
        "explains_alone": finding.restores,
        "evidence": finding.evidence,
        "what": finding.door.title,
        "how_to_shut": finding.door.remedy,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if math.isfinite(value) else None


def audit_rows(found: Audit) -> list[tuple[str, ...]]:
    """One row per door, in the order of :data:`AUDIT_COLUMNS`."""
    findings: Sequence[DoorFinding] = found.attribution.findings if found.attribution else ()
    return [
        (
            f.name,
            f.state,
            _short(f.contribution),
            _short(f.closed),
            f.evidence,
            f.door.remedy if f.state == "open" else "",
        )
        for f in findings
    ]


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def audit_lines(found: Audit) -> list[str]:
    """What stands around the table."""
    outcome = found.outcome
    said = [found.sentence, *found.notes]
    if not found.clean:
        power = growth_exponent(list(outcome.displacement))
        pace = "" if math.isnan(power) else f", growing as steps^{power:.2g}"
        trained = f"Displacement of what {', '.join(found.others)} trains, relative to how far it came"
        said.append(f"{trained}: {outcome.last:.3g} after {outcome.steps} steps{pace}.")
        said.append("First seen:")
        said += [f"  {difference}" for difference in outcome.first_differences]
    for mode, values in outcome.effect.items():
        for name, (a, b) in values.items():
            said.append(
                f"{name} in {mode} mode after {outcome.steps} steps: {a:.7g} without {found.task}, {b:.7g} with it"
            )
    if found.dose:
        pairs = zip(found.dose.weights, found.dose.displacement, strict=True)
        said.append("Dose: " + ", ".join(f"{w:g}: {d:.2g}" for w, d in pairs) + f". {found.dose.kind}")
    return said


def audit_section(found: Audit) -> str:
    """The audit as a section of a report, in Markdown."""
    body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in audit_rows(found))
    head = f"| {' | '.join(AUDIT_COLUMNS)} |\n|{'---|' * len(AUDIT_COLUMNS)}"
    text = "\n".join(audit_lines(found)[1:])
    return f"## Audit of {found.task}\n\n{found.sentence}\n\n{head}\n{body}\n\n```\n{text}\n```\n"
