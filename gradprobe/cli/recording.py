"""What ``gradprobe record`` does, from the flags to the closed file."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradprobe.cli.first_checkpoint import FirstCheckpoint
from gradprobe.cli.interventions import read_source
from gradprobe.cli.launch import launch
from gradprobe.cli.live import Display, make_display
from gradprobe.cli.silent import Silent
from gradprobe.environment import argv, environment
from gradprobe.errors import DataError, RunFileError, UsageError
from gradprobe.foreign import quoted
from gradprobe.runfile import RunWriter, open_run
from gradprobe.trainers.paths import Paths
from gradprobe.trainers.problems import allow, is_own, kind_of
from gradprobe.trainers.registry import TRAINERS
from gradprobe.trainers.settings import Settings, parse_task_weights, resolve, restored

if TYPE_CHECKING:
    from gradprobe.processes import OneProcess
    from gradprobe.rows import Sink
    from gradprobe.trainers.hyp import DetectionHyp, HypFile
    from gradprobe.trainers.loop import TrainingOutcome
    from gradprobe.trainers.problems import Data


_MOST_PROCESSES = 8
"""That a run to go on with may have, on machines of fewer cores too; of more, somebody else's file would start them."""


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; None: not given. Task weights are a text: their tasks are the data's."""

    flags: Mapping[str, Any]
    preset: str = ""
    hyp: Path | None = None
    out: Path | None = None
    project: Path | None = None
    name: str | None = None
    overwrite: bool = False
    resume: Path | None = None
    source: Path | None = None
    plan: Path | None = None
    arm: str = ""
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


