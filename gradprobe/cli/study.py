"""`gradprobe study`: every trainer with every seed, fixed beforehand, run in parallel, resumable."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click.core import ParameterSource
from typer import Option

from gradprobe import whole_files
from gradprobe.cli.command_options import flag_of, given, takes_fields_of
from gradprobe.cli.request import Request, settings_of
from gradprobe.errors import GradprobeError, UsageError
from gradprobe.foreign import quoted
from gradprobe.study.arms import Arm, Planned, chains, check_baseline, choose, make_arms, make_runs, parse_seeds
from gradprobe.trainers.problems import allow, kind_of
from gradprobe.trainers.settings import Settings

if TYPE_CHECKING:
    from gradprobe.cli.progress import StudyLines
    from gradprobe.study.folder import Folder
    from gradprobe.study.runner import Entry, Launcher

_EXIT_FAILED = 1


@dataclass(frozen=True)
class _StudyPreset:
    """A whole study by one name."""

    trainers: str
    seeds: str
    record: tuple[str, ...]


_PRESETS = {
    # Within an hour on two cores with --jobs 2: 16 runs of 96 steps. The ledger's passes over its probe batch are the
    # larger part of a step, hence fewer images in it; bursts would not help, as momentum outlives them.
    "quick": _StudyPreset(
        "single,joint,gradnorm,dual",
        "3",
        (
            *("--data", "phantom", "--imgsz", "64", "--epochs", "4"),
            *("--every", "4", "--probe-every", "8", "--ledger-images", "32"),
        ),
    ),
}

_OURS = (
    *("seed", "trainer", "task", "source", "out", "resume", "overwrite", "project", "name", "plan", "arm"),
    "list_trainers",
)
"""Flags of ``gradprobe record`` that the study gives itself."""


@dataclass(frozen=True)
class Asked:
    """What was asked for: a field for each flag of the study, and ``record``, the flags for every run."""

    out: Annotated[Path, Option(help="The folder of the study; a study that was begun there is continued.")]
    trainers: Annotated[
        str | None, Option(help="The arms, such as single,joint,gradnorm,dual; single is one arm per task.")
    ] = None
    arm: Annotated[
        list[str] | None,
        Option(metavar="NAME=TRAINER...", help="One more arm, with its own flags: 'light=joint --lr 1e-3'."),
    ] = None
    seeds: Annotated[str | None, Option(help="How many, or which: 5, or 0,1,7. [default: 5]")] = None
    baseline: Annotated[str, Option(help="The arm that others are compared with.")] = "joint"
    jobs: Annotated[
        int | None,
        Option(
            help="Runs at a time; the cores are divided among them. [default: 1; on a cluster, what it has room for]"
        ),
    ] = None
    engine: Annotated[
        str, Option(help="Who runs them: local (processes of this machine), ray (a Ray cluster), slurm (writes a job).")
    ] = "local"
    preset: Annotated[str, Option(help="quick: 4 trainers, 3 seeds, small images, within an hour on 2 cores.")] = ""
    window: Annotated[str, Option(metavar="A:B", help="Steps that count. [default: 20 under Adam, to the end]")] = ""
    pairs: Annotated[str, Option(help="Such as 'cls>det': what cls does to det. [default: all]")] = ""
    margin: Annotated[float, Option(help="Smallest difference of interference that matters.")] = 0.1
    outcome_margin: Annotated[float, Option(help="The same for metrics of the test split.")] = 0.02
    only: Annotated[str, Option(help="Only these runs, such as joint-s0,dual-s0: for schedulers.")] = ""
    dry_run: Annotated[bool, Option("--dry-run", help="Print the commands of what is left; write nothing.")] = False
    record: Sequence[str] = ()


@takes_fields_of(Asked)
def study(context: typer.Context, **flags: Any) -> int:
    """Run a whole experiment, so that `gradprobe compare` can judge it. Flags of `gradprobe record` go to every run.

    Example: gradprobe study --trainers single,joint,gradnorm,dual --seeds 5 --out study --data my/data.yaml --epochs 30
    """
    asked = Asked(**flags, record=[word for word in context.args if word != "--"])
    carry_out = _find_engine(asked.engine)
    prepared = prepare(asked, check_extras=not asked.dry_run, write=not asked.dry_run)
    if asked.dry_run:
        show(asked, prepared)
        return 0
    return 0 if carry_out(asked, prepared) else _EXIT_FAILED


@dataclass(frozen=True)
class _Prepared:
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
        from gradprobe.study.folder import FINISHED

        return [run for run in self.runs if self.where.state(run) != FINISHED]


def prepare(asked: Asked, *, check_extras: bool = True, write: bool = True) -> _Prepared:
    """Fix everything, find what is wrong before hours of training, and write the plan.

    Args:
        asked: The flags.
        check_extras: Also whether the packages that the trainers need are installed, which imports torch.
        write: The plan; else it is only compared with one that is there, and nothing is written.

    Raises:
        UsageError: Something cannot be meant; or the folder was begun with another plan.
    """
    from gradprobe.study import plan
    from gradprobe.study.folder import Folder

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
    arms = make_arms([t.strip() for t in trainers.split(",") if t.strip()], asked.arm or (), tasks)
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
    return _Prepared(where, fixed, chosen, common, asked.jobs, gpus, not asked.only, notes)


def _gpus(device: str) -> int:
    """That ``--device`` names: ``0,1`` are two."""
    return sum(word.strip().isdecimal() for word in device.split(","))


def _preset(name: str) -> _StudyPreset | None:
    if name and name not in _PRESETS:
        raise UsageError(f"--preset {name}: there is no such preset of a study (there are: {', '.join(_PRESETS)}).")
    return _PRESETS.get(name)


def _request(words: Sequence[str], arm: Arm | None = None) -> Request:
    """What ``gradprobe record`` would be asked for with these flags.

    Raises:
        UsageError: A flag is the study's own to give.
        click.UsageError: There is no such flag.
    """
    values = _parsed(words)
    own = [name for name in _OURS if name in values and not (arm and name == "task")]
    if own:
        better = {"seed": "--seeds", "trainer": "--trainers or --arm", "task": "the trainer single"}.get(own[0])
        problem = f"{flag_of(own[0])} is given to each run by the study"
        raise UsageError(problem + (f"; use {better}." if better else "."))
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
    from gradprobe.study import plan

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


def show(asked: Asked, prepared: _Prepared) -> None:
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
        *(word for arm in asked.arm or () for word in ("--arm", arm)),
        *("--margin", repr(asked.margin), "--outcome-margin", repr(asked.outcome_margin)),
    ]


def run(prepared: _Prepared, launch: Launcher | None = None) -> bool:
    """Run what is left, write what became of it, and say what to do next.

    Args:
        prepared: What to run.
        launch: How; a process each, where None.

    Returns:
        Whether no run failed.
    """
    from gradprobe.cli.progress import make_study_display
    from gradprobe.study.runner import FAILED, Study, subprocesses

    watcher = make_study_display(len(prepared.runs))
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


def results(prepared: _Prepared, entries: Sequence[Entry]) -> dict[str, Any]:
    """What became of every run, whether the first one repeats bit for bit, and whether arms had equal conditions."""
    from gradprobe.study.runner import DONE, FAILED, SKIPPED

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
    from gradprobe.study import folder

    second = next((run for run in good if run.again), None)
    first = next((run for run in good if second and run.arm == second.arm and run.seed == second.seed), None)
    if first is None or second is None or first is second:
        return None
    one, other = where.run(first), where.run(second)
    try:
        found = folder.differing(one, other)
    except GradprobeError as error:
        return {"files": [one.name, other.name], "identical": False, "differs": [str(error)]}
    return {"files": [one.name, other.name], "identical": not found, "differs": found}


def _unequal(where: Folder, good: Sequence[Planned]) -> dict[str, list[str]]:
    """Seed -> conditions in which its runs differ."""
    from gradprobe.study import folder

    found = {}
    for seed in dict.fromkeys(run.seed for run in good):
        names = folder.unequal([where.run(run) for run in good if run.seed == seed])
        if names:
            found[str(seed)] = names
    return found


def _tell(watcher: StudyLines, prepared: _Prepared, found: Mapping[str, Any]) -> None:
    for each in found["runs"]:
        if each["file"] in found["failed"]:
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


_Engine = Callable[[Asked, _Prepared], bool]
"""Carries out what is prepared; says whether no run failed."""


def _find_engine(name: str) -> _Engine:
    """The engine of this name.

    Raises:
        UsageError: There is none.
    """
    engines: dict[str, _Engine] = {"local": _local, "ray": _on_ray, "slurm": by_slurm}
    if name not in engines:
        raise UsageError(f"--engine {name}: there is no such engine (there are: {', '.join(engines)}).")
    return engines[name]


def _local(asked: Asked, prepared: _Prepared) -> bool:
    """Processes of this machine."""
    return run(prepared)


def _on_ray(asked: Asked, prepared: _Prepared) -> bool:
    """Tasks on a Ray cluster, watched from here; where none is left, none is joined."""
    if not prepared.left:
        return run(prepared)
    from gradprobe.study import cluster

    cluster.connect_ray()
    have = cluster.ray_nodes()
    jobs = min(cluster.at_a_time(have, prepared.gpus, prepared.jobs), len(prepared.runs))
    each = cluster.cores_per_run(have, prepared.gpus, jobs)
    launch = cluster.ray_tasks(prepared.where.plan, each, prepared.gpus)
    return run(dataclasses.replace(prepared, jobs=jobs), launch)


def by_slurm(asked: Asked, prepared: _Prepared) -> bool:
    """Write an array job of the runs that are left; where none is, say what became of them."""
    if not prepared.left:
        return run(prepared)
    from gradprobe.study import cluster
    from gradprobe.study.runner import COMMAND, cores, cores_each

    where = prepared.where.path
    text = cluster.slurm_script(
        prepared.left,
        [*COMMAND, *words(asked)],
        asked.record,
        out=where,
        here=Path.cwd(),
        cores=cores_each(prepared.jobs or cores()),
        gpus=prepared.gpus,
        jobs=prepared.jobs,
    )
    (where / "logs").mkdir(parents=True, exist_ok=True)
    path = where / cluster.SLURM_SCRIPT
    with whole_files.telling(path):
        whole_files.write(path, text)
    for note in prepared.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{len(prepared.left)} of {len(prepared.runs)} runs are left", file=sys.stderr)
    print(f"next:     sbatch {quoted(path)}")
    print("          and the command of now once more when it is done: it says what became of the runs")
    return True
