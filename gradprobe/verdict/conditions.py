"""Which runs belong together, whether they may be compared, and where they differ from what was planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradprobe.errors import UsageError
from gradprobe.messages import Message
from gradprobe.verdict.evidence import CONDITIONS, SHOULD_BE_EQUAL, Evidence

__all__ = ["GOES_BY"]


_NEEDED_FOR_PAIRS = ("data", "initial weights", "batches")
"""What files have to show before seeds are compared one by one."""

GOES_BY = "plan.goes_by"
"""The key of what this comparison takes otherwise than planned."""


@dataclass(frozen=True)
class ArmRuns:
    """The runs of one arm.

    Attributes:
        name: Of the arm.
        runs: Seed -> run, in order of seeds.
        again: Runs that were made twice or more: groups of files of one seed and the same settings.
        ordered: Whether seeds are places in the order of the files, since a file says none.
    """

    name: str
    runs: Mapping[int, Evidence]
    again: Sequence[Sequence[Evidence]] = ()
    ordered: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """Of its first run."""
        return next(iter(self.runs.values())).tasks

    @property
    def single(self) -> str:
        """The task that it trains alone; empty: several."""
        return next(iter(self.runs.values())).single


def data_sets(group: ArmRuns) -> int:
    """From how many data sets the runs of an arm learned; 0: a file does not say."""
    found = {str(run.provenance.get("data.fingerprint", "")) for run in group.runs.values()}
    return 0 if "" in found else len(found)


def runs_by_arm(evidence: Sequence[Evidence]) -> dict[str, ArmRuns]:
    """Runs by arm.

    Raises:
        UsageError: Two files of one arm and seed have other settings.
    """
    by_arm: dict[str, list[Evidence]] = {}
    for run in evidence:
        by_arm.setdefault(run.arm, []).append(run)
    return {name: _arm(name, runs) for name, runs in by_arm.items()}


def _arm(name: str, runs: list[Evidence]) -> ArmRuns:
    ordered = any(run.seed is None for run in runs)
    if ordered:
        runs = [replace(run, seed=place) for place, run in enumerate(runs)]
    by_seed: dict[int, list[Evidence]] = {}
    for run in runs:
        assert run.seed is not None
        same = by_seed.setdefault(run.seed, [])
        if not any(run.made == other.made and _what_it_is(run) == _what_it_is(other) for other in same):
            same.append(run)  # a copy of a file is no second run
    _refuse_copies(name, by_seed)
    for same in by_seed.values():
        same.sort(key=_in_order)
    again = [same for same in by_seed.values() if len(same) > 1]
    for same in again:
        other = next((run for run in same[1:] if _what_it_is(run) != _what_it_is(same[0])), None)
        if other is not None:
            both = f"{same[0].file} and {other.file}"
            who = f"two files named {other.file}" if same[0].file == other.file else both
            raise UsageError(
                f"{who} are both of arm {name!r} and seed {other.seed}, and have other "
                f"settings. Name the arms apart: --arm {name}=GLOB --arm other=GLOB."
            )
    return ArmRuns(name, {seed: by_seed[seed][0] for seed in sorted(by_seed)}, again, ordered)


def _in_order(run: Evidence) -> tuple[int, str]:
    """Which of the files of a run that was made twice is the run: not the order in which they were named decides."""
    return len(run.file), run.file


def _refuse_copies(name: str, by_seed: Mapping[int, Sequence[Evidence]]) -> None:
    """Two seeds with the same numbers are one run, and would make any interval too narrow.

    Raises:
        UsageError: There are such.
    """
    seen: dict[str, Evidence] = {}
    for run in (same[0] for same in by_seed.values()):
        other = seen.setdefault(run.content, run)
        if other is not run and len(run.step):
            raise UsageError(
                f"{other.file} and {run.file} of arm {name!r} hold the same numbers under two seeds: they are one run. "
                "Leave one of them out."
            )


def _what_it_is(run: Evidence) -> tuple[str, ...]:
    """Settings and conditions, for telling a repeated run from another one."""
    facts = {**run.setting, **{key: value for each in run.conditions.values() for key, value in each.items()}}
    return (run.trainer, *(f"{key}={np.ravel(value).tolist()}" for key, value in sorted(facts.items())))


# ---- whether two runs may be compared


def differences(one: Evidence, other: Evidence) -> list[Message]:
    """Conditions that are known to differ, each with both values."""
    found = [
        Message("difference.values", what=_term(name), name=key, one=_short(mine[key]), other=_short(theirs[key]))
        for name in CONDITIONS
        for mine, theirs in [(one.conditions[name], other.conditions[name])]
        for key in mine
        if key in theirs and not _equal(mine[key], theirs[key])
    ]
    return found if one.finished == other.finished else [*found, Message("difference.end")]


def _term(condition: str) -> Message:
    return Message(f"term.{condition.replace(' ', '_')}")


def _not_shown(one: Evidence, other: Evidence) -> list[Message]:
    """Conditions of a pair that the files do not show."""
    return [_term(name) for name in _NEEDED_FOR_PAIRS if not (one.conditions[name] and other.conditions[name])]


def refusal(baseline: ArmRuns, arm: ArmRuns, paired: bool | None) -> Message | None:
    """Why an arm is not compared with the baseline; None: it may be.

    Args:
        baseline, arm: The runs.
        paired: True: the user says that runs of one seed belong together; False: that they do not; None: the files
            have to show it.
    """
    if paired is False:
        return None
    common = [seed for seed in arm.runs if seed in baseline.runs]
    if not common:
        return Message("refusal.no_common_seed", arm=arm.name, baseline=baseline.name)
    for seed in common:
        one, other = baseline.runs[seed], arm.runs[seed]
        found = differences(other, one)  # in the order of their names in the sentence
        if found:
            return Message("refusal.differ", other=other.file, one=one.file, seed=seed, what=found)
        missing = _not_shown(one, other)
        if missing and paired is None:
            return Message("refusal.not_shown", other=other.file, one=one.file, what=missing)
        if (baseline.ordered or arm.ordered) and paired is None:
            return Message("refusal.no_seeds", arm=arm.name if arm.ordered else baseline.name)
    return None


_PER_SEED = ("seed", "from_run", "task_weights", "double", "double_sizes")
"""Settings that may differ from seed to seed: some trainers take theirs from a run of the same seed."""


def mixed(group: ArmRuns) -> Iterator[Message]:
    """Settings that differ within an arm."""
    runs = list(group.runs.values())
    for name in runs[0].setting:
        if name not in _PER_SEED:
            other = next((run for run in runs if not _equal(run.setting.get(name), runs[0].setting[name])), None)
            if other is not None:
                yield Message(
                    "caution.mixed",
                    arm=group.name,
                    name=name,
                    one=_short(runs[0].setting[name]),
                    file=runs[0].file,
                    other=_short(other.setting.get(name)),
                    another=other.file,
                )


def cautions(baseline: ArmRuns, arm: ArmRuns, paired: bool | None) -> Iterator[Message]:
    """What does not forbid a comparison, and has to be known."""
    pairs = [(baseline.runs[s], run) for s, run in arm.runs.items() if s in baseline.runs]
    if paired is False and pairs:
        found = differences(*pairs[0][::-1])
        if found:
            yield Message("caution.differ", arm=arm.name, baseline=baseline.name, what=found)
    else:
        apart = sorted(set(baseline.runs) ^ set(arm.runs))
        if apart:
            yield Message("caution.seeds", arm=arm.name, baseline=baseline.name, seeds=apart)
    if pairs:
        one, other = pairs[0]
        unequal = [
            Message("caution.setting", name=name, one=_short(other.setting[name]), other=_short(one.setting[name]))
            for name in SHOULD_BE_EQUAL
            if name in one.setting and name in other.setting and not _equal(one.setting[name], other.setting[name])
        ]
        if unequal:
            yield Message("caution.also", arm=arm.name, baseline=baseline.name, what=unequal)


def _equal(one: Any, other: Any) -> bool:
    return bool(np.array_equal(np.ravel(one), np.ravel(other)))


def _short(value: Any) -> str:
    text = ", ".join(map(str, np.ravel(value).tolist()))
    return text if len(text) <= 16 else text[:12] + "..."


# ---- the plan


def plan_of(evidence: Sequence[Evidence]) -> dict[str, Any]:
    """What was fixed before the runs, as the first file that holds a plan says it."""
    return next((run.plan for run in evidence if run.plan), {})


def disagreements(
    evidence: Sequence[Evidence], groups: Mapping[str, ArmRuns], plan: Mapping[str, Any], now: Mapping[str, Any]
) -> list[Message]:
    """Where files, or this comparison, differ from the plan.

    Args:
        evidence: All runs.
        groups: The same by arm.
        plan: See :func:`plan_of`.
        now: What this comparison goes by, under the plan's names.
    """
    if not plan:
        return []
    return [
        *_of_this_comparison(plan, now),
        *_of_seeds(groups, plan),
        *(message for run in evidence for message in _of_a_file(run, plan)),
    ]


def _of_this_comparison(plan: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Message]:
    for name, value in now.items():
        if name in plan and not _equal(plan[name], value):
            yield Message(GOES_BY, name=name, planned=_short(plan[name]), now=_short(value))


def _of_seeds(groups: Mapping[str, ArmRuns], plan: Mapping[str, Any]) -> Iterator[Message]:
    planned = {int(seed) for seed in np.ravel(plan.get("seeds", []))}
    for name, found in groups.items():
        missing, more = sorted(planned - set(found.runs)), sorted(set(found.runs) - planned)
        if planned and missing:
            yield Message("plan.seeds_missing", arm=name, seeds=missing)
        if planned and more:
            yield Message("plan.seeds_more", arm=name, seeds=more)
    arms = [str(name) for name in np.ravel(plan.get("arms", []))]
    for name in arms:
        if name not in groups:
            yield Message("plan.arm_missing", arm=name)
    for name in groups:
        if arms and name not in arms:
            yield Message("plan.arm_unplanned", arm=name)


def _of_a_file(run: Evidence, plan: Mapping[str, Any]) -> Iterator[Message]:
    if not run.plan:
        yield Message("plan.none", file=run.file)
        return
    for name in sorted(set(plan) | set(run.plan)):
        if name not in run.plan or name not in plan or not _equal(run.plan[name], plan[name]):
            yield Message("plan.another", file=run.file, name=name)
    for name, value in run.plan.items():
        if name in run.provenance and not _equal(run.provenance[name], value):
            was = _short(run.provenance[name])
            yield Message("plan.otherwise", file=run.file, name=name, planned=_short(value), now=was)
    if not run.finished:
        yield Message("plan.unfinished", file=run.file)
