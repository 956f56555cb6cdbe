"""What a command line asks to be recorded, and what follows from it before data and model are there."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from gradprobe.cli.command_options import Hyp, Preset, Source
from gradprobe.errors import RunFileError, UsageError
from gradprobe.foreign import quoted
from gradprobe.trainers.paths import Paths
from gradprobe.trainers.problems import allow, is_own, kind_of
from gradprobe.trainers.registry import TRAINERS
from gradprobe.trainers.settings import Settings, parse_task_weights, resolve, restored

if TYPE_CHECKING:
    from gradprobe.trainers.hyp import DetectionHyp, HypFile

_MOST_PROCESSES = 8
"""That a run to go on with may have, on machines of fewer cores too; of more, somebody else's file would start them."""


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line: settings by their name, the other flags as fields; None: not given.

    Task weights are a text, since their tasks are the data's.
    """

    flags: Mapping[str, Any]
    out: Annotated[Path | None, Option(help="The run file. [default: conflict.h5]", rich_help_panel="Common")] = None
    resume: Annotated[
        Path | None, Option(help="Continue this run from its last complete epoch.", rich_help_panel="Common")
    ] = None
    preset: Preset = ""
    hyp: Hyp = None
    source: Source = None
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a run that is there.", rich_help_panel="Output")] = (
        False
    )
    plan: Annotated[
        Path | None,
        Option(
            help="What was fixed before the runs (a JSON file); kept in the file as plan.*.", rich_help_panel="Output"
        ),
    ] = None
    arm: Annotated[
        str,
        Option(help="The arm of a study that the run belongs to. [default: its trainer]", rich_help_panel="Output"),
    ] = ""
    project: Annotated[Path | None, Option(help="Folder of the run, as YOLOv5 names it.", rich_help_panel="Output")] = (
        None
    )
    name: Annotated[str | None, Option(help="Its sub-folder.", rich_help_panel="Output")] = None
    arguments: Sequence[str] = ()  # as they stand on the command line, for other processes


@dataclass(frozen=True)
class Plan:
    """What will be done."""

    settings: Settings
    hyp: DetectionHyp
    ignored_hyp: tuple[str, ...]
    out: Path
    overwrite: bool
    state: Mapping[str, Any] | None  # of the checkpoint to go on from
    study: Mapping[str, Any] = field(default_factory=dict)  # what was fixed before the runs of a study
    arm: str = ""  # of the study that it belongs to
    id: str = ""  # of the run: in its file and in its checkpoint
    notes: tuple[str, ...] = ()  # of flags that change nothing


def make_plan(request: Request) -> Plan:
    """What the flags ask for; errors that need neither data nor model are found here."""
    from gradprobe.trainers.balancer import find_balancer
    from gradprobe.trainers.engine import with_processes
    from gradprobe.trainers.hyp import DetectionHyp, read_hyp
    from gradprobe.trainers.registry import unused_options

    if request.resume is not None:
        return _plan_to_resume(request)
    file = read_hyp(request.hyp) if request.hyp is not None else None
    settings = settings_of(request, file)
    if settings.trainer == "gradnorm-static" and request.flags.get("task_weights") is not None:
        raise UsageError("gradnorm-static takes its weights from --from; leave out --task-weights.")
    settings = dataclasses.replace(settings, **read_source(request.source, settings))
    settings = with_processes(settings)
    find_balancer(settings.trainer).require(settings)
    return Plan(
        settings=settings,
        hyp=file.loss if file else DetectionHyp(),
        ignored_hyp=file.ignored if file else (),
        out=_output_path(request),
        overwrite=request.overwrite,
        state=None,
        study=_read_plan(request.plan) if request.plan is not None else {},
        arm=request.arm,
        id=uuid.uuid4().hex,
        notes=tuple(unused_options(settings.trainer, _given(request))),
    )


def settings_of(request: Request, file: HypFile | None = None) -> Settings:
    """The settings that the flags give, without what ``--from`` adds."""
    flags = dict(request.flags)
    allow(flags.get("data") or "")
    if flags.get("task_weights") is not None:
        tasks = kind_of(flags.get("data") or Settings.data).tasks
        flags["task_weights"] = parse_task_weights(flags["task_weights"], tasks)
    return resolve(flags, preset=request.preset, hyp=file.optimizer if file else None)


def _given(request: Request) -> list[str]:
    """The settings that have a flag on this command line."""
    return [name for name, value in request.flags.items() if value is not None]


def _read_plan(path: Path) -> dict[str, Any]:
    """What was fixed before the runs, see :func:`gradprobe.study.plan.read`.

    Raises:
        UsageError: It cannot be read, or is no JSON object.
    """
    from gradprobe.study import plan

    try:
        return plan.read(path)
    except UsageError as error:
        raise UsageError(f"--plan {error}") from None


def _output_path(request: Request) -> Path:
    """``--out``, or ``--project``/``--name``/conflict.h5, or conflict.h5."""
    if request.out is not None:
        if request.project is not None or request.name is not None:
            raise UsageError("--out names the file already; leave out --project and --name, or --out.")
        return request.out
    if request.project is not None or request.name is not None:
        return (request.project or Path("runs")) / (request.name or "exp") / "conflict.h5"
    return Path("conflict.h5")


def _plan_to_resume(request: Request) -> Plan:
    from gradprobe.processes import started
    from gradprobe.runfile import open_run
    from gradprobe.trainers import checkpoint
    from gradprobe.trainers.engine import with_processes
    from gradprobe.trainers.hyp import DetectionHyp

    assert request.resume is not None
    others = (
        *(request.preset, request.hyp, request.out, request.overwrite, request.source),
        *(request.plan, request.arm),
    )
    if (
        {*_given(request)} - {"trainer", "data"}
        or any(others)
        or request.project is not None
        or request.name is not None
    ):
        raise UsageError(
            "--resume goes on with the settings of that run; give no other flags with it (but --trainer and "
            "--data, where those are modules of your own)."
        )
    with open_run(request.resume) as run:
        if run.end == "finished":
            raise UsageError(f"--resume {request.resume}: this run is finished; there is nothing to go on with.")
        last, own = int(run["step"].max(initial=-1)), str(run.provenance.get("id", ""))
        _check_named(request, {name: run.provenance.get(f"settings.{name}", "") for name in ("trainer", "data")})
    paths = Paths(request.resume)
    if not os.path.lexists(paths.checkpoint) and paths.earlier_checkpoint.is_file():
        raise RunFileError(
            f"{paths.checkpoint}: no such checkpoint. {paths.earlier_checkpoint.name} has the name that earlier "
            f"versions gave it, and other runs' too; if it is this run's, rename it to {paths.checkpoint.name}, "
            f"and its weights to {paths.best.name} and {paths.last.name}."
        )
    state = checkpoint.load(paths.checkpoint)
    if state.get("id", "") != own:
        raise RunFileError(f"{paths.checkpoint}: is of another run than {request.resume}. {checkpoint.ANEW}")
    if state["probe"]["last_row"] > last:  # of an older run, that this one had only begun to replace
        raise RunFileError(
            f"{request.resume}: ends at step {last}, but its checkpoint belongs to a run that was measured up to step "
            f"{state['probe']['last_row']}. There is nothing to go on from; record anew with --overwrite."
        )
    _check_named(request, state["settings"])
    settings = restored(state["settings"])
    if settings.processes > max(started(), _MOST_PROCESSES, os.cpu_count() or 1):
        raise RunFileError(
            f"{request.resume}: was recorded by {settings.processes} processes, which are not started on a machine of "
            f"{os.cpu_count()} cores. Start them with torchrun."
        )
    return Plan(
        settings=with_processes(settings),
        hyp=DetectionHyp(**state["hyp"]),
        ignored_hyp=tuple(state["ignored_hyp"]),
        out=request.resume,
        overwrite=False,
        state=state,
        study=state.get("plan", {}),
        arm=state.get("arm", ""),
        id=own,
    )


def _check_named(request: Request, settings: Mapping[str, Any]) -> None:
    """A module is imported because this command line names it, never because a file does.

    Raises:
        UsageError: The run is of a trainer or data that the command line does not name, or of others than it names.
    """
    for name, bundled in (("trainer", TRAINERS.__contains__), ("data", lambda data: not is_own(data))):
        named, recorded = request.flags.get(name), str(settings.get(name, ""))
        if named is not None and named != recorded:
            raise UsageError(f"--{name} {named}: {request.resume} was recorded with --{name} {recorded}; leave it out.")
        if named is None and not bundled(recorded):
            raise UsageError(
                f"--resume {request.resume}: was recorded with {recorded!r}, a module that is no part of gradprobe and "
                f"whose code would be run. If it is yours, name it too: --{name} {quoted(recorded)}"
            )
    allow(request.flags.get("data") or "")


def read_source(source: Path | None, settings: Settings) -> dict[str, Any]:
    """What ``--from`` gives to a trainer, as plain settings: a trainer itself reads no run files.

    Raises:
        UsageError: The trainer needs ``--from`` and has none, or the other way round; or the run is not of the kind
            it needs.
        RunFileError: It cannot be read.
    """
    reader = _READERS.get(settings.trainer)
    if reader is None:
        if source is not None:
            raise UsageError(
                f"--from {source}: {settings.trainer} reads no earlier run; those that do: {', '.join(_READERS)}."
            )
        return {}
    if source is None:
        raise UsageError(f"--trainer {settings.trainer} needs an earlier run: --from conflict.h5")
    return {"from_run": source.name, **reader(source, settings)}


def _average_weights(source: Path, settings: Settings) -> Mapping[str, Any]:
    """The time average of every task's weight in a gradnorm run.

    Raises:
        UsageError: It is no gradnorm run, or its tasks are others.
    """
    from gradprobe.runfile import Run

    with Run(source) as run:
        trainer = run.provenance.get("trainer")
        if trainer != "gradnorm":
            raise UsageError(f"--from {source}: was recorded with --trainer {trainer}; gradnorm-static needs gradnorm.")
        tasks = kind_of(settings.data).tasks
        if run.tasks != tasks:
            raise UsageError(f"--from {source}: its tasks are {', '.join(run.tasks)}, not {', '.join(tasks)}.")
        weight = run["weight"].astype(float)
    if not len(weight):
        raise RunFileError(f"{source}: has no rows, so there are no weights to average.")
    return {"task_weights": tuple(weight.mean(axis=0).tolist())}


def _layers_in_conflict(source: Path, settings: Settings) -> Mapping[str, Any]:
    """The ``--top-k`` layers with the highest score of :mod:`gradprobe.verdict.advice`.

    Raises:
        UsageError: The run is of another architecture, or has fewer such layers.
    """
    from gradprobe.cli.advise import gramians
    from gradprobe.runfile import Run
    from gradprobe.verdict.advice import layer_scores

    with Run(source) as run:
        cfg, wanted = run.provenance.get("settings.cfg"), Path(settings.cfg).name
        if cfg != wanted:
            raise UsageError(
                f"--from {source}: was recorded from another architecture ({cfg or 'no YOLOv5 cfg'}, not {wanted}), so "
                "its layers are not this model's. Record a joint run of this one first."
            )
        if doubled := run.provenance.get("model.doubled"):
            raise UsageError(
                f"--from {source}: its model has {len(doubled)} doubled layers already, so it does not say which "
                "of the undivided model's are in conflict. Take a run of an undivided model: --trainer joint."
            )
        scores = layer_scores(gramians(run), run.layer_size)
        size = dict(zip(run.layers, run.layer_size.tolist(), strict=True))
        names = list(dict.fromkeys(run.layers[layer] for layer, _ in scores.ranked()))
    if len(names) < settings.top_k:
        raise UsageError(
            f"--top-k {settings.top_k}: {source} has {len(names)} layers with a cosine from three or more rows."
        )
    chosen = tuple(names[: settings.top_k])
    return {"double": chosen, "double_sizes": tuple(size[name] for name in chosen)}


_READERS: dict[str, Callable[[Path, Settings], Mapping[str, Any]]] = {
    "gradnorm-static": _average_weights,
    "split": _layers_in_conflict,
}