def record_run(request: Request) -> int:
    """Train, record, and say where the file is; in several processes where they are asked for.

    Returns:
        The exit code: 0, or that of a process that failed, which has said why.

    Raises:
        GradprobeError: See the tree; the file, where one was begun, is closed and valid.
        KeyboardInterrupt: Stopped; the file is closed and valid.
    """
    # On two busy cores, threads that spin while they wait make a step seven times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from gradprobe.processes import is_first, started
    from gradprobe.trainers.engine import check_gpus

    plan = make_plan(request)
    if plan.state is None:
        _check_side_files(plan)
    if plan.settings.processes > started():
        check_gpus(plan.settings.device)
        return launch(request.arguments, plan.settings.processes)
    if is_first():
        _record(plan, make_display(plan.settings))
    else:
        with interruptible(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first process warns
            train(plan, None, Silent(plan.settings))
    return 0


def _record(plan: Plan, display: Display) -> None:
    writer = RunWriter(plan.out, overwrite=plan.overwrite, resume=plan.state is not None)
    with interruptible():
        try:
            with display:
                outcome = train(plan, writer, display)
        except BaseException as error:
            with uninterrupted():
                writer.close(_end(error))
                if not writer.started and not plan.out.exists():
                    Paths(writer.path).checkpoint.unlink(missing_ok=True)
            _say_where(display, plan, writer, stopped=True)
            raise
        with uninterrupted():
            writer.annotate({"batches": outcome.batches, **({"test": outcome.test} if outcome.test else {})})
            writer.write_test(outcome.clusters)
            writer.close("finished")
            Paths(writer.path).checkpoint.unlink(missing_ok=True)  # only now: a kill before must leave something
    _say_where(display, plan, writer, stopped=False)


def make_plan(request: Request) -> Plan:
    """What the flags ask for; what can be told wrong without data and model is found here."""
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


def _check_side_files(plan: Plan) -> None:
    """No run takes the weights or the checkpoint of another one, whatever its name is.

    Raises:
        UsageError: There are some, and no ``--overwrite``.
    """
    paths = Paths(plan.out)
    if plan.overwrite or os.path.lexists(plan.out):  # then it is said that the run exists
        return
    found = [path.name for path in paths.existing() if path != paths.checkpoint or not _is_first(path)]
    if found:
        raise UsageError(
            f"--out {plan.out}: there is no such run, but {', '.join(found)} of one, which it would replace. Choose "
            "another name, or replace them with --overwrite."
        )


def _is_first(path: Path) -> bool:
    """Whether a checkpoint is that of a run that was killed before its first row: nothing is lost with it."""
    from gradprobe.trainers import checkpoint

    try:
        return bool(checkpoint.load(path)["epoch"] == 0)
    except RunFileError:
        return False


def train(plan: Plan, writer: RunWriter | None, display: Display) -> TrainingOutcome:
    """Build the training and run it to its end.

    Args:
        plan: What is to be done.
        writer: None in processes other than the first.
        display: Is told how far it is.
    """
    from gradprobe.processes import join
    from gradprobe.trainers.engine import check_device, own_device

    processes = join(check_device(own_device(plan.settings.device)))
    with processes.losing_none():
        outcome = _train(plan, writer, display, processes)
        processes.leave()
    return outcome


def _train(plan: Plan, writer: RunWriter | None, display: Display, processes: OneProcess) -> TrainingOutcome:
    from gradprobe.trainers import loop
    from gradprobe.trainers.build import build
    from gradprobe.trainers.problems import problem_of

    settings = plan.settings
    display.phase("loading data")
    data = problem_of(settings).load(settings)
    for note in _notes(plan, data):
        display.note(note)
    display.phase("building the model")
    begun = FirstCheckpoint(plan.out)
    sinks: list[Sink] = [writer, display] if writer is not None else []
    if plan.state is None and writer is not None:
        # Behind the writer an older run stays whole until the new one is written; where there is none, the checkpoint
        # comes first, so that no kill finds a run without one.
        sinks.insert(1 if plan.out.exists() else 0, begun)
    training = build(
        settings,
        data,
        sinks,
        display,
        out=plan.out,
        processes=processes,
        hyp=plan.hyp,
        provenance={
            **({"id": plan.id} if plan.id else {}),
            "argv": argv(),
            "ignored_hyp": list(plan.ignored_hyp),
            **({"plan": plan.study} if plan.study else {}),
            **({"arm": plan.arm} if plan.arm else {}),
            **environment(),
        },
    )
    training.origin = {
        "settings": dataclasses.asdict(settings),
        "hyp": dataclasses.asdict(plan.hyp),
        "ignored_hyp": list(plan.ignored_hyp),
        "data_fingerprint": data.fingerprint,
        "plan": dict(plan.study),
        "arm": plan.arm,
        "id": plan.id,
    }
    if plan.state is not None:
        _check_same_data(plan, data)
        loop.load_training_state(training, plan.state)
    else:
        # Weights change only after the file has begun, but BatchNorm and the balancer before: hence a copy.
        begun.state = copy.deepcopy(loop.training_state(training))
    display.begin(settings.epochs, len(training.train_loader), training.probe.step)
    return loop.run(training)


def _check_same_data(plan: Plan, data: Data) -> None:
    assert plan.state is not None
    if plan.state["data_fingerprint"] != data.fingerprint:
        raise DataError(
            f"{plan.settings.data}: the data changed since {plan.out} was begun (images or labels were added, removed "
            "or edited), so the run cannot go on with them. Bring them back, or record anew with --overwrite."
        )


def _notes(plan: Plan, data: Data) -> Iterator[str]:
    yield from plan.notes
    if plan.ignored_hyp:
        yield (
            f"ignored in --hyp: {', '.join(plan.ignored_hyp)}. gradprobe trains without augmentation and warm-up, "
            "which couple tasks; the file says so."
        )
    if data.skipped:
        yield f"{len(data.skipped)} images left out: {_first(data.skipped)}"
    others = tuple(warning for warning in data.warnings if "left out of training" not in warning)
    if others:
        yield f"{len(others)} warnings of `gradprobe data check`: {_first(others)}"
    if plan.settings.clip_norm:
        yield f"clipping the global gradient norm at {plan.settings.clip_norm:g}: this couples the tasks."


def _first(messages: tuple[str, ...], count: int = 3) -> str:
    return "; ".join(messages[:count]) + ("; ..." if len(messages) > count else "")


def _end(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}: {error}"


def _say_where(display: Display, plan: Plan, writer: RunWriter, *, stopped: bool) -> None:
    if not writer.started:  # what is there is an older run, untouched
        return
    state = "stopped, complete up to here" if stopped else "recorded"
    display.result(f"not all of it was recorded: {writer.trouble}" if writer.trouble else f"{state}: {plan.out}")
    display.result(f"next:     gradprobe plot {quoted(plan.out)}")


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a polite kill (SIGTERM) end a recording as Ctrl-C does: with the file closed."""
    try:
        old = signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A second Ctrl-C, or a second polite kill, must not tear the closing of the file."""
    try:
        old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
