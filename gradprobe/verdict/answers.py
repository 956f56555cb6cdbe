"""What a comparison says: plain data, with messages in the place of sentences, and the same as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradprobe.ledger.windows import Gate
from gradprobe.messages import Message

__all__ = [
    "Answer",
    "ArmLevel",
    "Comparison",
    "DIRECTION",
    "DOMINANCE",
    "INTERFERENCE",
    "OUTCOME",
    "QUESTIONS",
    "Similarity",
    "plain",
    "verdict_key",
]


DIRECTION, INTERFERENCE, DOMINANCE, OUTCOME = "direction", "interference", "dominance", "outcome"
QUESTIONS = (DIRECTION, INTERFERENCE, DOMINANCE, OUTCOME)
"""In the order in which they are shown. They have separate answers, and none replaces another."""

REDUCED, EQUIVALENT, UNCERTAIN = "REDUCED", "EQUIVALENT", "REDUCED (size uncertain)"
INCREASED, _NOT_REDUCED, INCONCLUSIVE = "INCREASED", "NOT REDUCED", "INCONCLUSIVE"
BY_RULE = ("", REDUCED, EQUIVALENT, UNCERTAIN, INCREASED, _NOT_REDUCED, INCONCLUSIVE)
"""The verdict of each rule, from 1."""

UNDEFINED = "UNDEFINED"
"""A gate failed: there are numbers, and no claim may rest on them."""

NOT_APPLICABLE = "NOT APPLICABLE"
"""The question has no meaning for this arm: it shares no layer, or trains one task."""

NO_VERDICT = "NO VERDICT"
"""What a verdict needs is missing: a control, seeds, equal conditions, or the measurement."""

OPEN = (INCONCLUSIVE, UNDEFINED, NO_VERDICT)
"""Verdicts that leave the question open."""

KEYS = {
    REDUCED: "reduced",
    UNCERTAIN: "reduced_uncertain",
    EQUIVALENT: "equivalent",
    INCREASED: "increased",
    _NOT_REDUCED: "not_reduced",
    INCONCLUSIVE: "inconclusive",
    UNDEFINED: "undefined",
    NOT_APPLICABLE: "not_applicable",
    NO_VERDICT: "no_verdict",
}
"""The verdicts, and what they are called in keys."""


def verdict_key(verdict: str) -> str:
    """The key of a verdict; one that this version does not know says nothing.

    >>> verdict_key("NOT REDUCED")
    'not_reduced'
    """
    return KEYS.get(verdict, "no_verdict")


@dataclass(frozen=True)
class Direct:
    """The effect of an arm's weights at the baseline's own checkpoints, without what the rest of its training adds.

    Attributes:
        effect, low95, high95: Of the difference, in the unit of the answer.
        baseline_values, arm_values: Per seed, in the order of the answer's ``seeds``.
        sentence: What it says, and what it cannot.
    """

    effect: float
    low95: float
    high95: float
    baseline_values: Sequence[float]
    arm_values: Sequence[float]
    sentence: Message


@dataclass(frozen=True)
class AgainstAlone:
    """A task's progress held against what its own gradients alone would have made at the same states; per run.

    Attributes:
        baseline_shrunk, arm_shrunk: The part of its lone progress that is gone as its own steps are shorter; in the
            order of ``baseline_values`` and ``arm_values``. NaN: not known.
        baseline_lost, arm_lost: The same with what all other tasks' parts of the updates take.
    """

    baseline_shrunk: Sequence[float]
    arm_shrunk: Sequence[float]
    baseline_lost: Sequence[float]
    arm_lost: Sequence[float]


@dataclass(frozen=True)
class Answer:
    """One question about one arm: arm minus baseline of a quantity that is to fall.

    Attributes:
        question: One of :data:`QUESTIONS`.
        arm: Its name.
        subject: Of what: for direction ``det|cls``; for interference ``cls>det``, what cls does to det; for dominance
            ``largest share``; for outcome the metric.
        quantity: What ``effect`` is a difference of, in words.
        verdict: One of :data:`BY_RULE`, or UNDEFINED, NOT APPLICABLE, NO VERDICT.
        rule: 1 to 6, which rule gave it; None: none did.
        effect: Mean over seeds of arm minus baseline; below 0: it fell. NaN: not known.
        low95, high95, low90, high90: Student's t intervals over seeds, not adjusted for the number of comparisons.
        p_material, p_zero, p_increased: One-sided, of the nulls that rules 1, 3 and 4 reject: "it fell by no more than
            the margin", "it did not fall", "it did not rise".
        p_equivalent, p_not_reduced: The same of rules 2 and 5: "it changed by the margin or more" and "it fell by the
            margin or more".
        p_material_holm, p_zero_holm, p_increased_holm, p_equivalent_holm, p_not_reduced_holm: Adjusted over the arms
            and subjects of the question; rules 1, 3 and 4 need at most .025, rules 2 and 5 at most .05.
        margin: Smaller differences do not matter; fixed before the runs.
        n: Seeds behind the interval.
        seeds: Of those.
        baseline_values, arm_values: Per seed; for paired runs in the order of ``seeds``.
        gates: What the number had to pass.
        reason: One sentence.
        task: Of an outcome: whose metric it is; empty: of all.
        notes: What has to be known beside it.
        direct: See :class:`Direct`; of interference only.
        alone: See :class:`AgainstAlone`; of interference only.
        sign_flip: p-value by flipping signs, of six seeds or more; NaN: fewer. A check, not used by the rules.
        skewed: Whether the differences are seen to be skewed, so that the interval is too narrow.
        of_means: Whether the effect is a difference of ratios of means over seeds, since a run has nothing to divide by
            of its own; the intervals are then Fieller's, and each run's value is what it adds to its arm's ratio.
    """

    question: str
    arm: str
    subject: str
    quantity: Message
    verdict: str
    rule: int | None = None
    effect: float = math.nan
    low95: float = math.nan
    high95: float = math.nan
    low90: float = math.nan
    high90: float = math.nan
    p_material: float = math.nan
    p_zero: float = math.nan
    p_increased: float = math.nan
    p_equivalent: float = math.nan
    p_not_reduced: float = math.nan
    p_material_holm: float = math.nan
    p_zero_holm: float = math.nan
    p_increased_holm: float = math.nan
    p_equivalent_holm: float = math.nan
    p_not_reduced_holm: float = math.nan
    margin: float = math.nan
    n: int = 0
    seeds: Sequence[int] = ()
    baseline_values: Sequence[float] = ()
    arm_values: Sequence[float] = ()
    gates: Sequence[Gate] = ()
    reason: Message | None = None
    task: str = ""
    notes: Sequence[Message] = ()
    direct: Direct | None = None
    alone: AgainstAlone | None = None
    sign_flip: float = math.nan
    skewed: bool = False
    of_means: bool = False


@dataclass(frozen=True)
class ArmFacts:
    """The runs of one trainer.

    Attributes:
        name: As on the command line, or from the files.
        role: "baseline", "control" (a task alone), or "arm".
        files: Names of its files, in the order of ``seeds``.
        seeds: From the files; where one says none, their places in the order of the arm's files.
    """

    name: str
    role: str
    files: Sequence[str]
    seeds: Sequence[int]


@dataclass(frozen=True)
class ArmLevel:
    """How large a quantity is in one arm, over its seeds: whether there is anything to reduce.

    Attributes:
        question, arm, subject, quantity: As in :class:`Answer`.
        mean, low95, high95: Over seeds.
        values, seeds: Per run; NaN: a gate is closed there. Of a ratio of means over seeds, what each run adds to it.
        sentence: In words.
    """

    question: str
    arm: str
    subject: str
    quantity: Message
    mean: float
    low95: float
    high95: float
    values: Sequence[float]
    seeds: Sequence[int]
    sentence: Message | None = None


@dataclass(frozen=True)
class Similarity:
    """How alike two tasks' gradients are in length in one arm, over its seeds; it is no part of a verdict.

    Attributes:
        arm: Its name.
        subject: ``det|cls``.
        mean, low95, high95: Over seeds, of 2 |a| |b| / (|a|^2 + |b|^2) from squares less their noise: 1 where both are
            equally long.
        values, seeds: Per run; NaN: a gradient cannot be distinguished from noise.
    """

    arm: str
    subject: str
    mean: float
    low95: float
    high95: float
    values: Sequence[float]
    seeds: Sequence[int]


@dataclass(frozen=True)
class LayerAnswer:
    """One layer, looked at after the trunk: exploratory, it proves nothing.

    Attributes:
        question, arm, subject: As in :class:`Answer`.
        layer: Its name.
        effect, low95, high95: Arm minus baseline, as in :class:`Answer`.
        p: Two-sided, of no difference.
        discovery: By Benjamini and Hochberg's procedure at a false discovery rate of 10 % over all of these.
    """

    question: str
    arm: str
    subject: str
    layer: str
    effect: float
    low95: float
    high95: float
    p: float
    discovery: bool


@dataclass(frozen=True)
class Comparison:
    """Everything that ``gradprobe compare`` found.

    Attributes:
        headline: Sentences that say it in words, the first one first.
        baseline: Name of the arm that the others are compared with; empty: there is none.
        controls: Names of the arms that train one task alone.
        arms: All of them.
        tasks: Names.
        paired: Whether seeds were compared one by one.
        window: Steps of training that count, from the first up to before the second; None: all.
        plan: What was fixed before the runs, as stored in the files; empty: nothing was.
        common_layers: Shared by all tasks in every arm that shares any. An answer is over the layers that its arm has
            in common with the baseline.
        left_out_layers: Shared in some of those arms only.
        answers: One per question, arm and subject.
        levels: How large each quantity is in each arm, the baseline first.
        similarities: How alike gradients are in length, by arm and pair, the baseline first.
        layers: Exploratory.
        scope: What the intervals do not cover, for all answers alike.
        refusals: What was asked for and is not given, and why.
        warnings: What in the files misleads.
        disagreements: Where files, or this comparison, differ from the plan.
    """

    headline: Sequence[Message]
    baseline: str
    controls: Sequence[str]
    arms: Sequence[ArmFacts]
    tasks: Sequence[str]
    paired: bool = True
    window: tuple[int, int] | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    common_layers: Sequence[str] = ()
    left_out_layers: Sequence[str] = ()
    answers: Sequence[Answer] = ()
    levels: Sequence[ArmLevel] = ()
    similarities: Sequence[Similarity] = ()
    layers: Sequence[LayerAnswer] = ()
    scope: Sequence[Message] = ()
    refusals: Sequence[Message] = ()
    warnings: Sequence[Message] = ()
    disagreements: Sequence[Message] = ()

    def of(self, question: str) -> list[Answer]:
        """The answers to one question."""
        return [answer for answer in self.answers if answer.question == question]

    @property
    def open(self) -> bool:
        """Whether the primary question, interference, was left open for an arm and pair, or not answered at all."""
        found = self.of(INTERFERENCE)
        return not found or any(answer.verdict in OPEN for answer in found)

    @property
    def increased(self) -> list[Answer]:
        """What is worse than in the baseline."""
        return [answer for answer in self.answers if answer.verdict == INCREASED]


def plain(value: Any) -> Any:
    """Data of a verdict as JSON can hold it: names of the attributes, messages in English, None for an unknown number.

    Each ``reason`` has its ``reason_key``, which stays as it is where wording gets better.
    """
    if isinstance(value, Message):
        return str(value)
    if dataclasses.is_dataclass(value):
        found = {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
        reason = getattr(value, "reason", None)
        return found if reason is None else {**found, "reason_key": reason.key}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):  # numpy's
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
