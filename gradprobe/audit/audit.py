"""The whole audit: the same twice, the difference, its doors, and its dose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gradprobe.audit import compare, in_force
from gradprobe.audit.arm import Door
from gradprobe.audit.attribution import OPEN, SHUT, Attribution, DoorFinding, attribute, evidence
from gradprobe.audit.doors import DIRECT, DOORS, PRECONDITIONER, WEIGHTS
from gradprobe.audit.experiment import Factory, made
from gradprobe.audit.pair import PairOutcome, Setting, setting
from gradprobe.audit.snapshot import random_state_kept
from gradprobe.errors import UsageError

_DOSES = (0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1.0)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
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
class Dose:
    """What other weights of the task do.

    Attributes:
        weights, displacement, kinds: One entry per weight.
        kind: See :func:`gradprobe.audit.compare.dose_kind`.
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
    options: Options
    same_twice: PairOutcome
    outcome: PairOutcome
    attribution: Attribution | None = None
    dose: Dose | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether the task changes nothing, bit for bit."""
        return self.outcome.kind == compare.CLEAN

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


def audit(make: Factory, task: str, options: Options | None = None, *, progress: Progress = lambda what: None) -> Audit:
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
    options = options or Options()
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
        others = tuple(t for t in _make_weights(where) if t != task)
        result = Audit(task, others, options, twice, outcome, notes=notes(twice))
        if options.attribute:
            result.attribution = _doors_of(where, result, envelope, progress)
        if options.dose:
            result.dose = _doses(where, envelope, progress)
    return result


def _make_weights(where: Setting) -> list[str]:
    """Names of all tasks."""
    return list(made(where.make).weights)


def notes(twice: PairOutcome) -> list[str]:
    """What limits the audit."""
    if twice.kind == compare.CLEAN:
        return []
    return [
        f"the same training run twice is not bitwise equal ({twice.kind}, {twice.ulp.max(initial=0.0):.3g} ulp): that "
        "is the tolerance here. Use deterministic kernels, and put everything that has a state into Experiment.state."
    ]


def _doors_of(where: Setting, found: Audit, envelope: float, progress: Progress) -> Attribution:
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
            finding.name, finding.evidence = in_force.named(where, weight)
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
    if total > 10 * plain and total > compare.ROUNDING:
        adam.state = OPEN
    return [direct, adam]


def _doses(where: Setting, envelope: float, progress: Progress) -> Dose:
    """Run all of :data:`_DOSES`."""
    outcomes = []
    for weight in _DOSES:
        progress(f"weight {weight:g}")
        outcomes.append(where.run(weight, envelope=envelope))
    displacement = [o.largest if o.kind not in (compare.CLEAN, compare.NUMERIC) else 0.0 for o in outcomes]
    kind, slope = compare.dose_kind(_DOSES, displacement)
    return Dose(_DOSES, [o.largest for o in outcomes], [o.kind for o in outcomes], kind, slope)
