"""What a study consists of: its arms, and one run for each of them and each seed. Pure functions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from gradprobe.errors import UsageError

__all__ = ["Arm", "Planned", "chains", "check_baseline", "choose", "make_arms", "make_runs", "parse_seeds"]


_SINGLE = "single"

_MADE_FROM = {"gradnorm-static": "gradnorm", "split": "joint"}
"""Trainers that need an earlier run (``--from``), and of which trainer."""

_MOST_SEEDS = 10_000

LONGEST = 100
"""Characters of an arm's name, so that those of its files fit every file system."""


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone.

    Attributes:
        name: In file names and answers.
        trainer: As ``gradprobe record --trainer`` takes it.
        flags: What else this arm is recorded with.
        source: The arm of whose run of the same seed it is made; empty: of none.
    """

    name: str
    trainer: str
    flags: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Planned:
    """One run.

    Attributes:
        arm, seed: Which.
        again: It is the second run of its arm and seed: what differs from the first is no effect of anything.
    """

    arm: Arm
    seed: int
    again: bool = False

    @property
    def name(self) -> str:
        """Of its file, without suffix."""
        return f"{self.arm.name}-s{self.seed}" + ("-again" if self.again else "")

    @property
    def source(self) -> str:
        """Name of the run that it is made from; empty: none."""
        return f"{self.arm.source}-s{self.seed}" if self.arm.source else ""


def parse_seeds(text: str) -> tuple[int, ...]:
    """``5``: 0 to 4; ``3,7``: those two.

    Raises:
        UsageError: No whole numbers from 0 on, none, one twice, too many, or one that no file can hold.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and len(word) < 20 for word in words):
        raise UsageError(f"--seeds {text[:80]!r}: write how many (5), or which (0,1,2).")
    if len(words) > _MOST_SEEDS or ("," not in text and int(words[0]) > _MOST_SEEDS):
        raise UsageError(f"--seeds {text[:80]!r}: a study has at most {_MOST_SEEDS:,}.")
    seeds = tuple(map(int, words)) if "," in text else tuple(range(int(words[0])))
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text[:80]!r}: names {'none' if not seeds else 'one twice'}.")
    if max(seeds) >= 2**63:
        raise UsageError(f"--seeds {text[:80]!r}: a seed is a whole number from 0 to 2^63 - 1.")
    return seeds


def make_arms(trainers: Sequence[str], more: Sequence[str], tasks: Sequence[str]) -> tuple[Arm, ...]:
    """The arms, in order.

    Args:
        trainers: As on the command line; ``single`` stands for one arm per task.
        more: Arms with flags of their own, as ``NAME=TRAINER --flag value ...``.
        tasks: Of the data.

    Raises:
        UsageError: Two arms of one name, a malformed arm, or one that needs a run that no arm gives.
    """
    arms: list[Arm] = []
    for trainer in trainers:
        if trainer == _SINGLE:
            arms += [Arm(f"{_SINGLE}-{task}", _SINGLE, ("--task", task)) for task in tasks]
        else:
            arms.append(Arm(_named(trainer.rpartition(":")[2], trainer), trainer))  # of a user's module: the class
    arms += [_parse(text) for text in more]
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"arm {twice[0]!r} is there twice; give one of them another name: --arm NAME=TRAINER.")
    if not arms:
        raise UsageError("no arm: name at least one in --trainers, such as --trainers single,joint,gradnorm,dual.")
    return tuple(_with_source(arm, arms) for arm in arms)


def _named(name: str, text: str) -> str:
    """The name of an arm, which is that of files.

    Raises:
        UsageError: It would be the name of other files, or an option.
    """
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name[0] in "-." or len(name) > LONGEST:
        raise UsageError(
            f"arm {text!r}: write NAME=TRAINER, with flags of this arm behind it: "
            "--arm 'light=joint --task-weights det=1,cls=0.1'. A name has letters, digits, -, _ and dots, "
            f"{LONGEST} at most."
        )
    return name


def _parse(text: str) -> Arm:
    name, _, rest = text.partition("=")
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UsageError(f"--arm {text!r}: {error}.") from None
    name = _named(name if words else "", text)
    return Arm(name, words[0], tuple(words[1:]))


def _with_source(arm: Arm, arms: Sequence[Arm]) -> Arm:
    needed = _MADE_FROM.get(arm.trainer)
    if needed is None or "--from" in arm.flags:
        return arm
    source = next((other.name for other in arms if other.trainer == needed), None)
    if source is None:
        raise UsageError(
            f"arm {arm.name!r}: {arm.trainer} is made from a run of {needed} with the same seed, and no arm has that. "
            f"Add {needed} to --trainers."
        )
    return Arm(arm.name, arm.trainer, arm.flags, source)


def check_baseline(arms: Sequence[Arm], baseline: str) -> Arm:
    """The arm that others are compared with.

    Raises:
        UsageError: There is no such arm.
    """
    by_name: Mapping[str, Arm] = {arm.name: arm for arm in arms}
    if baseline not in by_name:
        near = get_close_matches(baseline, by_name, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--baseline {baseline!r}: no arm is called so (there are: {', '.join(by_name)}).{hint}")
    return by_name[baseline]


def make_runs(arms: Sequence[Arm], seeds: Sequence[int], baseline: Arm) -> tuple[Planned, ...]:
    """Every arm with every seed, a seed at a time, so that a study that is cut short has whole seeds.

    The baseline's first seed is there twice, last of that seed. A run comes behind the one that it is made from.
    """
    runs: list[Planned] = []
    for seed in seeds:
        own = [Planned(arm, seed) for arm in arms]
        runs += [run for run in own if not run.source] + [run for run in own if run.source]
        if seed == seeds[0]:
            runs.append(Planned(baseline, seed, again=True))
    return tuple(runs)


def choose(runs: Sequence[Planned], names: str) -> tuple[Planned, ...]:
    """The runs of these names, and those that they are made from.

    Args:
        runs: Of the study.
        names: Such as ``joint-s0,gradnorm-static-s0``; empty: all.

    Raises:
        UsageError: No run is called so.
    """
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    unknown = sorted(wanted - {run.name for run in runs})
    if unknown:
        near = get_close_matches(unknown[0], [run.name for run in runs], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--only {unknown[0]!r}: no run of this study is called so.{hint}")
    wanted |= {run.source for run in runs if run.name in wanted}
    return tuple(run for run in runs if not names or run.name in wanted)


def chains(runs: Sequence[Planned]) -> list[list[Planned]]:
    """Runs that have to follow each other, as one is made from the other; most are alone."""
    heads: dict[str, list[Planned]] = {}
    for run in runs:
        heads.setdefault(run.source if run.source in heads else run.name, []).append(run)
    return list(heads.values())
