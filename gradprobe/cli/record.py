"""`gradprobe record`: train with a probe and keep what it measures, from the flags to the closed file."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from typer import Option

import gradprobe
from gradprobe.cli import INTERRUPTED
from gradprobe.cli.command_options import fields_of, given, takes_fields_of, takes_settings
from gradprobe.cli.console import stdout
from gradprobe.cli.request import Plan, Request, make_plan
from gradprobe.environment import argv, environment
from gradprobe.errors import DataError, RunFileError, UsageError
from gradprobe.foreign import quoted
from gradprobe.trainers.paths import Paths
from gradprobe.trainers.problems import problem_of
from gradprobe.trainers.registry import TRAINERS

if TYPE_CHECKING:
    from gradprobe.cli.progress import Display
    from gradprobe.processes import OneProcess
    from gradprobe.rows import Header, Row, Sink
    from gradprobe.runfile import RunWriter
    from gradprobe.trainers.loop import TrainingOutcome
    from gradprobe.trainers.problems import Data


@takes_settings()
@takes_fields_of(Request)
def record(
    list_trainers: Annotated[
        bool,
        Option("--list-trainers", help="List what each trainer does and costs, and exit.", rich_help_panel="Common"),
    ] = False,
    **flags: Any,
) -> int:
    """Train detection and classification together and record what their gradients do to each other."""
    if list_trainers:
        print(_trainer_list())
        return 0
    arguments = click.get_current_context().obj or ()
    return _record_run(Request(given(flags), **fields_of(Request, flags), arguments=arguments))


def _trainer_list() -> str:
    """What each trainer does, its cost per step compared with joint's, and its source, as aligned text."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("trainer", "what it does", "cost of a step, compared with joint's", "source"):
        table.add_column(column, overflow="fold")
    for name, trainer in TRAINERS.items():
        table.add_row(name, trainer.what, trainer.cost, trainer.source)
    console = stdout()
    console.width = 160
    with console.capture() as captured:
        console.print(table)
    lines = (line.rstrip() for line in captured.get().splitlines())
    return (
        "\n".join(lines)
        + "\n\nYour own: --trainer my_module:MyBalancer, a subclass of gradprobe.trainers.balancer.Balancer"
    )


def _record_run(request: Request) -> int:
    """Train, record, and say where the file is; in several processes where they are asked for.

    Returns:
        The exit code: 0, or that of a process that failed, which has said why.

    Raises:
        GradprobeError: See the tree; the file, where one was begun, is closed and valid.
        KeyboardInterrupt: Stopped; the file is closed and valid.
    """
    # On two busy cores, threads that spin while they wait make a step seven times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from gradprobe.cli.progress import NoDisplay, make_display
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
            train(plan, None, NoDisplay(plan.settings))
    return 0


def _record(plan: Plan, display: Display) -> None:
    from gradprobe.runfile import RunWriter

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

    settings = plan.settings
    display.phase("loading data")
    data = problem_of(settings).load(settings)
    for note in _notes(plan, data):
        display.note(note)
    display.phase("building the model")
    begun = _FirstCheckpoint(plan.out)
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


class _FirstCheckpoint:
    """When the new run begins: a first checkpoint, so that a kill in the first epoch leaves something to go on from,
    and no weights of an older run of the same name, which would pass for this one's. A sink beside the writer.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self.state: Mapping[str, Any] = {}

    def start(self, header: Header) -> None:
        """The new run has begun."""
        from gradprobe.trainers import checkpoint

        paths = Paths(self._out)
        for path in paths.existing():
            path.unlink()
        with suppress(OSError):  # the loop tells of a full disk after the first epoch
            checkpoint.save(paths.checkpoint, self.state)
        self.state = {}

    def write(self, row: Row) -> None:
        """Nothing to do."""

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Nothing to do."""

    def annotate(self, values: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def flush(self) -> bool:
        return True

    def close(self, end: str) -> None:
        """Nothing to do."""


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``gradprobe ARGUMENTS`` in several processes of this machine and wait for them.

    Where one fails the others are stopped, politely at first, so that the first of them closes its file. A Ctrl-C, or a
    polite kill, is passed on to all.

    Returns:
        0, or the exit code of the process that failed first; 130 where they were stopped.

    Raises:
        UsageError: This torch has no torch.distributed.
    """
    import torch.distributed

    if not torch.distributed.is_available():
        raise UsageError(f"--processes {processes}: the installed torch has no torch.distributed.")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Threads that outnumber the cores make every process wait for the others.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"gradprobe-{os.getpid()}",
        rdzv_endpoint="localhost:0",
        rdzv_backend="c10d",
        max_restarts=0,
        monitor_interval=0.1,
    )
    _be_quiet()
    # By its path: `-m gradprobe` would take a folder of that name that lies in the present one.
    command = str(Path(gradprobe.__file__).with_name("__main__.py"))
    try:
        elastic_launch(config, sys.executable)(command, *arguments)
    except ChildFailedError as error:
        return _exit_code(error.get_first_failure()[1].exitcode)
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    return 0


def _exit_code(code: int) -> int:
    """Of a process that a signal ended: what a shell says."""
    return code if code >= 0 else (INTERRUPTED if code in (-signal.SIGINT, -signal.SIGTERM) else 128 - code)


def _be_quiet() -> None:
    """The launcher logs what each process says itself."""
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
