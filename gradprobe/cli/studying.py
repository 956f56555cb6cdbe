"""What ``gradprobe study`` does, from its flags to the last run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from click.core import ParameterSource

from gradprobe import whole_files
from gradprobe.cli.options import flag_of, given
from gradprobe.cli.progress import Lines, make_watcher
from gradprobe.cli.recording import Request, settings_of
from gradprobe.errors import GradprobeError, UsageError
from gradprobe.foreign import quoted
from gradprobe.study import agreement, plan
from gradprobe.study.arms import Arm, Planned, chains, check_baseline, choose, make_arms, make_runs, parse_seeds
from gradprobe.study.folder import FINISHED, Folder
from gradprobe.study.runner import DONE, FAILED, SKIPPED, Entry, Launcher, Study, subprocesses
from gradprobe.trainers.problems import allow, kind_of
from gradprobe.trainers.settings import Settings


@dataclass(frozen=True)
class Preset:
    """A whole study by one name."""

    trainers: str
    seeds: str
    record: tuple[str, ...]


PRESETS = {
    # Within an hour on two cores with --jobs 2: 16 runs of 96 steps. The ledger's passes over its probe batch are the
    # larger part of a step, hence fewer images in it; bursts would not help, as momentum outlives them.
    "quick": Preset(
        "single,joint,gradnorm,dual",
        "3",
        (
            *("--data", "phantom", "--imgsz", "64", "--epochs", "4"),
            *("--every", "4", "--probe-every", "8", "--ledger-images", "32"),
        ),
    ),
}

OURS = (
    *("seed", "trainer", "task", "source", "out", "resume", "overwrite", "project", "name", "plan", "arm"),
    "list_trainers",
)
"""Flags of ``gradprobe record`` that the study gives itself."""


@dataclass(frozen=True)
class Asked:
    """What was asked for on the command line; ``record``: flags for every run."""

    out: Path
    trainers: str | None = None
    arms: Sequence[str] = ()
    seeds: str | None = None
    baseline: str = "joint"
    jobs: int | None = None
    preset: str = ""
    window: str = ""
    pairs: str = ""
    margin: float = 0.1
    outcome_margin: float = 0.02
    only: str = ""
    record: Sequence[str] = ()


@dataclass(frozen=True)
class Prepared:
    """What will be done.

    Attributes:
        where: The folder.
        plan: What was fixed.
        runs: Of the study, or those that were asked for.
        common: Flags of every run.
        jobs: How many at a time; None: nobody said.
        gpus: That a run takes.
        whole: Whether all runs of the study are meant.
        notes: For the user.
    """

    where: Folder
    plan: Mapping[str, Any]
    runs: tuple[Planned, ...]
    common: tuple[str, ...]
    jobs: int | None
    gpus: int = 0
    whole: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def left(self) -> list[Planned]:
        """The runs that are not finished."""
        return [run for run in self.runs if self.where.state(run) != FINISHED]


def prepare(asked: Asked, *, check_extras: bool = True, write: bool = True) -> Prepared:
    """Fix everything, find what is wrong before hours of training, and write the plan.

    Args:
        asked: The flags.
        check_extras: Also whether the packages that the trainers need are installed, which imports torch.
        write: The plan; else it is only compared with one that is there, and nothing is written.

    Raises:
        UsageError: Something cannot be meant; or the folder was begun with another plan.
    """
    preset = _preset(asked.preset)
    if asked.jobs is not None and asked.jobs < 1:
        raise UsageError(f"--jobs {asked.jobs}: must be at least 1.")
    for name, value in (("margin", asked.margin), ("outcome-margin", asked.outcome_margin)):
        if not 0 < value < math.inf:
            raise UsageError(f"--{name} {value}: must be a positive number.")
    words = [*(preset.record if preset else ()), *asked.record]
    data = _request(words).flags.get("data", Settings.data)
    allow(data or "")
    tasks = kind_of(data).tasks
    trainers = asked.trainers if asked.trainers is not None else preset.trainers if preset else ""
    arms = make_arms([t.strip() for t in trainers.split(",") if t.strip()], asked.arms, tasks)
    baseline = check_baseline(arms, asked.baseline)
    seeds = parse_seeds(asked.seeds or (preset.seeds if preset else "5"))
    common = (*words, *plan.measuring_flags(_request(words).flags))
    settings = {arm.name: _settings(_request([*common, *arm.flags], arm)) for arm in arms}
    if check_extras:
        _check_trainers(settings.values())
    fixed = _plan(asked, arms, baseline, seeds, common, settings)
    runs = make_runs(arms, seeds, baseline)
    chosen = choose(runs, asked.only)
    where = Folder(asked.out)
    (plan.write if write else plan.check)(where.path, fixed)
    notes = () if len(seeds) >= 3 else ("fewer than 3 seeds give a description and no verdict; take 3 or more.",)
    gpus = max(_gpus(each.device) for each in settings.values())
    return Prepared(where, fixed, chosen, common, asked.jobs, gpus, not asked.only, notes)


def _gpus(device: str) -> int:
    """That ``--device`` names: ``0,1`` are two."""
    return sum(word.strip().isdecimal() for word in device.split(","))


def _preset(name: str) -> Preset | None:
    if name and name not in PRESETS:
        raise UsageError(f"--preset {name}: there is no such preset of a study (there are: {', '.join(PRESETS)}).")
    return PRESETS.get(name)


def _request(words: Sequence[str], arm: Arm | None = None) -> Request:
    """What ``gradprobe record`` would be asked for with these flags.

    Raises:
        UsageError: A flag is the study's own to give.
        click.UsageError: There is no such flag.
    """
    values = _parsed(words)
    own = [name for name in OURS if name in values and not (arm and name == "task")]
    if own:
        better = {"seed": "--seeds", "trainer": "--trainers or --arm", "task": "the trainer single"}.get(own[0])
        said = f"{flag_of(own[0])} is given to each run by the study"
        raise UsageError(said + (f"; use {better}." if better else "."))
    flags = given(values)
    if arm is not None:
        flags["trainer"] = arm.trainer
    return Request(flags=flags, preset=values.get("preset", ""), hyp=values.get("hyp"))


def _settings(request: Request) -> Settings:
    from gradprobe.trainers.hyp import read_hyp

    return settings_of(request, read_hyp(request.hyp) if request.hyp is not None else None)


def _parsed(words: Sequence[str]) -> dict[str, Any]:
    """Parameter of ``record`` -> its value, of those that are on the command line."""
    from gradprobe.cli.record import record

    app = typer.Typer(add_completion=False)
    app.command()(record)
    parser = typer.main.get_command(app)
    with parser.make_context("record", list(words)) as context:
        there = context.get_parameter_source
        return {name: value for name, value in context.params.items() if there(name) is ParameterSource.COMMANDLINE}


def _check_trainers(settings: Any) -> None:
    from gradprobe.trainers.balancer import find_balancer

    for each in settings:
        find_balancer(each.trainer).require(each)


def _plan(
    asked: Asked,
    arms: Sequence[Arm],
    baseline: Arm,
    seeds: Sequence[int],
    common: Sequence[str],
    settings: Mapping[str, Settings],
) -> dict[str, Any]:
    own = settings[baseline.name]
    window = plan.parse_window(asked.window, own, plan.steps_of(own))
    split = getattr(own, "probe_loader", "")
    return {
        "measure": "C",
        **({"window": list(window)} if window else {}),
        "pairs": plan.parse_pairs(asked.pairs, kind_of(own.data).tasks),
        "margin": asked.margin,
        "outcome_margin": asked.outcome_margin,
        "baseline": baseline.name,
        "arms": [arm.name for arm in arms],
        "recorded_with": plan.arm_flags(arms),
        "seeds": list(seeds),
        **({"probe_loader": {"split": split}} if split else {}),
        "record": " ".join(map(plan.without_folder, common)),
        "settings": plan.common(list(settings.values())),
    }


# ---- running


def show(asked: Asked, prepared: Prepared) -> None:
    """Print a command for every run that is not finished, for a cluster; runs made from one another share one.

    Each fixes the plan, or goes by the one that is fixed, and records its run, or goes on with it: in any order, at any
    time, also twice.
    """
    for chain in chains(prepared.left):
        names = ",".join(run.name for run in chain)
        print(" ".join(map(quoted, ["gradprobe", *words(asked), "--only", names, "--", *asked.record])))
    print(f"{len(prepared.left)} of {len(prepared.runs)} runs are left; nothing was written", file=sys.stderr)


def words(asked: Asked) -> list[str]:
    """The command of the study without the flags that choose runs, and those for ``gradprobe record``."""
    named = {
        "--trainers": asked.trainers,
        "--seeds": asked.seeds,
        "--preset": asked.preset,
        "--window": asked.window,
        "--pairs": asked.pairs,
    }
    return [
        *("study", "--out", str(asked.out), "--baseline", asked.baseline),
        *(word for name, value in named.items() if value for word in (name, value)),
        *(word for arm in asked.arms for word in ("--arm", arm)),
        *("--margin", repr(asked.margin), "--outcome-margin", repr(asked.outcome_margin)),
    ]


def run(prepared: Prepared, launch: Launcher | None = None) -> bool:
    """Run what is left, write what became of it, and say what to do next.

    Args:
        prepared: What to run.
        launch: How; a process each, where None.

    Returns:
        Whether no run failed.
    """
    watcher = make_watcher(len(prepared.runs))
    for note in prepared.notes:
        watcher.say(f"note: {note}")
    jobs = prepared.jobs or 1
    watcher.say(f"{len(prepared.runs)} runs, {jobs} at a time; the plan is in {prepared.where.plan}")
    study = Study(prepared.runs, prepared.where, prepared.common, jobs, launch or subprocesses(jobs), prepared.plan)
    with watcher:
        entries = study.run(watcher)
    if not prepared.whole:
        return all(entry.state != FAILED for entry in entries)
    found = results(prepared, entries)
    with whole_files.telling(prepared.where.results):
        whole_files.write(prepared.where.results, json.dumps(found, indent=2) + "\n")
    _tell(watcher, prepared, found)
    return not found["failed"]


def results(prepared: Prepared, entries: Sequence[Entry]) -> dict[str, Any]:
    """What became of every run, whether the first one repeats bit for bit, and whether arms had equal conditions."""
    where = prepared.where
    good = [entry.run for entry in entries if entry.state in (DONE, SKIPPED)]
    runs = [
        {
            "file": where.run(entry.run).name,
            "arm": entry.run.arm.name,
            "seed": entry.run.seed,
            "state": entry.state,
            "seconds": round(entry.seconds, 1),
            **({"reason": entry.reason} if entry.reason else {}),
        }
        for entry in entries
    ]
    return {
        "runs": runs,
        "failed": [where.run(entry.run).name for entry in entries if entry.state == FAILED],
        "again": _again(where, good),
        "unequal": _unequal(where, good),
    }


def _again(where: Folder, good: Sequence[Planned]) -> dict[str, Any] | None:
    """The run that was made twice, bit for bit; None where one of the two is missing."""
    second = next((run for run in good if run.again), None)
    first = next((run for run in good if second and run.arm == second.arm and run.seed == second.seed), None)
    if first is None or second is None or first is second:
        return None
    one, other = where.run(first), where.run(second)
    try:
        found = agreement.differing(one, other)
    except GradprobeError as error:
        return {"files": [one.name, other.name], "identical": False, "differs": [str(error)]}
    return {"files": [one.name, other.name], "identical": not found, "differs": found}


def _unequal(where: Folder, good: Sequence[Planned]) -> dict[str, list[str]]:
    """Seed -> conditions in which its runs differ."""
    found = {}
    for seed in dict.fromkeys(run.seed for run in good):
        names = agreement.unequal([where.run(run) for run in good if run.seed == seed])
        if names:
            found[str(seed)] = names
    return found


def _tell(watcher: Lines, prepared: Prepared, found: Mapping[str, Any]) -> None:
    for each in found["runs"]:
        if each["state"] == FAILED:
            log = prepared.where.path / "logs" / f"{Path(each['file']).stem}.log"
            watcher.say(f"failed: {each['file']}: {each['reason']} (log: {log})")
    again = found["again"]
    if again is not None and again["identical"]:
        watcher.say(f"the same run twice: {again['files'][0]} and {again['files'][1]} are identical, bit for bit")
    elif again is not None:
        names = ", ".join(again["differs"][:6])
        watcher.say(f"warning: the same run twice differs in {names}: an effect of that size means nothing")
    for seed, names in found["unequal"].items():
        watcher.say(f"warning: the arms of seed {seed} differ in {', '.join(names)}; compare will refuse to pair them")
    if found["failed"]:
        watcher.say(f"{len(found['failed'])} of {len(found['runs'])} runs failed; the same command tries them again")
    path = prepared.where.path
    files = f"{quoted(path)}/*.h5"
    print(f"next:     gradprobe compare {files} --baseline {quoted(prepared.plan['baseline'])}")
    print(f"          gradprobe report {quoted(path)} --out report.html")
